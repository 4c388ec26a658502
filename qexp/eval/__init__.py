"""Evaluators: measurements of a model, each with a name and a definition."""
