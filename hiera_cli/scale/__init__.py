"""Runs over many processes and machines: their inputs, options and rows."""
