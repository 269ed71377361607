"""Measure speed: models and their peers, each in a process of its own, in turns."""

from .reference_api import benchmark

__all__ = ["benchmark"]
