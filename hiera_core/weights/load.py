"""From a name, hub repository, URL or file to a checked state dict in the reference's names."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import zoo
from ..errors import CheckpointError, HubError, UsageError, did_you_mean
from . import download, files, key_mapping

log = logging.getLogger("hiera")

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HEAD = ("head.projection.weight", "head.projection.bias")
PATCH_WEIGHT = "patch_embed.proj.weight"
LAYER_SCALED = {"ls1": "attn.proj", "ls2": "mlp.fc2"}  # timm's layer scales, what each scales


@dataclass
class Checkpoint:
    """Weights as read, before they meet a model."""

    source: str
    state: dict[str, torch.Tensor]  # in the reference's names
    dialect: key_mapping.Naming
    config: dict[str, Any] | None = None  # constructor arguments, where config.json has them
    card: dict[str, Any] = field(default_factory=dict)  # hiera.json: classes, preprocessing, ...

    @property
    def num_classes(self) -> int | None:
        head = self.state.get(HEAD[0])
        return None if head is None else head.shape[0]

    @property
    def is_autoencoder(self) -> bool:
        return "decoder_pos_embed" in self.state


def read_checkpoint(source: str | Path, **options: Any) -> Checkpoint:
    """Read a checkpoint from anywhere, in any dialect.

    Args:
        source: a file, a folder with model.safetensors (and config.json), an http(s) URL, or a hub
            repository `owner/name`.
        options: for hub repositories, as `hub.from_hub`.

    Raises:
        CheckpointError: no such file; damaged, unsafe or foreign content; NaN weights.
        HubError: it cannot be fetched.
    """
    return _load(_locate(source, options), str(source))


def read_released(row: zoo.ModelEntry, tag: str | None = None) -> Checkpoint:
    """Read a released checkpoint: from the hub's cache, torch.hub's, the hub, or its .pth URL.

    Raises:
        UsageError: the model has no such checkpoint.
        HubError: it is nowhere to be had.
    """
    tag = tag or row.default
    if tag not in row.checkpoints:
        hint = did_you_mean(tag, row.checkpoints) or f"it has {', '.join(row.checkpoints)}"
        raise UsageError(f"{row.name} has no checkpoint {tag!r}", hint)
    where = row.checkpoints[tag]
    return _load(_fetch_released(where), f"{row.name}.{tag}")


def identify_model(state: Mapping[str, torch.Tensor]) -> zoo.ModelEntry | None:
    """The zoo's model with these shapes, if there is one."""
    if PATCH_WEIGHT not in state:
        return None
    pattern = re.compile(r"blocks\.(\d+)\.attn\.proj\.bias")
    matches = ((pattern.fullmatch(name), t) for name, t in state.items())
    dims = [t.shape[0] for _, t in sorted((int(m[1]), t) for m, t in matches if m)]
    kernel = tuple(state[PATCH_WEIGHT].shape[2:])
    for row in zoo.models().values():
        fits = zoo.block_dims(row.config) == dims
        fits &= row.autoencoder == ("decoder_pos_embed" in state)
        if fits and row.config.get("patch_kernel", (7, 7)) == kernel:
            return row
    return None


@dataclass
class Fit:
    """What of a checkpoint goes into a model, and what does not."""

    state: dict[str, torch.Tensor]
    dropped: list[str]
    missing: list[str]


def fit(
    checkpoint: Checkpoint, expected: Mapping[str, torch.Size], *, name: str, strict: bool = True
) -> Fit:
    """Match a checkpoint with the parameters of a model.

    May be dropped, with a line in the log: a decoder that the model has no place for (the
    classifier's norm and head then stay newly initialised, as in the reference), and a head for
    another number of classes. With `strict=False` anything may be missing or left over; shapes
    must agree all the same. A patch embedding for other channels is adapted as timm does it.

    Raises:
        CheckpointError: it does not fit; names the first parameters and the model that would.
    """
    state, dropped, may_miss = dict(checkpoint.state), [], []
    if checkpoint.is_autoencoder and "decoder_pos_embed" not in expected:
        dropped += [n for n in state if n not in expected]
        may_miss += [n for n in expected if n.startswith(("norm.", "head."))]
    if checkpoint.num_classes and expected.get(HEAD[0]) != state[HEAD[0]].shape:
        dropped += [n for n in HEAD if n in state]
        may_miss += [n for n in HEAD if n in expected]
    for key in dropped:
        state.pop(key, None)
    if PATCH_WEIGHT in state and PATCH_WEIGHT in expected:
        state[PATCH_WEIGHT] = _adapt_channels(state[PATCH_WEIGHT], expected[PATCH_WEIGHT][1])

    missing = [n for n in expected if n not in state]
    unexpected = [n for n in state if n not in expected]
    other = [n for n in state if n in expected and state[n].shape != expected[n]]
    if other or (strict and (unexpected or set(missing) - set(may_miss))):
        raise _misfit(checkpoint, expected, name, other, missing, unexpected)
    _report(name, dropped + unexpected, missing)
    kept = {n: t for n, t in state.items() if n in expected}
    return Fit(kept, dropped + unexpected, missing)


def _locate(source: str | Path, options: dict[str, Any]) -> download.FetchedFiles:
    text, path = str(source), Path(source)
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        return download.FetchedFiles(path, *_beside(path))
    if text.startswith(("http://", "https://")):
        return download.from_url(text)
    if (
        HUB_ID.fullmatch(text)
        and not text.startswith(".")
        and path.suffix not in download.FILE_ENDINGS
    ):
        return download.from_hub(text, **options)
    raise CheckpointError(
        f"no file, folder or hub repository {text!r}", "check the path, or see `hiera models`"
    )


def _in_folder(folder: Path) -> download.FetchedFiles:
    names = [folder / name for name in download.WEIGHT_NAMES]
    others = sorted(p for p in folder.iterdir() if p.suffix in download.FILE_ENDINGS)
    for path in names + (others if len(others) == 1 else []):
        if path.is_file():
            return download.FetchedFiles(path, *_beside(path))
    raise CheckpointError(
        f"{folder} holds no {' or '.join(download.WEIGHT_NAMES)}", "name the file itself"
    )


def _beside(path: Path) -> tuple[Path | None, Path | None]:
    """config.json and hiera.json belong to a folder's model.safetensors, not to stray files."""
    if path.name not in download.WEIGHT_NAMES:
        return None, None
    found = [path.with_name(name) for name in ("config.json", "hiera.json")]
    config, card = (p if p.is_file() else None for p in found)
    return config, card


def _fetch_released(where: zoo.CheckpointEntry) -> download.FetchedFiles:
    if where.bundled_path is not None:
        return download.FetchedFiles(where.bundled_path)
    url = download.url_of(where.file)
    try:
        return download.from_hub(where.hub, cached_only=True)
    except HubError:
        if path := download.cached_url(url):
            return download.FetchedFiles(path)
    try:
        return download.from_hub(where.hub)
    except HubError as error:
        if download.is_offline():
            raise
        log.debug("%s; trying %s", error.message, url)
        try:
            return download.from_url(url, where.sha256)
        except HubError as second:
            raise HubError(f"{error.message}; {second.message}", download.CURES) from second


def _load(fetched: download.FetchedFiles, source: str) -> Checkpoint:
    raw, extras = files.read(fetched.weights)
    state, dialect = key_mapping.to_reference(raw)
    state = _fold_layer_scale(state)
    files.check_weights(state, source)
    config = files.read_json(fetched.config) if fetched.config else None
    card = {**extras.get("card", {}), **(files.read_json(fetched.card) if fetched.card else {})}
    # (Of a file that we converted the card knows better: id2label may be filled up with numbers.)
    if config is not None and "id2label" in config and "classes" not in card and not extras:
        card = {**card, "classes": _classes(config["id2label"], source)}
    if dialect != "reference" or config is None or "stages" not in config:
        # Another library's config, or none: ours may be in the file, or the shapes tell the model.
        config = extras.get("config")
    return Checkpoint(source, state, dialect, config, card)


def _fold_layer_scale(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's newer Hieras scale each branch by a vector: the same as a scaled last projection.
    In float32, as 16 bits would lose weights that are scaled by 1e-5."""
    state = dict(state)
    for gamma in [name for name in state if name.endswith((".ls1.gamma", ".ls2.gamma"))]:
        block, scale, _ = gamma.rsplit(".", 2)
        factor = state.pop(gamma).float()
        for kind in ("weight", "bias"):
            name = f"{block}.{LAYER_SCALED[scale]}.{kind}"
            if name in state and state[name].shape[0] == len(factor):
                rows = factor.view(-1, *[1] * (state[name].dim() - 1))
                state[name] = state[name].float() * rows
    return state


def _classes(id2label: Any, source: str) -> list[str]:
    """Class names as transformers writes them: {"0": "tench", ...}."""
    try:
        labels = {int(number): str(name) for number, name in id2label.items()}
    except (AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{source}: id2label in config.json is no table of class names", "mend or remove it"
        ) from error
    return [labels.get(number, str(number)) for number in range(len(labels))]


def _adapt_channels(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """Patch weights [dim, chans, *kernel] for other input channels: one channel takes the sum,
    more repeat what is there, scaled so that activations keep their size (timm's rule)."""
    have = weight.shape[1]
    if have == channels:
        return weight
    log.info("patch embedding adapted from %d to %d input channels", have, channels)
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    repeats = [1, -(-channels // have)] + [1] * (weight.dim() - 2)
    return weight.repeat(repeats)[:, :channels] * (have / channels)


def _misfit(
    checkpoint: Checkpoint,
    expected: Mapping[str, torch.Size],
    name: str,
    other: list[str],
    missing: list[str],
    unexpected: list[str],
) -> CheckpointError:
    parts = []
    if other:
        key = other[0]
        have, want = tuple(checkpoint.state[key].shape), tuple(expected[key])
        parts.append(f"{key} is {have} where {want} is expected{_more(other)}")
    if missing:
        parts.append(f"{missing[0]} is missing{_more(missing)}")
    if unexpected:
        parts.append(f"{unexpected[0]} has no place{_more(unexpected)}")
    row = identify_model(checkpoint.state)
    if row is not None and row.name != name:
        hint = f"these are weights of {row.name}: use --model {row.name}"
    elif "pos_embed_win" in unexpected:
        hint = "it has an absolute-window position embedding: name the file itself as the model"
    elif any(n.startswith(("pos_embed", "decoder_pos_embed")) for n in other):
        hint = "it was made for another input size: build the model with that input_size"
    else:
        hint = "give the model it was made for"
    return CheckpointError(f"{checkpoint.source} does not fit {name}: {'; '.join(parts)}", hint)


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _report(name: str, dropped: list[str], missing: list[str]) -> None:
    if dropped:
        log.warning("%s: %s not used", name, _groups(dropped))
    if missing:
        log.warning("%s: %s newly initialised (not in the checkpoint)", name, _groups(missing))


def _groups(names: list[str]) -> str:
    """`decoder_blocks.0.norm1.weight, ...` -> `decoder_blocks (96), ...`"""
    heads = [n.split(".")[0] for n in names]
    return ", ".join(f"{h} ({heads.count(h)})" for h in dict.fromkeys(heads))
