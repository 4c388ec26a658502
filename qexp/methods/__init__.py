"""What is done to a model: steps that change it in place and return a record per linear."""
