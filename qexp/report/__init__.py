"""Finished runs as tables, plots and pages; loggers."""
