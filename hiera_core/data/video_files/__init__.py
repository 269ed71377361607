"""Read and write video files."""
