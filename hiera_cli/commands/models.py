"""`hiera models`: the model zoo as a table. This command does not import torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from hiera_core import zoo
from hiera_core.compiling import compiler_cache
from hiera_core.compiling.program_cache import ProgramCache
from hiera_core.errors import UsageError
from hiera_core.weights import names

from .. import completion, options
from ..output_formats import Format, print_text, resolve_format, write_rows
from ..text_tables import stdout_width, wrap_line

COLUMNS = [
    "name", "params", "gmacs", "input", "top1", "speed", "licence", "commercial_use", "checkpoints",
    "cached",
]  # fmt: skip
# Columns that a narrow terminal does not show, the first to go first.
OPTIONAL = [
    "cached", "checkpoints", "gmacs", "speed", "licence", "params", "input", "commercial_use",
]  # fmt: skip
LICENCE_LINE = (
    "CC BY-NC 4.0: no commercial use. The code, and the weights that ship with it: Apache 2.0."
)


def models(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Only list models whose name contains this text.",
            metavar="NAME",
            autocompletion=completion.classifiers_and_autoencoders,
            show_default=False,
        ),
    ] = None,
    free: Annotated[
        bool,
        typer.Option("--free", help="Only list models whose licence allows commercial use."),
    ] = False,
    clear_compiled: Annotated[
        bool,
        typer.Option(
            "--clear-compiled",
            help="Remove the programs that --compile has kept on this machine, unless a process "
            "uses them, and list nothing.",
        ),
    ] = False,
    format: options.PrintFormatOpt = Format.auto,
) -> None:
    """List the models in the zoo.

    The table shows parameters, GMACs per input, input size, top-1 accuracy in percent (on
    ImageNet-1k or Kinetics-400; the nano models on their own data), the published speed in inputs
    per second (A100, fp16), the licence of the weights, whether it allows commercial use, the
    checkpoints, and which of these are on this machine.
    """
    if clear_compiled:
        if name is not None or free:
            raise UsageError("--clear-compiled removes all compiled programs", "give it alone")
        print_text(_clear_compiled())
        return
    entries = [entry for entry in zoo.models().values() if not name or name in entry.name]
    if not entries:
        zoo.get(str(name))  # raises an error that suggests similar names
    entries = [entry for entry in entries if entry.commercial_use or not free]
    rows = [_row(entry) for entry in entries]
    format = resolve_format(format, None)
    if format is Format.table:
        for entry, row in zip(entries, rows, strict=True):
            row["params"] = f"{entry.params / 1e6:.1f}M"
    width = stdout_width()
    print_text(write_rows(rows, COLUMNS, format, width=width, optional=OPTIONAL))
    if format is Format.table:
        print_text("".join(f"{line}\n" for line in wrap_line(LICENCE_LINE, width)))


def _clear_compiled() -> str:
    """Remove all compiled programs, and return a line of text about it."""
    cache = ProgramCache(limit=0)
    with compiler_cache.unused():
        size = compiler_cache.clear()
        programs, bytes_of_programs = cache.clear()
    size += bytes_of_programs
    count = "1 compiled program" if programs == 1 else f"{programs} compiled programs"
    return f"removed {count}, {size / 1e6:.1f} MB, from {cache.folder}\n"


def _row(entry: zoo.ModelEntry) -> dict[str, object]:
    return {
        "name": entry.name,
        "kind": entry.kind,
        "autoencoder": entry.autoencoder,
        "family": entry.family,
        "params": entry.params,
        "gmacs": entry.gmacs,
        "input": "x".join(map(str, entry.config["input_size"])),
        "top1": entry.top1,
        "speed": entry.speed,
        "checkpoints": list(entry.checkpoints),
        "licence": entry.licence,
        "commercial_use": entry.commercial_use,
        "cached": [tag for tag, where in entry.checkpoints.items() if _is_cached(where)],
    }


def _is_cached(where: zoo.CheckpointEntry) -> bool:
    """Return whether a checkpoint ships in the package, or is in the hub's or torch.hub's cache.

    This only looks for files, because importing huggingface_hub or torch would take too long.
    """
    if where.bundled_path is not None:
        return where.bundled_path.is_file()
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    hf_home = Path(os.environ.get("HF_HOME", home / "huggingface"))
    hub_cache = Path(os.environ.get("HF_HUB_CACHE", hf_home / "hub"))
    torch_home = Path(os.environ.get("TORCH_HOME", home / "torch"))
    snapshots = hub_cache / f"models--{where.hub.replace('/', '--')}" / "snapshots"
    in_hub_cache = (
        path.is_file() for file in names.WEIGHT_NAMES for path in snapshots.glob(f"*/{file}")
    )
    in_url_cache = torch_home / "hub" / "checkpoints" / (where.file or ".")
    return in_url_cache.is_file() or any(in_hub_cache)
