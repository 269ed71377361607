"""Tests of hiera. They compare with the reference, timm and transformers, and with slow
definitions."""

import os

# Threads that wait do not use a core, because processes of the tests share the cores. PyTorch reads
# this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
