"""Decoders besides Pillow and PyAV, and images that lie on a device."""
