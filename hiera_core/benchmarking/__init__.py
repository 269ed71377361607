"""Measure the speed of models and of other implementations.

Each model runs in a process of its own, and the processes run alternately.
"""

from .reference_api import benchmark

__all__ = ["benchmark"]
