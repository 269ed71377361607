"""The zoo: every model and checkpoint as a row of zoo.yaml. Imports no torch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError, did_you_mean
from ..records import Kind

ASSETS = Path(__file__).with_name("assets")  # weights and samples that ship in the package
DEFAULT_IMAGE_MODEL = "hiera_base_224"
DEFAULT_VIDEO_MODEL = "hiera_base_16x224"


@dataclass(frozen=True)
class CheckpointEntry:
    """Where one checkpoint lies: a file name below the weights' base URL and a hub repository, or
    a file that ships in the package."""

    file: str = ""
    hub: str = ""
    sha256: str | None = None
    asset: str | None = None

    @property
    def bundled_path(self) -> Path | None:
        return None if self.asset is None else ASSETS / self.asset


@dataclass(frozen=True)
class ModelEntry:
    """One row: everything that is known of a model without building it."""

    name: str
    kind: Kind
    autoencoder: bool
    config: dict[str, Any]  # constructor arguments
    preprocessing: dict[str, Any]
    classes: str | list[str]  # which label set, see labels.py; or the names themselves
    checkpoints: dict[str, CheckpointEntry]
    licence: str  # of the weights
    params: int  # count
    gmacs: float | None = None  # 1e9 multiply-adds for one input
    top1: float | None = None  # percent
    speed: float | None = None  # inputs/s, A100 fp16, as published

    @property
    def default(self) -> str:
        """The checkpoint tag used when none is named."""
        return next(iter(self.checkpoints))


@functools.cache
def models() -> dict[str, ModelEntry]:
    """All rows by name, in the table's order."""
    table = yaml.load(Path(__file__).with_name("zoo.yaml").read_text(), Loader=_loader())
    return {name: _row(name, row, table) for name, row in table["models"].items()}


def names() -> list[str]:
    return list(models())


def get(name: str) -> ModelEntry:
    """The row called `name`.

    Raises:
        UsageError: no such model; the hint names the nearest ones.
    """
    rows = models()
    if name not in rows:
        hint = did_you_mean(name, rows) or "`hiera models` lists them"
        raise UsageError(f"unknown model {name!r}", hint)
    return rows[name]


def split_tag(name: str) -> tuple[str, str | None]:
    """`hiera_base_224.mae_in1k` -> (`hiera_base_224`, `mae_in1k`)."""
    base, dot, tag = name.partition(".")
    return (base, tag) if dot else (name, None)


def block_dims(config: dict[str, Any]) -> list[int]:
    """Output width of every encoder block: what a checkpoint's shapes tell of a model."""
    dim, dims = config["embed_dim"], []
    for stage, depth in enumerate(config["stages"]):
        if stage:
            dim = int(dim * config.get("dim_mul", 2.0))
        dims += [dim] * depth
    return dims


def _row(name: str, row: dict[str, Any], table: dict[str, Any]) -> ModelEntry:
    row = dict(row)
    size, entry = row.pop("size"), row.pop("input")
    autoencoder = row.pop("autoencoder", False)
    source = table["inputs"][entry]
    config = {**table["sizes"][size], **source["config"], **row.pop("decoder", {})}
    if autoencoder:  # a mask unit keeps 2x2 tokens; classifiers pool once more
        config["q_pool"] = len(config["stages"]) - 2
    weights = table["checkpoints"][f"{entry}_autoencoder" if autoencoder else entry]
    base = name.removeprefix("mae_")
    checkpoints = {
        tag: CheckpointEntry(
            **{key: text.format(base=base, name=name) for key, text in where.items()}
        )
        for tag, where in weights.items()
    }
    return ModelEntry(
        name=name,
        kind=source["kind"],
        autoencoder=autoencoder,
        config={k: tuple(v) if isinstance(v, list) else v for k, v in config.items()},
        preprocessing=source["preprocessing"],
        classes=source["classes"],
        checkpoints=checkpoints,
        licence=source["licence"],
        params=row.pop("params", 0),
        **row,
    )


def _loader() -> Any:
    """libyaml's loader where PyYAML has it: the table is read at every start."""
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)
