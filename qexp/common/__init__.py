"""Errors, files, caches and hashes: what every package may use."""
