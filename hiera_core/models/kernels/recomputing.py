"""Activation checkpointing: blocks that are computed again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ...errors import UsageError

Checkpointing = bool | Literal["selective"]
# Operations whose results are kept: they take nearly all of the time, and their results, of all
# that the backward pass needs, only a part of the memory.
KEPT = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)


def as_checkpointing(value: object) -> Checkpointing:
    """Return a value as True, False or `selective`.

    Raises:
        UsageError: It is another text.
    """
    if value == "selective":
        return "selective"
    if isinstance(value, str):
        raise UsageError(f"grad_checkpointing is {value!r:.60}", "give True, False or 'selective'")
    return bool(value)


def recompute(
    kind: Checkpointing, block: Callable[..., torch.Tensor], *arguments: Any
) -> torch.Tensor:
    """Return what a block returns, and compute it again in the backward pass: all of it, or with
    `selective` what is cheap."""
    options: dict[str, Any] = {}
    if kind == "selective":
        options["context_fn"] = _contexts
    out: torch.Tensor = checkpoint(block, *arguments, use_reentrant=False, **options)
    return out


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    is_kept = operation in _kept_operations()
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _kept_operations() -> frozenset[Any]:
    found = (getattr(torch.ops.aten, name, None) for name in KEPT)
    return frozenset(packet.default for packet in found if packet is not None)
