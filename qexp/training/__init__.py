"""Training loop, losses and optimizer of all methods that train."""
