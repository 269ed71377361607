"""Tests of the choice of device and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hiera_core
from hiera_core.device import (
    DTYPES,
    exact_fp32,
    has_bf16_instructions,
    select_device,
    select_devices,
    select_dtype,
    single_thread,
    training_dtype,
    wide_half,
)
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
    [
        "cuda:",
        "cuda:x",
        "cuda:-1",
        "cuda:1.0",
        "cuda:²",
        "xpu:x",
        "cuda:" + "9" * 5000,
        ":0",
        "",
        "gpu",
    ],
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


def test_several_devices_are_named(two_gpus: None) -> None:
    both = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert select_devices("cuda:all") == both == select_devices("cuda:0, cuda:1")
    assert select_devices([torch.device("cuda", 0), "cuda:1"]) == both
    assert select_devices("cpu,cpu") == [CPU, CPU] and select_devices("cpu") == [CPU]
    for wrong in ("cpu:all", "cuda:every", "cuda:0,", ","):
        with pytest.raises(UsageError, match="unknown device"):
            select_devices(wrong)
    with pytest.raises(UsageError, match="no device is named"):
        select_devices([])
    with pytest.raises(DeviceError, match="use cuda:0 to cuda:1"):
        select_devices("cuda:0,cuda:2")
    with pytest.raises(UsageError, match="'cuda:all' names several devices"):
        select_device("cuda:all")


def test_all_of_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hiera_core.device._has_cuda", lambda: False)
    with pytest.raises(DeviceError, match="'cuda' is not available here"):
        select_devices("cuda:all")


def test_an_xpu_is_chosen_before_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, there in (("cuda", False), ("mps", True), ("xpu", True)):
        monkeypatch.setattr(f"hiera_core.device._has_{kind}", lambda there=there: there)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    assert select_device() == torch.device("xpu")
    assert select_devices("xpu:all")[2] == torch.device("xpu", 2)
    assert select_dtype("auto", torch.device("xpu")) is torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "inference", "training", "wide"),
    [
        ((9, 0), "fp16", "bf16", "bf16"),
        ((8, 6), "fp16", "bf16", "bf16"),
        ((7, 5), "fp16", "fp16", "fp32"),  # Turing emulates bf16
        ((7, 0), "fp16", "fp16", "fp32"),
        ((6, 1), "fp32", "fp32", "fp32"),  # fp16 at a 64th of the speed
        ((6, 0), "fp16", "fp16", "fp32"),
        ((5, 2), "fp32", "fp32", "fp32"),
    ],
)
def test_a_card_gets_the_dtype_that_it_computes_natively(
    capability: tuple[int, int],
    inference: str,
    training: str,
    wide: str,
    two_gpus: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    card = torch.device("cuda", 0)
    assert select_dtype("auto", card) is DTYPES[inference]
    assert training_dtype(card) is DTYPES[training]
    assert wide_half(card) is DTYPES[wide]
    assert training_dtype(CPU) is torch.float32


@pytest.mark.parametrize(
    ("amx", "avx512", "intel", "dtype"),
    [
        (True, True, True, "bf16"),
        (False, True, True, "fp32"),  # half the speed of fp32, measured on a Xeon without AMX
        (False, True, False, "bf16"),  # AMD since Zen 4
        (False, False, True, "fp32"),
        (False, False, False, "fp32"),
    ],
)
def test_a_cpu_gets_bf16_only_where_it_is_faster(
    amx: bool, avx512: bool, intel: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hiera_core.device.HAS_AMX", amx)
    monkeypatch.setattr("hiera_core.device.IS_INTEL", intel)
    monkeypatch.setattr("hiera_core.device.HAS_AVX512_BF16", avx512)
    assert select_dtype("auto", CPU) is DTYPES[dtype]
    assert wide_half(CPU) is DTYPES[dtype]
    assert has_bf16_instructions() == (amx or avx512)


def test_fp32_is_not_tf32_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    monkeypatch.delenv("HIERA_TF32", raising=False)
    outer, inner = exact_fp32(), exact_fp32()
    outer.__enter__(), inner.__enter__()
    outer.__exit__(None, None, None)  # of another thread, which ends first
    assert (conv.fp32_precision, matmul.fp32_precision) == ("ieee", "ieee")
    inner.__exit__(None, None, None)
    assert (conv.fp32_precision, matmul.fp32_precision) == before
    monkeypatch.setenv("HIERA_TF32", "1")
    with exact_fp32():
        assert (conv.fp32_precision, matmul.fp32_precision) == ("tf32", "tf32")
    monkeypatch.delenv("HIERA_TF32")
    matmul.fp32_precision = "tf32"  # the user of the library has asked
    try:
        with exact_fp32():
            assert conv.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before[1]
