"""What commands with inputs have in common: options that become the arguments of a pipeline, and
runs that write rows."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import typer

from .options import OnError, auto_or_count, auto_or_workers
from .scale.input_selection import InputSelection, device_of
from .scale.row_runs import RowRun
from .scale.scale_options import Engine

if TYPE_CHECKING:
    from hiera_core.data.clip_sampling import Sampling
    from hiera_core.inference.pipeline import PipelineOptions


def check_counts(context: typer.Context) -> None:
    """Check --batch-size and --workers, before anything is read.

    Raises:
        BadParameter: One of them is no number.
    """
    auto_or_count(context.params["batch_size"])
    auto_or_workers(context.params["workers"])


def pipeline_options(context: typer.Context, device: str | None = None) -> PipelineOptions:
    """Return the arguments that options of a command give to its pipeline.

    An option is one for how inputs are read if `Sampling` has a field of its name.

    Args:
        context: The context of the command.
        device: The device, if it is not that of --device.

    Raises:
        UsageError: See `Sampling`.
    """
    from hiera_core.data.clip_sampling import Sampling

    given: dict[str, Any] = {
        name: value.value if isinstance(value, StrEnum) else value
        for name, value in context.params.items()
    }
    fields = [field.name for field in dataclasses.fields(Sampling)]
    return {
        "sampling": Sampling(**{name: given[name] for name in fields if name in given}),
        "workers": auto_or_workers(given["workers"]),
        "device": given["device"] if device is None else device,
        "dtype": given["dtype"],
        "batch_size": auto_or_count(given["batch_size"]),
        "compile": given["compile"],
    }


def sampling_of(computing: PipelineOptions) -> Sampling:
    """Return how inputs are read, from what `pipeline_options` returned."""
    sampling = computing["sampling"]
    assert sampling is not None
    return sampling


def settings_of(computing: PipelineOptions, **others: object) -> dict[str, object]:
    """Return what results depend on, besides the model: how inputs are read, and other options."""
    return {**others, **dataclasses.asdict(sampling_of(computing))}


def row_run(context: typer.Context) -> RowRun:
    """Return the inputs of a command, and how it writes rows if that is wanted.

    Raises:
        UsageError: See `InputSelection.parse` and `device_of`.
    """
    given = context.params
    chosen = InputSelection.parse(
        given["inputs"],
        given["recursive"],
        given["manifest"],
        given["path_column"],
        given["id_column"],
        given["private_urls"],
        given["shard"],
    )
    return RowRun(
        chosen=chosen,
        rows=given["rows"],
        engine=Engine(given["engine"]),
        address=given["address"],
        dry_run=given["dry_run"],
        overwrite=given["overwrite"],
        resume=given["resume"],
        quiet=given["quiet"],
        stop=OnError(given["on_error"]) is OnError.stop,
        workers=auto_or_workers(given["workers"]),
        device=device_of(given["device"], chosen.shard),
    )
