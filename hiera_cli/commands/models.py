"""`hiera models`: the zoo as a table. Imports no torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hiera_core import zoo

from .. import options
from ..output_formats import Format, write_rows

COLUMNS = ["name", "params", "gmacs", "input", "top1", "speed", "licence", "checkpoints", "cached"]
LICENCE_LINE = (
    "CC BY-NC 4.0: no commercial use. The code, and the weights that ship with it: Apache 2.0."
)


def models(
    name: Annotated[
        str | None, typer.Argument(help="Only models with this in their name.", show_default=False)
    ] = None,
    format: options.FormatOpt = Format.auto,
) -> None:
    """The model zoo: size, input, accuracy (ImageNet-1k or Kinetics-400), checkpoints, licence."""
    rows = [_row(model) for model in zoo.models().values() if not name or name in model.name]
    if not rows:
        zoo.get(str(name))  # raises, with near names
    if format is Format.auto:
        format = Format.table if sys.stdout.isatty() else Format.jsonl
    if format is Format.table:
        for row in rows:
            row["params"] = f"{row['params'] / 1e6:.1f}M"
    sys.stdout.write(write_rows(rows, COLUMNS, format))
    if format is Format.table:
        print(LICENCE_LINE)


def _row(model: zoo.ModelEntry) -> dict[str, Any]:
    return {
        "name": model.name,
        "kind": model.kind,
        "autoencoder": model.autoencoder,
        "params": model.params,
        "gmacs": model.gmacs,
        "input": "x".join(map(str, model.config["input_size"])),
        "top1": model.top1,
        "speed": model.speed,
        "checkpoints": list(model.checkpoints),
        "licence": model.licence,
        "cached": [tag for tag, where in model.checkpoints.items() if _is_cached(where)],
    }


def _is_cached(where: zoo.CheckpointEntry) -> bool:
    """Whether it is at hand: shipped, in the hub's cache or torch.hub's. Paths only, no library is
    asked."""
    if where.bundled_path is not None:
        return where.bundled_path.is_file()
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    hf = Path(os.environ.get("HF_HOME", home / "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", hf / "hub"))
    torch_home = Path(os.environ.get("TORCH_HOME", home / "torch"))
    repo = hub / f"models--{where.hub.replace('/', '--')}" / "snapshots"
    return (torch_home / "hub" / "checkpoints" / where.file).is_file() or any(
        repo.glob("*/model.safetensors")
    )
