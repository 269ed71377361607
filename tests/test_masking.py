"""Tests of masks: `mask` and `keep_ids` mean the same units, and what is neither is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hiera_core
from hiera_core.errors import UsageError
from hiera_core.models.masking import check_keep_ids, draw_units

from .conftest import SMALL, assert_close, draw_weights

MAE = {**SMALL, "q_pool": 2, "decoder_embed_dim": 32, "decoder_num_heads": 2, "decoder_depth": 2}
# With 4x4 units and three strides, windows are not numbered in grid order.
SMALL_UNITS = {**MAE, "mask_unit_size": (4, 4)}
CALLS: dict[str, Any] = {
    "forward": lambda model, x, **masks: model(x, **masks)[:3],
    "encoder": lambda model, x, **masks: [model.forward_encoder(x, **masks)[0]],
    "features": lambda model, x, **masks: [model.forward_features(x, **masks)],
    "reconstruct": lambda model, x, **masks: [
        hiera_core.reconstruct(model, x, **masks).reconstruction
    ],
    "reconstruct-raw": lambda model, x, **masks: [
        hiera_core.reconstruct(model, x, raw=True, **masks).reconstruction
    ],
}


def some_model(config: dict[str, Any] = MAE) -> hiera_core.MaskedAutoencoderHiera:
    return draw_weights(hiera_core.MaskedAutoencoderHiera(**config)).eval()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("config", [MAE, SMALL_UNITS], ids=["8x8", "4x4"])
@torch.no_grad()
def test_numbers_and_masks_mean_the_same_units(config: dict[str, Any], call: str) -> None:
    model, x = some_model(config), torch.randn(2, 3, 64, 64)
    units, kept = model.layout.windows, model.layout.windows // 2
    ids = torch.stack([torch.randperm(units)[:kept] for _ in range(2)])
    mask = torch.zeros(2, units, dtype=torch.bool).scatter(1, ids, True)
    expected = CALLS[call](model, x, mask=mask)
    grid = mask.view(2, *model.layout.unit_grid)
    for masks in ({"keep_ids": ids}, {"keep_ids": ids.flip(1)}, {"mask": grid}):
        for found, value in zip(CALLS[call](model, x, **masks), expected, strict=True):
            assert_close(found, value)


@pytest.mark.parametrize("name", ["uint8", "int8", "int16", "int32", "int64", "uint16", "uint32"])
@torch.no_grad()
def test_numbers_may_be_of_any_integer_type(name: str) -> None:
    model, x = some_model(), torch.randn(1, 3, 64, 64)
    ids = torch.tensor([[3, 1]])
    found = model(x, keep_ids=ids.to(getattr(torch, name)))
    assert_close(found[0], model(x, keep_ids=ids)[0])
    assert found[3].tolist() == [[False, True, False, True]]


@torch.no_grad()
def test_all_units_in_order_are_all_visible() -> None:
    model, x = draw_weights(hiera_core.Hiera(**SMALL)).eval(), torch.randn(2, 3, 64, 64)
    tokens = model(x, keep_ids=torch.arange(4).expand(2, -1))
    assert_close(tokens, model(x, mask=torch.ones(2, 4, dtype=torch.bool)))
    # A classifier without a mask pools the same tokens.
    assert_close(model.head(model.norm(tokens.mean(1))), model(x))
    for masks in ({"keep_ids": torch.arange(4)[None]}, {"mask": torch.ones(1, 4).bool()}):
        with pytest.raises(UsageError, match="deletes no unit"):
            some_model()(x[:1], **masks)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"keep_ids": torch.tensor([[0, 4]])}, "number 4; the mask units have the numbers 0 to 3"),
        ({"keep_ids": torch.tensor([[-1, 2]])}, "number -1"),
        ({"keep_ids": torch.tensor([[2, 1, 2]])}, "number 2 twice"),
        ({"keep_ids": torch.tensor([[0, 1, 2, 3, 0]])}, "shape"),
        ({"keep_ids": torch.zeros(1, 0, dtype=torch.int64)}, "shape"),
        ({"keep_ids": torch.tensor([0, 1])}, "shape"),
        ({"keep_ids": torch.tensor([[[0, 1]]])}, "shape"),
        ({"keep_ids": torch.tensor([[0, 1], [2, 3]])}, "2 rows for 1 inputs"),
        ({"keep_ids": torch.tensor([[0.0, 1.0]])}, "torch.float32; give integers"),
        ({"keep_ids": torch.tensor([[True, False]])}, "give a boolean mask as mask="),
        ({"keep_ids": [[0, 1]]}, "type list"),
        ({"mask": torch.tensor([[0, 1]])}, "numbers of the visible units as keep_ids="),
        ({"mask": torch.tensor([[0, 1]], dtype=torch.int32)}, "a mask is boolean"),
        ({"mask": torch.arange(4)[None]}, "a mask is boolean"),
        ({"mask": torch.tensor([[1.0, 0.0, 0.0, 1.0]])}, "a mask is boolean"),
        ({"mask": torch.ones(1, 4, 1).bool()}, r"expected \[batch, 4\] or \[batch, 2, 2\]"),
        ({"mask": torch.ones(4).bool()}, "shape"),
        ({"mask": torch.ones(1, 2, 3).bool()}, "shape"),
        ({"mask": torch.zeros(1, 4).bool()}, "at least one"),
        ({"mask": [[True, False, False, True]]}, "type list"),
        (
            {"mask": torch.tensor([[True, False, False, False]]), "keep_ids": torch.tensor([[0]])},
            "both given",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("call", [*CALLS, "classifier"])
@torch.no_grad()
def test_what_is_no_mask_is_refused(call: str, masks: dict[str, Any], message: str) -> None:
    x = torch.randn(1, 3, 64, 64)
    with pytest.raises(UsageError, match=message):
        if call == "classifier":
            hiera_core.Hiera(**SMALL)(x, **masks)
        else:
            CALLS[call](some_model(), x, **masks)


def test_a_graph_holds_no_check_of_the_values() -> None:
    """The checks need values, which would break a graph."""
    torch.compiler.reset()
    model, x, ids = some_model(), torch.randn(2, 3, 64, 64), torch.tensor([[0, 3], [2, 1]])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, keep_ids=ids)[0], model(x, keep_ids=ids)[0])
    program = torch.export.export(model, (x,), {"keep_ids": ids}).module()
    assert_close(program(x, keep_ids=ids)[0], model(x, keep_ids=ids)[0])
    with torch.device("meta"):
        assert some_model_on_meta()(torch.empty(2, 3, 64, 64), keep_ids=ids.to("meta"))[0].is_meta


def some_model_on_meta() -> hiera_core.MaskedAutoencoderHiera:
    return hiera_core.MaskedAutoencoderHiera(**MAE)


def test_values_are_not_read_where_the_caller_vouches_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Training draws the units itself. A check would read them from the GPU at every step."""
    model, drawn = some_model(), draw_units(2, 4, 0.5)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: pytest.fail("a value was read"))
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: pytest.fail("a value was read"))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a value was read"))
    model(torch.randn(2, 3, 64, 64), keep_ids=drawn, check_ids=False)
    check_keep_ids(drawn, 4, values=False)


def test_training_vouches_for_its_units(monkeypatch: pytest.MonkeyPatch) -> None:
    from hiera_core.training import losses, recipe
    from hiera_core.training.dataloader import Batch

    model, seen = some_model().train(), []
    forward = model.forward
    model.forward = lambda x, **masks: (seen.append(masks), forward(x, **masks))[1]
    batch = Batch.__new__(Batch)
    batch.x, batch.target = torch.randn(2, 3, 64, 64), None
    batch.visible_units = draw_units(2, 4, 0.5)
    losses.compute_losses(model, batch, recipe.Recipe.__new__(recipe.Recipe), torch.float32)
    assert seen[0]["check_ids"] is False and torch.equal(seen[0]["keep_ids"], batch.visible_units)
