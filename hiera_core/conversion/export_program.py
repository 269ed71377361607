"""Export models as programs that run without this package: ONNX and torch.export.

A program takes `input`, normalised float32 [batch, chans, *size], for any batch size up to a limit.
It returns `logits` [batch, classes] in float32, or `features` [batch, chans] if the model has no
classifier.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch

from ..device import DTYPES
from ..errors import UsageError
from ..models.attention import MAX_FUSED_BATCH
from ..models.hiera import HieraEncoder
from ..models.token_layout import TokenLayout
from ..weights.files import open_deferring_errors
from .plan import ConversionPlan

OPSET = 18
PROTOBUF_LIMIT = 2 << 30  # bytes; larger weights go to a second file next to the .onnx file


class GatherLayout(TokenLayout):
    """A token layout that permutes by gathering tokens.

    `TokenLayout` permutes up to 14 dimensions, one for each level of strides, and runtimes such as
    TensorRT stop at 8. Gathers cost about the same where the program runs.
    """

    @classmethod
    def of(cls, layout: TokenLayout) -> Self:
        """Return the layout that permutes as `layout` does."""
        values = {f.name: getattr(layout, f.name) for f in dataclasses.fields(layout) if f.init}
        gathering = cls(**values)
        cells = layout.cell_of_token(0).flatten()
        object.__setattr__(gathering, "cells", cells)
        return gathering

    def to_windows(self, x: torch.Tensor, pools: int = 0) -> torch.Tensor:
        """b n c -> b (w t) c"""
        if pools:
            return super().to_windows(x, pools)
        cells: torch.Tensor = self.cells  # type: ignore[attr-defined]
        return x.index_select(1, cells)


class Program(torch.nn.Module):
    """Module to export. It takes and returns float32, for weights of any precision."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.forward_logits(input.to(self.dtype))  # type: ignore[operator]
        return logits.float()


def check_exportable(plan: ConversionPlan, name: str) -> None:
    """Check that a model maps an input to logits or features.

    Raises:
        UsageError: The model is an autoencoder.
    """
    if plan.is_sam2:
        raise UsageError(
            f"{name} cannot hold SAM 2's image encoder yet", "use hub, timm or transformers"
        )
    if plan.is_autoencoder:
        raise UsageError(
            f"{plan.name} is an autoencoder, and {name} can only hold classifiers and encoders",
            "use hub, pth or transformers, or convert a fine-tuned checkpoint",
        )


def write_program(plan: ConversionPlan, name: str, path: Path) -> None:
    """Export a model to a file.

    Args:
        plan: The model to write.
        name: Name of the format, a key of `EXPORTERS`.
        path: The file.

    Raises:
        OSError: The file cannot be written.
    """
    model = plan.build()
    assert isinstance(model, HieraEncoder)
    model.layout = GatherLayout.of(model.layout)
    program = Program(model, DTYPES[plan.dtype]).eval()
    # Two inputs, because torch.export treats a batch size of one as a constant.
    example = torch.zeros(2, plan.config["in_chans"], *plan.size)
    # Larger batches would need another program: the model splits their fused attention.
    batch = torch.export.Dim("batch", min=1, max=MAX_FUSED_BATCH // model.layout.windows)
    with _quiet_exporters(), torch.no_grad():
        exported = torch.export.export(program, (example,), dynamic_shapes=({0: batch},))
        EXPORTERS[name](exported, plan, path)


def metadata(plan: ConversionPlan) -> dict[str, str]:
    """Return what a user of the file needs in addition to the program. Values that are not text
    are encoded as JSON."""
    card = {key: str(value) for key, value in plan.card.items() if key in ("source", "licence")}
    return {
        "model": plan.name,
        **card,
        "input_size": json.dumps(plan.size),
        "labels": json.dumps(plan.class_names or []),
        "preprocessing": json.dumps(vars(plan.transform)),
    }


def output_name(plan: ConversionPlan) -> str:
    """Return the name of the program's output: `logits`, or `features` without a classifier."""
    return "logits" if plan.num_classes else "features"


def _write_pt2(exported: Any, plan: ConversionPlan, path: Path) -> None:
    with open_deferring_errors(path) as file:
        torch.export.save(exported, file, extra_files=metadata(plan))


def _write_onnx(exported: Any, plan: ConversionPlan, path: Path) -> None:
    program = torch.onnx.export(
        exported,
        input_names=["input"],
        output_names=[output_name(plan)],
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(metadata(plan))
    size = sum(t.numel() * t.element_size() for t in exported.state_dict.values())
    program.save(path, external_data=size > PROTOBUF_LIMIT * 0.9)


EXPORTERS: dict[str, Callable[[Any, ConversionPlan, Path], None]] = {
    "onnx": _write_onnx,
    "pt2": _write_pt2,
}


@contextlib.contextmanager
def _quiet_exporters() -> Iterator[None]:
    """Hide the warnings and log lines of the exporters. The written file is verified later."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
