"""Tests of activation checkpointing: the gradients stay, the memory shrinks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import hiera_core
from hiera_core.compiling import compiled
from hiera_core.errors import UsageError
from hiera_core.models.kernels.recomputing import KEPT, Checkpointing
from hiera_core.training import recipe_reader

from .conftest import SMALL, draw_weights

DECODER = {"decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2}
KINDS: tuple[Checkpointing, ...] = (False, "selective", True)


def classifier() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    torch.manual_seed(0)
    model = draw_weights(hiera_core.Hiera(**SMALL)).train()
    x = torch.randn(4, 3, 64, 64)
    return model, lambda model: model(x).square().sum()


def autoencoder() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    torch.manual_seed(0)
    config = {key: value for key, value in SMALL.items() if key != "num_classes"}
    model = hiera_core.MaskedAutoencoderHiera(**config, **DECODER)
    draw_weights(model).train()
    x, mask = torch.randn(4, 3, 64, 64), torch.tensor([[True, False, False, True]] * 4)
    return model, lambda model: model(x, mask=mask)[0]


def sam2() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    torch.manual_seed(0)
    model = hiera_core.HieraDet(
        global_att_blocks=(3,),
        embed_dim=16,
        num_heads=1,
        stages=(1, 1, 2, 1),
        input_size=(128, 128),
    )
    draw_weights(model).train()
    x = torch.randn(1, 3, 128, 128)
    return model, lambda model: model.embed(x).square().sum()


def gradients(model: Any, loss: Callable[[Any], torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.clone() for name, grad in found.items()}


def kept_bytes(model: Any, loss: Callable[[Any], torch.Tensor]) -> int:
    """Return how much memory a forward pass takes and does not free: it waits for the backward."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        value = loss(model)
    kept = sum(event.self_cpu_memory_usage for event in found.key_averages())
    value.backward()
    return int(kept)


@pytest.mark.parametrize("make", [classifier, autoencoder, sam2])
def test_gradients_are_equal_and_selective_memory_lies_between(make: Callable[[], Any]) -> None:
    model, loss = make()
    expected = gradients(model, loss)
    memory: dict[Checkpointing, int] = {}
    for kind in KINDS:
        model.set_grad_checkpointing(kind)
        assert model.grad_checkpointing == kind
        found = gradients(model, loss)
        assert set(found) == set(expected) and len(found) > 10
        for name, grad in found.items():
            scale = max(1.0, expected[name].abs().max().item())
            assert (grad - expected[name]).abs().max().item() <= 1e-5 * scale, (kind, name)
        memory[kind] = kept_bytes(model, loss)
    assert memory[True] < 0.9 * memory["selective"], memory
    assert memory["selective"] < 0.9 * memory[False], memory


class Counting(TorchDispatchMode):
    """Counts the operations that are carried out, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.counts[function.__name__.partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def test_matrix_products_are_not_computed_again() -> None:
    model, loss = classifier()
    products, norms = {}, {}
    for kind in KINDS:
        model.set_grad_checkpointing(kind)
        with Counting() as found:
            value = loss(model)
            found.counts.clear()
            value.backward()
        products[kind] = sum(found.counts[name] for name in KEPT)
        norms[kind] = found.counts["native_layer_norm"]
    assert products["selective"] == products[False] < products[True], products
    assert norms[False] == 0 < norms["selective"] == norms[True], norms


class Products:
    """A backend of torch.compile that counts the matrix products of backward graphs."""

    def __init__(self) -> None:
        self.backward = 0
        self.backend = aot_autograd(
            fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
            bw_compiler=self._count,
            partition_fn=min_cut_rematerialization_partition,
        )

    def compile(self, module: torch.nn.Module, **options: Any) -> None:
        module.compile(fullgraph=True, backend=self.backend, **options)

    def _count(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        targets = [getattr(node.target, "__name__", "") for node in graph.graph.nodes]
        self.backward += sum(target.partition(".")[0] in KEPT for target in targets)
        return make_boxed_func(graph.forward)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # PyTorch looks, and hides it
@pytest.mark.parametrize("by_block", [False, True], ids=["whole", "blocks"])
@pytest.mark.parametrize("make", [classifier, autoencoder])
def test_compiled_models_recompute_the_same(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any], by_block: bool
) -> None:
    """As a whole, and block by block as under FSDP: gradients stay, products are not repeated."""
    model, loss = make()
    expected = gradients(model, loss)
    products: dict[Checkpointing, int] = {}
    for kind in KINDS:
        torch.compiler.reset()
        model, loss = make()
        model.set_grad_checkpointing(kind)
        found = Products()
        monkeypatch.setattr(compiled, "compile_in_place", found.compile)
        compiled.compile_blocks(model) if by_block else compiled.compile_in_place(model)
        for name, grad in gradients(model, loss).items():
            scale = max(1.0, expected[name].abs().max().item())
            assert (grad - expected[name]).abs().max().item() <= 1e-5 * scale, (kind, name)
        products[kind] = found.backward
    assert products["selective"] == products[False] < products[True], products


def test_the_recipe_takes_true_false_and_selective() -> None:
    for value in (True, False, "selective"):
        found = recipe_reader.read_recipe("hiera_nano_32", {"grad_checkpointing": value})
        assert found.grad_checkpointing == value
        assert type(found).from_dict(found.to_dict()) == found
    for wrong in ("some", 1, None):
        with pytest.raises(UsageError, match="expected true or false or one of selective"):
            recipe_reader.read_recipe("hiera_nano_32", {"grad_checkpointing": wrong})
    model = hiera_core.Hiera(**SMALL)
    with pytest.raises(UsageError, match="give True, False or 'selective'"):
        model.set_grad_checkpointing("all")  # type: ignore[arg-type]
