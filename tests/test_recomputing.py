"""Tests of activation checkpointing: the gradients stay, the memory shrinks."""

from __future__ import annotations

import copy
import pickle
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
from hiera_core.training.steps.sample_noise import SampleNoise

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
    """A backend of torch.compile that counts the matrix products that its programs carry out."""

    def __init__(self) -> None:
        self.count = 0
        self.backend = aot_autograd(
            fw_compiler=self._counting,
            bw_compiler=self._counting,
            partition_fn=min_cut_rematerialization_partition,
        )

    def compile(self, module: torch.nn.Module, **options: Any) -> None:
        module.compile(fullgraph=True, backend=self.backend, **options)

    def _counting(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        targets = [getattr(node.target, "__name__", "") for node in graph.graph.nodes]
        products = sum(target.partition(".")[0] in KEPT for target in targets)

        def run(*arguments: Any) -> Any:
            self.count += products
            return graph.forward(*arguments)

        return make_boxed_func(run)


HIDDEN = "ignore:The .grad attribute of a Tensor"  # a warning that PyTorch causes itself, and hides


def narrow(model: str) -> tuple[Any, Callable[[Any], torch.Tensor]]:
    """Return a bundled model of three blocks, and its loss."""
    decoder = {**DECODER, "decoder_depth": 1} if model.startswith("mae_") else {}
    built: Any = hiera_core.create_model(model, embed_dim=8, stages=(1, 1, 1), **decoder)
    draw_weights(built).train()
    x, units = torch.randn(4, 3, 32, 32), torch.tensor([[0, 3, 5]] * 4)
    if decoder:
        return built, lambda model: model(x, keep_ids=units, check_ids=False)[0]
    return built, lambda model: model(x).square().sum()


@pytest.mark.filterwarnings(HIDDEN)
@pytest.mark.parametrize(
    ("name", "by_block"),
    [
        ("hiera_nano_32", True),
        pytest.param("hiera_nano_32", False, marks=pytest.mark.slow),
        pytest.param("mae_hiera_nano_32", True, marks=pytest.mark.slow),
        pytest.param("mae_hiera_nano_32", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", [pytest.param(True, marks=pytest.mark.slow), "selective"])
def test_compiled_models_recompute_the_same(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    by_block: bool,
    kind: Checkpointing,
) -> None:
    """Block by block as under FSDP, and as a whole: gradients stay, and with `selective`, matrix
    products are not computed again. PyTorch does not warn."""
    model, loss = narrow(name)
    expected = gradients(model, loss)
    torch.compiler.reset()
    found = Products()
    monkeypatch.setattr(compiled, "compile_in_place", found.compile)
    model.zero_grad()
    model.set_grad_checkpointing(kind)
    compiled.compile_blocks(model) if by_block else compiled.compile_in_place(model)
    value = loss(model)
    forward, found.count = found.count, 0
    value.backward()
    # A product has two gradients, each of them another product.
    assert (found.count > 2 * forward) == (kind is True), (forward, found.count)
    for parameter, grad in expected.items():
        scale = max(1.0, grad.abs().max().item())
        difference = (model.get_parameter(parameter).grad - grad).abs().max().item()
        assert difference <= 1e-5 * scale, parameter
    assert "context_fn" not in caplog.text


@pytest.mark.parametrize("is_pickled", [False, True])
def test_copies_of_compiled_blocks_are_apart(is_pickled: bool) -> None:
    """Gradients of a copy belong to the copy, whose blocks are recomputed as well."""
    model, loss = narrow("hiera_nano_32")
    expected = gradients(model, loss)
    model.zero_grad()
    model.set_grad_checkpointing(True)
    compiled.compile_blocks(model)
    twin = pickle.loads(pickle.dumps(model)) if is_pickled else copy.deepcopy(model)
    loss(twin).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, grad in expected.items():
        torch.testing.assert_close(twin.get_parameter(name).grad, grad)
    for block in twin.blocks:
        assert block.forward.block is block and block.forward.kind is True


@pytest.mark.filterwarnings(HIDDEN)
@torch._dynamo.config.patch(recompile_limit=3)
def test_blocks_of_the_same_shape_share_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with different rates of drop path, if a trainer draws it. And there may be more programs
    than PyTorch allows for one code by default."""
    programs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        programs.append(graph)
        return graph.forward

    def compile(module: torch.nn.Module, **options: Any) -> None:
        module.compile(fullgraph=True, backend=backend, **options)

    monkeypatch.setattr(compiled, "compile_in_place", compile)
    config = {"embed_dim": 8, "stages": (1, 1, 3), "drop_path_rate": 0.2}
    model: Any = hiera_core.create_model("hiera_nano_32", **config).train()
    SampleNoise(model, 0, 2, torch.device("cpu")).draw(0, 0)
    compiled.compile_blocks(model)
    for _ in range(2):
        assert model(torch.randn(2, 3, 32, 32)).isfinite().all()
    assert len(programs) == 4  # of five blocks


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
