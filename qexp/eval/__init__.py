"""Measurements of a model, each with a name and a definition."""
