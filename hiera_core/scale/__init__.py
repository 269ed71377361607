"""Inference past one machine: results as rows of Parquet files, and the engine on Ray Data."""
