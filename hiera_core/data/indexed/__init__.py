"""Indices of data sets: what every sample is, in a few arrays, and kept for the next run."""
