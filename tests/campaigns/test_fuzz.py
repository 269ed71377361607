"""Read the inputs that fuzzing found, and the fuzzer's seeds; see fuzz.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from .fuzz import FOUND, TARGETS, seeds, try_input

FILES = sorted(path for path in FOUND.glob("*/*") if path.is_file())


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_found_inputs_are_reported_in_words(path: Path, tmp_path: Path) -> None:
    error = try_input(path.parent.name, path.read_bytes(), tmp_path)
    assert error is None, repr(error)


@pytest.mark.parametrize("target", TARGETS)
def test_cut_seeds_are_reported_in_words(target: str, tmp_path: Path) -> None:
    """Every seed, cut at 40 places, and with a byte changed at 40 places."""
    for seed in seeds(target):
        step = max(1, len(seed) // 40)
        for place in range(0, len(seed), step):
            changed = seed[:place] + bytes([seed[place] ^ 0xFF]) + seed[place + 1 :]
            for content in (seed[:place], changed):
                error = try_input(target, content, tmp_path)
                assert error is None, (content, error)
