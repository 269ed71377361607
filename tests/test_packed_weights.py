"""Tests of packed weights: the same outputs, and what happens when weights change."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import hiera_core
from hiera_core.models import cpu
from hiera_core.models.kernels import packed_weights
from hiera_core.models.kernels.packed_weights import ATTRIBUTE, PackedWeight

from .conftest import SMALL, assert_close, draw_weights

pytestmark = pytest.mark.skipif(not cpu.HAS_ONEDNN, reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "MIN_PRODUCT", 0)


def packs(model: nn.Module) -> list[PackedWeight]:
    return [m.__dict__[ATTRIBUTE] for m in model.modules() if ATTRIBUTE in m.__dict__]


@torch.no_grad()
def test_a_packed_model_gives_the_same_for_any_batch() -> None:
    model = draw_weights(hiera_core.Hiera(**SMALL)).eval()
    plain = copy.deepcopy(model)
    assert hiera_core.optimize_for_inference(model) is model
    for count in (3, 1, 7):
        x = torch.randn(count, 3, *model.config["input_size"])
        assert_close(model.forward_logits(x), plain.forward_logits(x))
    used = [pack for pack in packs(model) if pack._packed is not None]
    assert len(used) > len(model.blocks) * 3
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@torch.no_grad()
def test_changed_and_replaced_weights_are_packed_again() -> None:
    layer = hiera_core.optimize_for_inference(nn.Linear(32, 48))
    x = torch.randn(64, 32)
    first = cpu.linear(layer, x)
    layer.weight.mul_(2)
    assert_close(cpu.linear(layer, x), nn.functional.linear(x, layer.weight, layer.bias))
    assert not torch.equal(first, cpu.linear(layer, x))
    layer.weight = nn.Parameter(torch.randn(48, 32))
    assert_close(cpu.linear(layer, x), nn.functional.linear(x, layer.weight, layer.bias))
    layer.load_state_dict({"weight": torch.ones(48, 32), "bias": torch.zeros(48)})
    assert_close(cpu.linear(layer, x), x.sum(1, keepdim=True).expand(-1, 48))
    layer.weight = nn.Parameter(torch.randn(48, 32))
    exact = cpu.linear(layer, x)
    layer.half().float()  # new memory, of which the parameter does not count a change
    assert_close(cpu.linear(layer, x), nn.functional.linear(x, layer.weight, layer.bias))
    assert not torch.equal(cpu.linear(layer, x), exact)


def test_copies_pickles_and_gradients_work() -> None:
    model = draw_weights(hiera_core.Hiera(**SMALL)).eval()
    x = torch.randn(2, 3, *model.config["input_size"])
    model.forward_logits(x).sum().backward()
    expected = model.blocks[0].mlp.fc1.weight.grad.clone()
    model.zero_grad()
    hiera_core.optimize_for_inference(model)
    with torch.no_grad():
        exact = model.forward_logits(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(pack._packed is None for pack in packs(again)) and packs(again)
        with torch.no_grad():
            assert_close(again.forward_logits(x), exact)
    model.forward_logits(x).sum().backward()
    assert_close(model.blocks[0].mlp.fc1.weight.grad, expected)


def test_memory_is_bounded_and_small_layers_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 100), nn.Linear(8, 10), nn.Linear(8, 20))
    monkeypatch.setattr(packed_weights, "MAX_PACKED_BYTES", 4 * 8 * 35)
    hiera_core.optimize_for_inference(model)
    assert [ATTRIBUTE in layer.__dict__ for layer in model] == [False, True, True]


def test_weights_that_do_not_count_their_changes_stay() -> None:
    with torch.inference_mode():
        layer = hiera_core.optimize_for_inference(nn.Linear(8, 8))
        x = torch.ones(4, 8)
        before = cpu.linear(layer, x)
        layer.weight.mul_(2)
        assert not torch.equal(cpu.linear(layer, x), before)
    assert not packs(layer)
