"""Formats of image files that are read here, not by Pillow."""
