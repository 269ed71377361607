"""Tests of the choice of device and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hiera_core
from hiera_core.device import select_device, select_dtype, single_thread, translate_compile_errors
from hiera_core.errors import DeviceError, UsageError

from .conftest import SMALL

CPU = torch.device("cpu")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hiera_core.device._has_cuda", lambda: True)
    monkeypatch.setattr("hiera_core.device._has_mps", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize("name", ["cuda:2", "cuda:9", "cuda:999999999", "mps:1", "cpu:1"])
def test_devices_that_do_not_exist_are_refused(name: str, two_gpus: None) -> None:
    with pytest.raises(DeviceError, match=f"device '{name}' is not available here; use"):
        select_device(name)


@pytest.mark.parametrize(
    "name",
    ["cuda:", "cuda:x", "cuda:-1", "cuda:1.0", "cuda:²", "cuda:" + "9" * 5000, ":0", "", "gpu"],
)
def test_names_of_no_device_are_refused(name: str, two_gpus: None) -> None:
    with pytest.raises(UsageError, match="unknown device"):
        select_device(name)


def test_devices_that_exist_are_chosen(two_gpus: None) -> None:
    assert select_device("cuda:1") == torch.device("cuda", 1)
    assert select_device(torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert select_device("cuda") == torch.device("cuda") == select_device("auto")
    assert select_device("mps:0") == torch.device("mps")
    assert select_device("cpu:0") == CPU == select_device(CPU)


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (("fp32", "float32", "torch.float32", "float", torch.float32), torch.float32),
        (("bf16", "bfloat16", "torch.bfloat16", torch.bfloat16), torch.bfloat16),
        (("fp16", "float16", "half", torch.half), torch.float16),
    ],
)
def test_dtypes_have_long_names_too(names: tuple[Any, ...], dtype: torch.dtype) -> None:
    for name in names:
        assert select_dtype(name, CPU) is dtype
    for name in names[-1:]:
        runner = hiera_core.Classifier(hiera_core.Hiera(**SMALL), device=CPU, dtype=name)
        assert runner.dtype is dtype


@pytest.mark.parametrize("name", ["float64", torch.float64, "fp8", "", torch.int8, "torch."])
def test_other_dtypes_are_refused(name: Any) -> None:
    with pytest.raises(UsageError, match="unknown dtype"):
        select_dtype(name, CPU)


def test_memory_that_runs_out_in_the_compiler_is_no_error_of_the_compiler() -> None:
    class BackendCompilerFailed(RuntimeError):
        __module__ = "torch._dynamo.exc"

    with pytest.raises(BackendCompilerFailed), translate_compile_errors():
        raise BackendCompilerFailed("backend='inductor' raised: CUDA out of memory")
    with pytest.raises(DeviceError, match=r"torch\.compile failed"), translate_compile_errors():
        raise BackendCompilerFailed("no compiler")


def test_threads_that_compute_in_one_thread_restore_the_setting() -> None:
    """The first one that enters leaves first. The second one must not restore its 1."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        first, second = single_thread(), single_thread()
        first.__enter__(), second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_num_threads() == 1
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
