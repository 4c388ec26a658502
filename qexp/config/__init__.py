"""Instantiation of configurations, and messages about errors in them."""
