"""Kernels for CPUs that `cpu.py` chooses from."""
