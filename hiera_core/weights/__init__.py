"""Weights of finished models: downloads, files, parameter names, checked state dicts."""
