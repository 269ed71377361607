"""Compiled models, and programs that are kept for the next run."""
