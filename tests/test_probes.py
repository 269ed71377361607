"""Tests that a shortcut is taken only where nothing could tell it from the layer itself.

Every test compares the same call of the layer and of the kernel: equal outputs and types, or errors
of the same type.
"""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import hiera_core
from hiera_core.models import cpu
from hiera_core.models.cpu import Linear

from .conftest import SMALL, assert_close, draw_weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
needs_onednn = pytest.mark.skipif(not cpu.HAS_ONEDNN, reason="this PyTorch has no oneDNN")
Pair = tuple[nn.Linear, Any]  # a layer and its input


class Function(torch.Tensor):
    """A subclass that sees functions."""

    seen = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen += func is F.linear
        return super().__torch_function__(func, types, args, kwargs or {})


class Doubled(torch.Tensor):
    """A subclass that sees operators. It stands for twice the values that it holds."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Doubled:
        made: Doubled = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, dtype=held.dtype, device=held.device, requires_grad=False
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [2 * a.held if isinstance(a, Doubled) else a for a in args]
        if func is torch.ops.aten.detach.default:
            return Doubled(args[0].held)
        return func(*plain, **(kwargs or {}))


def parameter(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def with_weight(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Pair], Pair]:
    """Return a case in which the weight of the layer is changed."""

    def case(pair: Pair) -> Pair:
        layer, x = pair
        layer.weight = parameter(change(layer.weight.detach()))
        return layer, x

    return case


def with_bias(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Pair], Pair]:
    def case(pair: Pair) -> Pair:
        layer, x = pair
        values = change(layer.bias.detach())
        layer.bias = None if values is None else parameter(values)  # type: ignore[assignment]
        return layer, x

    return case


def with_input(change: Callable[[torch.Tensor], Any]) -> Callable[[Pair], Pair]:
    return lambda pair: (pair[0], change(pair[1]))


def with_layer(change: Callable[[nn.Linear], Any]) -> Callable[[Pair], Pair]:
    def case(pair: Pair) -> Pair:
        layer = change(pair[0])
        return (layer if isinstance(layer, nn.Module) else pair[0]), pair[1]

    return case


def negated(x: torch.Tensor) -> torch.Tensor:
    """Return the same values as a view whose negation is not yet computed."""
    lazy = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert lazy.is_neg()
    return lazy


def inference(x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return x.clone()


def replace_forward(layer: nn.Linear) -> None:
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 1  # type: ignore[method-assign]


def offload(layer: nn.Linear) -> None:
    """Do what accelerate does: weights on the meta device, loaded by a forward on the instance."""
    held = [parameter(p.detach()) for p in (layer.weight, layer.bias)]
    layer.to("meta")
    plain = layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        absent = layer.weight, layer.bias
        layer.weight, layer.bias = held
        try:
            return plain(x)
        finally:
            layer.weight, layer.bias = absent

    layer.forward = forward  # type: ignore[method-assign]


def spectral(layer: nn.Linear) -> nn.Module:
    return parametrizations.spectral_norm(layer).eval()


class Plus(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


CASES: dict[str, Callable[[Pair], Pair]] = {
    "plain": lambda pair: pair,
    "no-bias": with_bias(lambda b: None),
    # Weights that are not ordinary.
    # With the weight alone on the meta device, PyTorch itself returns what is in memory by chance.
    "layer-meta": with_layer(lambda m: m.to("meta")),
    "bias-meta": with_bias(lambda b: b.to("meta")),
    "all-meta": lambda pair: (pair[0].to("meta"), pair[1].to("meta")),
    "input-meta": with_input(lambda x: x.to("meta")),
    "weight-function": with_weight(lambda w: w.as_subclass(Function)),
    "weight-dispatch": with_weight(Doubled),
    "weight-sparse": with_weight(lambda w: w.to_sparse()),
    "weight-csr": with_weight(lambda w: w.to_sparse_csr()),
    "weight-negated": with_weight(negated),
    "weight-expanded": with_weight(lambda w: w[:1].expand(6, -1)),
    "weight-transposed": with_weight(lambda w: w.t().contiguous().t()),
    "weight-strided": with_weight(lambda w: w.repeat_interleave(2, 1)[:, ::2]),
    "weight-inference": with_weight(inference),
    "weight-bf16": with_weight(lambda w: w.bfloat16()),
    "weight-fp64": with_weight(lambda w: w.double()),
    "weight-int": with_weight(lambda w: w.int()),
    "weight-complex": with_weight(lambda w: w.to(torch.complex64)),
    "weight-wide": with_weight(lambda w: torch.ones(6, 5)),
    "weight-1d": with_weight(lambda w: w[0]),
    "weight-3d": with_weight(lambda w: w[None]),
    "weight-empty": with_weight(lambda w: w[:0]),
    "bias-bf16": with_bias(lambda b: b.bfloat16()),
    "bias-one": with_bias(lambda b: b[:1]),
    "bias-long": with_bias(lambda b: torch.ones(7)),
    "bias-2d": with_bias(lambda b: b[None]),
    "bias-scalar": with_bias(lambda b: b[0]),
    "bias-strided": with_bias(lambda b: b.repeat_interleave(2)[::2]),
    "bias-expanded": with_bias(lambda b: b[:1].expand(6)),
    "bias-negated": with_bias(negated),
    "bias-function": with_bias(lambda b: b.as_subclass(Function)),
    "bias-dispatch": with_bias(Doubled),
    # Inputs that are not ordinary.
    "input-function": with_input(lambda x: x.as_subclass(Function)),
    "input-dispatch": with_input(Doubled),
    "input-parameter": with_input(parameter),
    "input-1d": with_input(lambda x: x[0, 0]),
    "input-2d": with_input(lambda x: x[0]),
    "input-0d": with_input(lambda x: x[0, 0, 0]),
    "input-4d": with_input(lambda x: x[None]),
    "input-empty": with_input(lambda x: x[:0]),
    "input-narrow": with_input(lambda x: x[..., :3]),
    "input-no-channels": with_input(lambda x: x[..., :0]),
    "input-transposed": with_input(lambda x: x.transpose(0, 1)),
    "input-expanded": with_input(lambda x: x[:1].expand(5, -1, -1)),
    "input-strided": with_input(lambda x: x.repeat_interleave(2, 2)[..., ::2]),
    "input-offset": with_input(lambda x: F.pad(x, (1, 0))[..., 1:]),
    "input-negated": with_input(negated),
    "input-real-part": with_input(lambda x: x.to(torch.complex64).conj().real),
    "input-sparse": with_input(lambda x: x[0].to_sparse()),
    "input-mkldnn": with_input(lambda x: x.to_mkldnn()),
    "input-nested": with_input(lambda x: torch.nested.nested_tensor([x[0], x[1][:2]])),
    "input-inference": with_input(inference),
    "input-bf16": with_input(lambda x: x.bfloat16()),
    "input-fp16": with_input(lambda x: x.half()),
    "input-fp64": with_input(lambda x: x.double()),
    "input-int": with_input(lambda x: x.int()),
    "input-bool": with_input(lambda x: x > 0),
    "input-complex": with_input(lambda x: x.to(torch.complex64)),
    "input-list": with_input(lambda x: x.tolist()),
    "input-numpy": with_input(lambda x: x.numpy()),
    "input-none": with_input(lambda x: None),
    # dtypes of the whole layer.
    "all-bf16": lambda pair: (pair[0].bfloat16(), pair[1].bfloat16()),
    "all-fp16": lambda pair: (pair[0].half(), pair[1].half()),
    "all-fp64": lambda pair: (pair[0].double(), pair[1].double()),
    "all-complex": lambda pair: (pair[0].to(torch.complex64), pair[1].to(torch.complex64)),
    # Layers that do more than their forward.
    "replaced-forward": with_layer(replace_forward),
    "offloaded": with_layer(offload),
    "forward-hook": with_layer(lambda m: m.register_forward_hook(lambda m, i, o: o + 1)),
    "pre-hook": with_layer(lambda m: m.register_forward_pre_hook(lambda m, i: (i[0] + 1,))),
    "parametrized": with_layer(lambda m: parametrize.register_parametrization(m, "weight", Plus())),
    "weight-norm": with_layer(parametrizations.weight_norm),
    "spectral-norm": with_layer(spectral),
    "pruned": with_layer(lambda m: prune.l1_unstructured(m, "weight", 0.5)),
    "pruned-bias": with_layer(lambda m: prune.random_unstructured(m, "bias", 0.5)),
    "wrapped": with_layer(lambda m: nn.Sequential(m, Plus())),
}


def make_pair(linear: type[nn.Linear] = nn.Linear) -> Pair:
    generator = torch.manual_seed(0)  # some cases draw numbers, too
    layer = linear(4, 6)
    with torch.no_grad():
        for values in layer.parameters():
            values.copy_(torch.randn(values.shape, generator=generator))
    return layer, torch.randn(3, 5, 4, generator=generator)


def outcome(call: Callable[[], Any]) -> Any:
    """Return the output of a call, or the type of its error."""
    try:
        return call()
    except Exception as error:
        return type(error)


def assert_same(ours: Any, plain: Any) -> None:
    """Check that two outcomes are equal: the same type of error, or close tensors of one kind."""
    if isinstance(plain, type) or isinstance(ours, type):
        assert ours is plain
        return
    assert type(ours) is type(plain)
    assert (ours.dtype, ours.device, ours.layout) == (plain.dtype, plain.device, plain.layout)
    assert ours.requires_grad == plain.requires_grad
    if ours.is_meta:
        assert ours.shape == plain.shape
        return
    if ours.is_nested:
        ours, plain = (torch.cat([part.flatten() for part in t.unbind()]) for t in (ours, plain))
    tolerance = 2e-2 if ours.dtype in (torch.bfloat16, torch.float16) else 1e-5
    ours, plain = (t.to_dense() if t.layout is not torch.strided else t for t in (ours, plain))
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_does_what_the_layer_does(name: str, grad: bool) -> None:
    found = []
    for linear, call in (
        (nn.Linear, lambda layer, x: layer(x)),
        (nn.Linear, cpu.linear),
        (Linear, lambda layer, x: layer(x)),
    ):
        layer, x = CASES[name](make_pair(linear))
        with torch.set_grad_enabled(grad):
            found.append(outcome(lambda layer=layer, x=x, call=call: call(layer, x)))  # type: ignore[misc]
    plain, ours, subclass = found
    assert_same(ours, plain)
    assert_same(subclass, plain)


@pytest.mark.parametrize("part", ["fc1", "fc2"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_mlp_does_what_its_layers_do(name: str, part: str) -> None:
    found = []
    for call in (lambda fc1, act, fc2, x: fc2(act(fc1(x))), cpu.mlp):
        layer, x = CASES[name](make_pair())
        other = nn.Linear(6, 4) if part == "fc1" else nn.Linear(4, 4)
        for values in other.parameters():
            values.copy_(torch.linspace(-1, 1, values.numel()).view(values.shape))
        order = (layer, nn.GELU(), other) if part == "fc1" else (other, nn.GELU(), layer)
        found.append(outcome(lambda call=call, order=order, x=x: call(*order, x)))  # type: ignore[misc]
    assert_same(found[1], found[0])


@pytest.mark.parametrize("needs", ["x", "weight", "bias", "x weight", "x weight bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_go_to_the_tensors_that_need_them(needs: str, dtype: torch.dtype) -> None:
    found = []
    for call in (lambda layer, x: layer(x), cpu.linear):
        layer, x = make_pair()
        layer, x = layer.to(dtype), x.to(dtype)
        tensors = {"x": x, "weight": layer.weight, "bias": layer.bias}
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in needs.split())
        out = call(layer, x)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape))
        found.append([tensors[name].grad for name in tensors])
    for ours, plain in zip(found[1], found[0], strict=True):
        assert (ours is None) == (plain is None)
        if plain is not None:
            assert_same(ours, plain)


class CountFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names += [func.__name__] * (func is F.linear)
        return func(*args, **(kwargs or {}))


class CountOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [CountFunctions, CountOperators])
@torch.no_grad()
def test_modes_see_the_calls_of_the_layers(mode: Any) -> None:
    found = []
    for call in (lambda layer, x: layer(x), cpu.linear):
        layer, x = make_pair()
        with mode() as counted:
            call(layer, x)
        found.append(counted.names)
    assert found[0] == found[1] != []


def directional(layer: nn.Linear, x: torch.Tensor, call: Any, dual: str) -> Any:
    """Return the derivative of a call in the direction of ones, for one of its tensors."""
    with forward_ad.dual_level():
        tensors = {"x": x, "weight": layer.weight.detach(), "bias": layer.bias.detach()}
        tensors[dual] = forward_ad.make_dual(tensors[dual], torch.ones_like(tensors[dual]))
        for name in ("weight", "bias"):
            delattr(layer, name)
            setattr(layer, name, tensors[name])
        return forward_ad.unpack_dual(call(layer, tensors["x"])).tangent


def functional(layer: nn.Linear, x: torch.Tensor, call: Any) -> Any:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> Any:
            return call(self.layer, x)

    outer = Outer()
    weights = {name: 2 * values.detach() for name, values in outer.named_parameters()}

    def loss(weights: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(outer, weights, (x,))
        return out.square().sum()

    return torch.func.grad(loss)(weights, x)["layer.weight"]


def batched_gradients(layer: nn.Linear, x: torch.Tensor, call: Any) -> Any:
    x.requires_grad_()
    out = call(layer, x)
    (grads,) = torch.autograd.grad(out, x, torch.randn(2, *out.shape), is_grads_batched=True)
    return grads


def second_derivative(layer: nn.Linear, x: torch.Tensor, call: Any) -> Any:
    x.requires_grad_()
    (first,) = torch.autograd.grad(call(layer, x).pow(3).sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), layer.weight)[0]


def with_saved_tensors(layer: nn.Linear, x: torch.Tensor, call: Any) -> Any:
    packed = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        packed.append(t.shape)
        return t.double()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.float()):
        out = call(layer, x.requires_grad_())
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert len(packed) == 2
    return grad


def with_context(context: Callable[[], Any]) -> Callable[..., Any]:
    def transform(layer: nn.Linear, x: torch.Tensor, call: Any) -> Any:
        with context():
            return call(layer, x)

    return transform


def backward_with_context(context: Callable[[], Any]) -> Callable[..., Any]:
    def transform(layer: nn.Linear, x: torch.Tensor, call: Any) -> Any:
        out = call(layer, x.requires_grad_())
        with context():
            return torch.autograd.grad(out.sum(), layer.weight)[0]

    return transform


TRANSFORMS: dict[str, Callable[[nn.Linear, torch.Tensor, Any], Any]] = {
    "forward-x": lambda layer, x, call: directional(layer, x, call, "x"),
    "forward-weight": lambda layer, x, call: directional(layer, x, call, "weight"),
    "forward-bias": lambda layer, x, call: directional(layer, x, call, "bias"),
    "jvp": lambda layer, x, call: torch.func.jvp(lambda x: call(layer, x), (x,), (x,))[1],
    "vjp": lambda layer, x, call: torch.func.vjp(lambda x: call(layer, x), x)[1](
        torch.ones(3, 5, 6)
    )[0],
    "grad": lambda layer, x, call: torch.func.grad(lambda x: call(layer, x).sum())(x),
    "jacfwd": lambda layer, x, call: torch.func.jacfwd(lambda x: call(layer, x))(x[0, :1]),
    "jacrev": lambda layer, x, call: torch.func.jacrev(lambda x: call(layer, x))(x[0, :1]),
    "hessian": lambda layer, x, call: torch.func.hessian(lambda x: call(layer, x).pow(2).sum())(
        x[0, :1]
    ),
    "vmap": lambda layer, x, call: torch.vmap(lambda x: call(layer, x))(x),
    "vmap-rows": lambda layer, x, call: torch.vmap(torch.vmap(lambda x: call(layer, x)))(x),
    "functional-call": functional,
    "batched-gradients": lambda layer, x, call: (
        torch.manual_seed(0),
        batched_gradients(layer, x, call),
    )[1],
    "second-derivative": second_derivative,
    "saved-tensors": with_saved_tensors,
    "checkpoint": lambda layer, x, call: torch.autograd.grad(
        checkpoint(lambda x: call(layer, x), x.requires_grad_(), use_reentrant=False).sum(), x
    )[0],
    "autocast": with_context(lambda: torch.autocast("cpu", torch.bfloat16)),
    "default-device": with_context(lambda: torch.device("meta")),
    "mkldnn-off": with_context(lambda: torch.backends.mkldnn.flags(enabled=False)),
    "inference-mode": with_context(torch.inference_mode),
    "backward-in-autocast": backward_with_context(lambda: torch.autocast("cpu", torch.bfloat16)),
    "backward-in-mode": backward_with_context(CountOperators),
    "anomaly": backward_with_context(
        lambda: torch.autograd.set_detect_anomaly(True, check_nan=False)
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_see_what_the_layer_does(name: str) -> None:
    found = []
    for linear, call in (
        (nn.Linear, lambda layer, x: layer(x)),
        (nn.Linear, cpu.linear),
        (Linear, lambda layer, x: layer(x)),
    ):
        layer, x = make_pair(linear)
        found.append(outcome(lambda a=layer, x=x, call=call: TRANSFORMS[name](a, x, call)))  # type: ignore[misc]
    assert isinstance(found[0], torch.Tensor)
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@contextlib.contextmanager
def attached(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


HOOKS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "forward": lambda m, note: m.register_forward_hook(lambda m, i, o: note("f", o.shape)),
    "pre": lambda m, note: m.register_forward_pre_hook(lambda m, i: note("p", i[0].shape)),
    "backward": lambda m, note: m.register_full_backward_hook(
        lambda m, i, o: note("b", o[0].shape)
    ),
    "backward-pre": lambda m, note: m.register_full_backward_pre_hook(
        lambda m, o: note("q", o[0].shape)
    ),
}
GLOBAL_HOOKS: dict[str, Callable[[Any], Any]] = {
    "forward": lambda note: nn.modules.module.register_module_forward_hook(
        lambda m, i, o: note(type(m).__name__, o.shape)
    ),
    "pre": lambda note: nn.modules.module.register_module_forward_pre_hook(
        lambda m, i: note(type(m).__name__, i[0].shape)
    ),
    "backward": lambda note: nn.modules.module.register_module_full_backward_hook(
        lambda m, i, o: note(type(m).__name__, o[0].shape)
    ),
    "backward-pre": lambda note: nn.modules.module.register_module_full_backward_pre_hook(
        lambda m, o: note(type(m).__name__, o[0].shape)
    ),
}


@pytest.mark.parametrize("place", ["mlp.fc1", "mlp.fc2", "mlp.act", "attn.qkv", "attn.proj", "mlp"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_any_kind_run(kind: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook runs once, and sees the whole batch."""
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 1)
    model = hiera_core.Hiera(**SMALL).eval()
    module, seen = model.blocks[0].get_submodule(place), []
    with attached(HOOKS[kind](module, lambda *what: seen.append(what))):
        with torch.set_grad_enabled("backward" in kind):
            out = model(torch.randn(2, 3, 64, 64))
        if out.requires_grad:
            out.sum().backward()
    assert len(seen) == 1 and seen[0][1][0] == 2


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_global_hooks_see_every_layer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 1)
    model = hiera_core.Hiera(**SMALL).eval()
    seen: list[tuple[str, Any]] = []
    with attached(GLOBAL_HOOKS[kind](lambda *what: seen.append(what) if what[1] else None)):
        with torch.set_grad_enabled("backward" in kind):
            out = model(torch.randn(2, 3, 64, 64))
        if out.requires_grad:
            out.sum().backward()
    count = sum(type(m) is nn.Linear for m in model.modules())
    assert sum(name == "Linear" for name, _ in seen) == count
    assert sum(name == "GELU" for name, _ in seen) == 5
    assert {shape[0] for name, shape in seen if name == "Linear"} == {2}


def test_a_forward_replaced_on_a_class_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = hiera_core.Hiera(**SMALL).eval(), torch.randn(2, 3, 64, 64)
    plain, calls = nn.Linear.forward, []
    monkeypatch.setattr(
        nn.Linear, "forward", lambda self, x: (calls.append(x.shape), plain(self, x))[1]
    )
    with torch.no_grad():
        model(x)
    assert len(calls) == sum(isinstance(m, nn.Linear) for m in model.modules())


@pytest.mark.parametrize("owner, name", [(F, "linear"), (F, "gelu"), (nn.Module, "__call__")])
@torch.no_grad()
def test_functions_that_were_replaced_are_called(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Profilers count operations this way, and sharding libraries gather weights."""
    model, x = hiera_core.Hiera(**SMALL).eval(), torch.randn(2, 3, 64, 64)
    plain, calls = getattr(owner, name), []
    monkeypatch.setattr(owner, name, lambda *a, **k: (calls.append(a), plain(*a, **k))[1])
    model(x)
    kinds = [type(module) for module in model.modules()]
    expected = {"linear": kinds.count(nn.Linear), "gelu": kinds.count(nn.GELU)}
    called = [a for a in calls if owner is F or type(a[0]) is nn.Linear]
    assert len(called) == expected.get(name, kinds.count(nn.Linear))


def change_norm(block: Any) -> None:
    class WholeBatch(nn.LayerNorm):
        """A norm over all tokens of an input, which a chunk would change."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) - x.mean(1, keepdim=True)

    block.norm2 = WholeBatch(block.dim_out)


def change_attention(block: Any) -> None:
    plain = block.attn.forward
    block.attn.forward = lambda x: plain(x) - x.mean()


def change_block(block: Any) -> None:
    plain = block.forward
    block.forward = lambda x: plain(x) * x.std()


def change_drop_path(block: Any) -> None:
    block.drop_path = hiera_core.models.layers.DropPath(0.5).train()


def change_weight(block: Any) -> None:
    block.mlp.fc1.weight = parameter(Doubled(block.mlp.fc1.weight.detach()))


def change_activation(block: Any) -> None:
    block.mlp.act = nn.Softmax(dim=1)


@needs_onednn
@pytest.mark.parametrize(
    "change",
    [
        change_norm,
        change_attention,
        change_block,
        change_drop_path,
        change_weight,
        change_activation,
    ],
)
@pytest.mark.parametrize("number", [0, 1])
@torch.no_grad()
def test_blocks_that_were_changed_see_the_whole_batch(
    change: Callable[[Any], None], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The changed block is one of two that would run in chunks together."""
    model = draw_weights(hiera_core.Hiera(**{**SMALL, "stages": (2, 1, 1, 1)})).eval()
    x, run_in_chunks, chunked = torch.randn(3, 3, 64, 64), cpu.run_in_chunks, []

    def record(blocks: Any, *rest: Any) -> torch.Tensor:
        chunked.extend(blocks)
        return run_in_chunks(blocks, *rest)

    monkeypatch.setattr(cpu, "CHUNK_BYTES", 1)
    monkeypatch.setattr(cpu, "run_in_chunks", record)
    model(x)
    assert {*chunked} == {*model.blocks[:4]}
    chunked.clear()
    change(model.blocks[number])
    model(x)
    assert {*chunked} == {*model.blocks[2:4]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@torch.no_grad()
def test_dynamic_quantization_finds_every_layer() -> None:
    model = draw_weights(hiera_core.Hiera(**{**SMALL, "embed_dim": 32})).eval()
    x, plain = torch.randn(2, 3, 64, 64), copy.deepcopy(model)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(isinstance(m, nn.Linear) for m in quantized.modules())
    assert_close(quantized.forward_logits(x), plain.forward_logits(x), 0.25)


@torch.no_grad()
def test_symbolic_tracing_keeps_the_layers() -> None:
    layers = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return cpu.mlp(*self.layers, x)

    traced = torch.fx.symbolic_trace(Parts())
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["layers.0", "layers.1", "layers.2"]
    x = torch.randn(2, 4)
    assert_close(traced(x), layers(x))


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
@torch.no_grad()
def test_models_offloaded_by_accelerate_compute_the_same(offload: str, tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = draw_weights(hiera_core.Hiera(**SMALL)).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model.forward_logits(x), model(x)
    where = {} if offload == "cpu_offload" else {"offload_dir": str(tmp_path)}
    getattr(accelerate, offload)(model, execution_device=torch.device("cpu"), **where)
    assert model.blocks[0].mlp.fc1.weight.is_meta
    assert_close(model(x), expected[1])


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
@pytest.mark.parametrize("rule", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@torch.no_grad()
def test_models_quantized_by_torchao_compute_what_its_layers_do(rule: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = draw_weights(hiera_core.Hiera(**{**SMALL, "embed_dim": 32})).eval()
    x = torch.randn(2, 3, 64, 64)
    exact = model.forward_logits(x)
    torchao.quantize_(model, getattr(torchao, rule)())
    assert type(model.blocks[0].mlp.fc1.weight) not in (torch.Tensor, nn.Parameter)
    layer = model.blocks[0].mlp.fc1
    rows = torch.randn(2, 7, layer.in_features)
    assert torch.equal(cpu.linear(layer, rows), layer(rows))
    assert_close(model.forward_logits(x), exact, 0.1)


@pytest.mark.parametrize(
    "name", ["replaced-forward", "forward-hook", "pre-hook", "wrapped", "plain"]
)
@pytest.mark.parametrize("place", ["fc1", "fc2"])
@torch.no_grad()
def test_compiled_programs_hold_what_the_layers_do(name: str, place: str) -> None:
    torch.compiler.reset()
    block = draw_weights(hiera_core.Hiera(**SMALL)).eval().blocks[0]
    layer, x = CASES[name]((getattr(block.mlp, place), torch.randn(2, 64, 16)))
    setattr(block.mlp, place, layer)
    assert_close(torch.compile(block, backend="aot_eager")(x), block(x))


PRIVATE_NAMES = [
    "torch._C._get_tracing_state",
    "torch._C._len_torch_dispatch_stack",
    "torch._C._len_torch_function_stack",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._dispatch_keys",
    "torch.autograd.forward_ad._current_level",
    "torch.backends.mkldnn",
    "torch.backends.mkldnn.is_available",
    "torch._C._get_mkldnn_enabled",
    "torch._C._is_any_autocast_enabled",
    "torch.compiler.is_exporting",
    "torch.compiler.is_compiling",
    "torch.ops.mkldnn",
    "torch.ops.mkldnn._linear_pointwise",
    "torch.nn.modules.module._global_forward_hooks",
    "torch.nn.modules.module._global_backward_pre_hooks",
    "torch.nn.Module._compiled_call_impl",
]
WITHOUT_A_NAME = """
    import sys
    import torch
    import torch.backends.mkldnn
    import hiera_core.weights.load  # imports of other libraries come first

    def without(lookup, owner, name):
        def look(self, key):
            if self is owner and key == name:
                raise AttributeError(key)
            return lookup(self, key)

        return look

    def hide(owner, name):
        # Delete an attribute, and return a function that restores it.
        held, kind = getattr(owner, name), type(owner)
        if name in vars(owner):
            delattr(owner, name)
        if hasattr(owner, name):  # a module of its own class, which finds its attributes elsewhere
            lookups = [key for key in ("__getattribute__", "__getattr__") if hasattr(kind, key)]
            found = {key: getattr(kind, key) for key in lookups}
            for key, lookup in found.items():
                setattr(kind, key, without(lookup, owner, name))
            return lambda: [setattr(kind, *pair) for pair in found.items()]
        return lambda: setattr(owner, name, held)

    x = torch.randn(2, 3, 64, 64)
    for path in sys.argv[1:]:
        for module in [m for m in sys.modules if m.startswith("hiera_core.models")]:
            del sys.modules[module]
        parent, name = path.rsplit(".", 1)
        restore = hide(eval(parent), name)
        try:
            assert not hasattr(eval(parent), name), path
            from hiera_core.models import cpu
        finally:
            restore()
        assert not cpu.HAS_ONEDNN, f"{path} is not probed"
        from hiera_core.models.hiera import Hiera

        model = Hiera(embed_dim=16, stages=(1, 1, 2, 1), input_size=(64, 64)).eval()
        model(x).sum().backward()
        with torch.no_grad():
            model(x), model.bfloat16()(x.bfloat16())
"""


def test_a_missing_private_name_only_loses_speed() -> None:
    """Each name is deleted while our modules are imported. PyTorch itself needs some of them, so
    they are there again when the model runs."""
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_A_NAME), *PRIVATE_NAMES],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
