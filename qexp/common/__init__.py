"""Shared utilities: errors, files, caches, hashes, progress bars and ranks."""
