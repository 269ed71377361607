"""Inputs at remote places."""
