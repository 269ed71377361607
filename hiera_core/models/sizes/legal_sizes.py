"""Which input sizes a model takes, and the nearest ones to a size that it does not take."""

from __future__ import annotations

from collections.abc import Sequence


def nearest(size: int, step: int) -> str:
    """Return the legal sizes on both sides of an illegal one, for a message: "96 or 128".

    Args:
        size: The illegal size, in pixels or frames.
        step: Number of which sizes must be a multiple.
    """
    below = size // step * step
    return f"{below} or {below + step}" if below > 0 else f"{step}"


def nearest_whole(sizes: Sequence[int], steps: Sequence[int]) -> str:
    """Return the nearest legal sizes of all dimensions, for a message: "96x128 or 128x128".

    Args:
        sizes: Size along each dimension.
        steps: Number of which each size must be a multiple.
    """
    pairs = [*zip(sizes, steps, strict=True)]
    below = "x".join(str(max(size // step, 1) * step) for size, step in pairs)
    above = "x".join(str(max(-(-size // step), 1) * step) for size, step in pairs)
    return below if below == above else f"{below} or {above}"


def illegal_dimension(sizes: Sequence[int], steps: Sequence[int]) -> int | None:
    """Return the first dimension whose size is not a multiple of its step, or None."""
    for dim, (size, step) in enumerate(zip(sizes, steps, strict=True)):
        if size < 1 or size % step:
            return dim
    return None


def constant(size: Sequence[int]) -> tuple[int, ...]:
    """Return a size as numbers that a compiler treats as constants.

    It compiles a program for each size. Symbols in place of numbers take it minutes, because every
    permutation of tokens divides them many times.
    """
    return tuple(len(range(n)) for n in size)  # a symbol that is counted to becomes a constant
