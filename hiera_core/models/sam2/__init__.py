"""The image encoder of SAM 2."""
