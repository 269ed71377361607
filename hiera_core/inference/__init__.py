"""Inference on a stream of inputs: predict, features, reconstruct, evaluate."""
