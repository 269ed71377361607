"""Tests of batches: what happens when memory runs out, also in compiled programs."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

import hiera_core
from hiera_core.errors import DeviceError, UsageError
from hiera_core.inference import batching
from hiera_core.inference.predict import Classifier
from hiera_core.inference.reconstruct import BatchReconstructor

from .conftest import SMALL, draw_weights


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace the compiler by one that notes the batch size of every call."""
    sizes: list[int] = []

    def compile_for_inference(function: Any, *_: Any) -> Any:
        def program(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            sizes.append(len(x))
            return function(x, *args, **kwargs)

        return program

    monkeypatch.setattr(batching, "compile_for_inference", compile_for_inference)
    return sizes


def views(count: int, size: int = 64) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return list(generator.integers(0, 256, (count, size, size, 3), dtype=np.uint8))


def limit_memory(runner: Any, most: int, tried: list[int]) -> None:
    """Let memory run out for more than `most` views."""
    compute = runner.compute

    def limited(x: torch.Tensor) -> Any:
        tried.append(len(x))
        if len(x) > most:
            raise torch.OutOfMemoryError("out of memory")
        return compute(x)

    runner.compute = limited


@pytest.mark.parametrize(("most", "expected"), [(5, [8, 4, 4, 4]), (1, [8, 4, 2] + 11 * [1])])
def test_a_compiled_size_shrinks_with_the_batch(
    most: int, expected: list[int], compiled: list[int]
) -> None:
    model = draw_weights(hiera_core.Hiera(**SMALL)).eval()
    plain = Classifier(model, batch_size=8)(views(11))
    runner, tried = Classifier(model, batch_size=8, compile=True), []
    limit_memory(runner, most, tried)
    assert torch.allclose(runner(views(11)), plain, atol=1e-5)
    assert tried == expected
    assert compiled == [size for size in tried if size <= most]


def test_padding_counts_when_memory_runs_out(compiled: list[int]) -> None:
    """A program for 8 runs out of memory on 1 view: the next try is smaller than 8, not refused."""
    runner, tried = Classifier(hiera_core.Hiera(**SMALL).eval(), batch_size=8, compile=True), []
    runner(views(8))
    limit_memory(runner, 4, tried)
    assert len(runner(views(1))) == 1
    assert tried == [8, 1]
    limit_memory(runner, 0, [])
    with pytest.raises(DeviceError, match="no memory left for one image"):
        runner(views(1))


def test_tensors_of_a_failed_batch_are_free_before_the_cache_is_emptied() -> None:
    """A cache cannot give back memory that the traceback of the error still refers to."""
    runner = Classifier(hiera_core.Hiera(**SMALL).eval(), batch_size=4)
    compute, halve, failed, alive = runner.compute, runner._halve_batch, [], []

    def limited(x: torch.Tensor) -> Any:
        if len(x) > 1:
            activations = x * 2
            failed.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("out of memory")
        return compute(x)

    def note_and_halve(*arguments: Any) -> None:
        alive.append([tensor() is not None for tensor in failed])
        halve(*arguments)

    runner.compute = limited  # type: ignore[method-assign]
    runner._halve_batch = note_and_halve  # type: ignore[method-assign]
    gc.disable()  # nothing but the references counts
    try:
        runner(views(4))
    finally:
        gc.enable()
    assert alive == [[False], [False, False]]


@pytest.mark.parametrize("raw", [False, True])
def test_reconstruction_runs_the_compiled_program(raw: bool, compiled: list[int]) -> None:
    model = hiera_core.mae_hiera_nano_32(pretrained=True).eval()
    found = BatchReconstructor(model, raw=raw, compile=True).run(views(2, 32))
    assert compiled == [2]
    plain = BatchReconstructor(model, raw=raw).run(views(2, 32))
    for ours, expected in zip(found, plain, strict=True):
        assert torch.allclose(ours.reconstruction, expected.reconstruction, atol=1e-5)


def test_only_pinned_memory_is_copied_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """On other devices, the memory of the batch could be freed before the copy is done."""
    runner = Classifier(hiera_core.Hiera(**SMALL).eval())
    plain, options = torch.Tensor.to, []

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], torch.device):
            options.append(kwargs)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    runner(views(1))
    assert options == [{}]


def test_models_without_weights_are_refused() -> None:
    with torch.device("meta"):
        model = hiera_core.Hiera(**SMALL)
    with pytest.raises(UsageError, match="on the meta device or offloaded"):
        Classifier(model)


def test_mps_has_no_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hiera_core.device._has_mps", lambda: True)
    with pytest.raises(DeviceError, match="mps has no float64"):
        Classifier(hiera_core.Hiera(**SMALL).double(), device="mps")


@pytest.mark.parametrize(("size", "threads"), [(32, 1), (2048, 2)])
def test_one_thread_does_little_work(
    size: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads of a small layer wait for one another, which decoding threads make slow."""
    monkeypatch.setattr(batching, "LITTLE_WORK", 1e9)
    model = hiera_core.create_model("hiera_nano_32", input_size=(size, size)).eval()
    runner, used = Classifier(model, dtype="fp32"), []

    def compute(x: torch.Tensor) -> torch.Tensor:
        used.append(torch.get_num_threads())
        return torch.zeros(len(x), 10)

    monkeypatch.setattr(runner, "compute", compute)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runner(views(1, size))
        assert used == [threads] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_default_batches_have_about_as_many_pixels_whatever_their_size() -> None:
    sizes = [batching.default_batch_size("image", "cpu", side**2) for side in (32, 224, 448, 1024)]
    assert sizes == [64, 8, 2, 1]
    assert batching.default_batch_size("image", "cuda", 32**2) == 64
    assert batching.default_batch_size("image", "cuda", 1024**2) == 3
    assert batching.default_batch_size("video", "cpu", 8 * 32 * 32) == 8
    assert batching.default_batch_size("video", "cuda", 16 * 224 * 224) == 16
    assert batching.default_batch_size("image", "another", 224**2) == 8
