"""Transforms before quantization: channel scales and shifts, rotation, weight clipping."""
