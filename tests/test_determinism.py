"""Tests of `deterministic: true`."""

from __future__ import annotations

import os

import pytest
import torch

from hiera_core.errors import DeviceError
from hiera_core.training.steps.determinism import (
    WORKSPACE,
    deterministic_kernels,
    translate_errors,
)


def test_kernels_are_deterministic_within_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE[0], raising=False)
    with deterministic_kernels(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_kernels(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ[WORKSPACE[0]] == WORKSPACE[1]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_kernel_that_does_not_exist_has_a_remedy() -> None:
    message = (
        "upsample_bicubic2d_backward_out_cuda does not have a deterministic implementation, but "
        "you set 'torch.use_deterministic_algorithms(True)'."
    )
    expected = pytest.raises(DeviceError, match="kernel for upsample_bicubic2d_backward")
    with expected as found, translate_errors():
        raise RuntimeError(message)
    assert "leave out deterministic" in str(found.value.hint)
    with pytest.raises(RuntimeError, match="another"), translate_errors():
        raise RuntimeError("another error")


def test_cpu_kernels_of_pytorch_are_translated() -> None:
    """An operation that has no deterministic kernel on a CPU either."""
    expected = pytest.raises(DeviceError, match="deterministic kernel")
    with deterministic_kernels(True), expected, translate_errors():
        torch.zeros(4).put_(torch.tensor([0]), torch.tensor([1.0]), accumulate=False)
