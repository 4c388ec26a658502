"""Stored forms of quantized matrices, which determine the bits. The interface is `base.Packed`."""
