"""One training loop for every method that trains."""
