"""The entries of the zoo: one for each model in zoo.yaml. This module does not import torch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ..errors import UsageError, did_you_mean
from ..records import Kind

# hiera: classifiers and autoencoders. hieradet: the image encoder of SAM 2, which returns maps.
Family = Literal["hiera", "hieradet"]

ASSETS = Path(__file__).with_name("assets")  # weights and sample inputs in the package
DEFAULT_IMAGE_MODEL = "hiera_base_224"
DEFAULT_VIDEO_MODEL = "hiera_base_16x224"


@dataclass(frozen=True)
class CheckpointEntry:
    """Where a checkpoint is: on the hub and at a URL, or in the package.

    Args:
        file: Name of the .pth file, relative to `download.WEIGHTS_URL`. Empty if there is none.
        hub: Hub repository.
        sha256: Checksum of the .pth file, if zoo.yaml lists it.
        asset: Name of a file in ASSETS. The other fields are then not set.
    """

    file: str = ""
    hub: str = ""
    sha256: str | None = None
    asset: str | None = None

    @property
    def bundled_path(self) -> Path | None:
        """Path of the file in the package, or None if the checkpoint has to be downloaded."""
        return None if self.asset is None else ASSETS / self.asset


@dataclass(frozen=True)
class ModelEntry:
    """A model in the zoo: everything that is known about it before it is built."""

    name: str
    kind: Kind
    autoencoder: bool
    config: dict[str, Any]  # constructor arguments
    preprocessing: dict[str, Any]  # see `ImageTransform` and `VideoTransform`
    classes: str | list[str]  # a label set of labels.py, or the class names themselves
    checkpoints: dict[str, CheckpointEntry]  # by tag; the first is the default
    licence: str  # of the weights
    params: int  # number of parameters
    family: Family = "hiera"
    gmacs: float | None = None  # 1e9 multiply-adds for one input
    top1: float | None = None  # accuracy in percent
    speed: float | None = None  # inputs/s on an A100 in fp16, as published

    @property
    def default(self) -> str | None:
        """Tag of the default checkpoint; None if no weights have been released."""
        return next(iter(self.checkpoints), None)

    @property
    def commercial_use(self) -> bool:
        """Whether the licence of the weights allows commercial use."""
        return "NC" not in self.licence.split("-")


@functools.cache
def models() -> dict[str, ModelEntry]:
    """Return all entries by name, in the order of zoo.yaml."""
    # Use PyYAML's C loader if there is one, because every start of the command line reads the file.
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    table = yaml.load(Path(__file__).with_name("zoo.yaml").read_text(), Loader=loader)
    return {name: _entry(name, fields, table) for name, fields in table["models"].items()}


def names() -> list[str]:
    """Return the names of all models, in the order of zoo.yaml."""
    return list(models())


def get(name: str) -> ModelEntry:
    """Return the entry of a model.

    Raises:
        UsageError: There is no such model. The hint names similar ones.
    """
    entries = models()
    if name not in entries:
        hint = did_you_mean(name, entries) or "`hiera models` lists all models"
        raise UsageError(f"unknown model {name!r}", hint)
    return entries[name]


def check_is_hiera(family: Family | None, name: str) -> None:
    """Check that a model can classify or reconstruct.

    Args:
        family: Its family, or None if it is not known yet.
        name: The model or checkpoint, for messages.

    Raises:
        UsageError: It is the image encoder of SAM 2.
    """
    if family == "hieradet":
        raise UsageError(
            f"{name} is the image encoder of SAM 2: it has no classes and no decoder, and returns "
            "maps of its stages",
            "use it in `hiera features`, `hiera eval --probe knn` or create_model(..., "
            f"features_only=True); to classify, use a model such as {DEFAULT_IMAGE_MODEL}",
        )


def split_tag(name: str) -> tuple[str, str | None]:
    """`hiera_base_224.mae_in1k` -> (`hiera_base_224`, `mae_in1k`)."""
    base, dot, tag = name.partition(".")
    return (base, tag) if dot else (name, None)


def block_dims(config: dict[str, Any]) -> list[int]:
    """Return the output width of each encoder block, which the shapes in a checkpoint also show."""
    dim, dims = config["embed_dim"], []
    for stage, depth in enumerate(config["stages"]):
        if stage:
            dim = int(dim * config.get("dim_mul", 2.0))
        dims += [dim] * depth
    return dims


def _entry(name: str, fields: dict[str, Any], table: dict[str, Any]) -> ModelEntry:
    """Build an entry from its fields in `models`, and from what they refer to in zoo.yaml."""
    fields = dict(fields)
    size, input_name = fields.pop("size"), fields.pop("input")
    autoencoder = fields.pop("autoencoder", False)
    input_fields = table["inputs"][input_name]
    config = {**table["sizes"][size], **input_fields["config"], **fields.pop("decoder", {})}
    if autoencoder:  # a mask unit keeps 2x2 tokens; classifiers pool once more
        config["q_pool"] = len(config["stages"]) - 2
    config |= fields.pop("config", {})
    checkpoints_name = f"{input_name}_autoencoder" if autoencoder else input_name
    by_tag = table["checkpoints"][fields.pop("checkpoints", checkpoints_name)]
    base = name.removeprefix("mae_")
    checkpoints = {}
    hyphenated = name.removeprefix("sam2_hiera_").replace("_", "-")
    for tag, locations in by_tag.items():
        where = {
            key: text.format(base=base, name=name, size=hyphenated)
            for key, text in locations.items()
        }
        checkpoints[tag] = CheckpointEntry(**where, sha256=table["sha256"].get(where.get("file")))
    return ModelEntry(
        name=name,
        kind=input_fields["kind"],
        autoencoder=autoencoder,
        config={k: tuple(v) if isinstance(v, list) else v for k, v in config.items()},
        preprocessing=input_fields["preprocessing"],
        classes=input_fields["classes"],
        checkpoints=checkpoints,
        licence=input_fields["licence"],
        family=input_fields.get("family", "hiera"),
        params=fields.pop("params", 0),
        **fields,
    )
