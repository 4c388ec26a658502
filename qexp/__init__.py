"""Quantize transformer models by configuration: one command, one folder, one comparable number."""

__version__ = "0.1.0"
