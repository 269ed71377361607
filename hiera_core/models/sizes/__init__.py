"""Input sizes: which are legal, and what is kept for each size that a model has seen."""
