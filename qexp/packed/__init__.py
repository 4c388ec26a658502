"""The stored form of a quantized matrix; bits are counted here. The interface is `base.Packed`."""
