"""Weights of trained models: download, read and write files, map parameter names, check."""
