"""Inference on columns of a table, for engines that run plain callables on batches of rows."""
