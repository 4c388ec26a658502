"""Texts and images: where they come from, and how calibration batches are cut from them."""
