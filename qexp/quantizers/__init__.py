"""Modules that round in the forward pass, and where a model carries them."""
