"""Corpora of texts and images, and calibration batches made from them."""
