"""Load a checkpoint from a file, folder, URL or hub repository, check it, and fit it to a model."""

from __future__ import annotations

import logging
import re
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import zoo
from ..errors import CheckpointError, HubError, UsageError, did_you_mean
from ..places.remote_requests import is_remote, is_web, path_of_file_url
from ..plain_data import valid_text
from . import download, files, foreign_config, key_mapping, local_files, names, remote_weights
from .cache_repair import read_cached
from .integrity import check_weights_file
from .local_files import find_local
from .shapes import adapt_channels, check_shapes

log = logging.getLogger("hiera")

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A whole repository of models; a file or folder within one is read as at other remote places.
HUB_URL = re.compile(r"hf://(?!datasets/|spaces/|buckets/)([\w.-]+/[\w.-]+)(?:@([^/@]+))?/?")
HEAD = ("head.projection.weight", "head.projection.bias")
PATCH_WEIGHT = "patch_embed.proj.weight"
NORM = ("norm.weight", "norm.bias")
BLOCK_OUTPUT = re.compile(r"blocks\.\d{1,4}\.mlp\.fc2\.bias")
WIDENING = re.compile(r"blocks\.\d{1,4}\.proj\.weight")


@dataclass
class Checkpoint:
    """Weights as they were read.

    Args:
        source: The name, path or URL that the user gave.
        state: Tensors by name, in the reference's naming.
        naming: The naming that the file uses.
        config: Constructor arguments of the model, if config.json or the file holds them.
        card: Content of hiera.json: classes, preprocessing, provenance.
    """

    source: str
    state: dict[str, torch.Tensor]
    naming: key_mapping.Naming
    config: dict[str, Any] | None = None
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int | None:
        """Number of outputs of the head, or None without a head."""
        head = self.state.get(HEAD[0])
        return None if head is None else head.shape[0]

    @property
    def is_autoencoder(self) -> bool:
        return "decoder_pos_embed" in self.state

    @property
    def family(self) -> zoo.Family:
        return "hieradet" if key_mapping.SAM2_EMBEDDING in self.state else "hiera"

    @property
    def is_headless(self) -> bool:
        """Whether these are the weights of a Hiera's encoder alone, without head and decoder."""
        is_hiera = self.family == "hiera"
        return is_hiera and self.num_classes is None and not self.is_autoencoder


def read_weights(name: str | Path, *, public_only: bool = False, **options: Any) -> Checkpoint:
    """Read the weights that a name stands for: a model in the zoo, with or without its tag, or a
    location (see names.py for the rule).

    Args:
        name: The name. A `Path` is always a location.
        public_only: See `read_checkpoint`.
        options: For hub repositories, see `download.from_hub`.

    Raises:
        UsageError: The name is neither.
        CheckpointError, HubError, OutputError: See `read_checkpoint`.
    """
    entry = names.find_entry(name)
    if entry is None:
        return read_checkpoint(name, public_only=public_only, **options)
    if names.exists(name):
        log.warning("%s is the model in the zoo; for the file or folder, write ./%s", name, name)
    return read_released(entry, zoo.split_tag(str(name))[1], **options)


def describe_as(checkpoint: Checkpoint, name: str | Path) -> Checkpoint:
    """Return a checkpoint with what it does not say about itself: the architecture, preprocessing
    and class names of the model at a location.

    Args:
        checkpoint: The weights.
        name: The location; see names.py. The weights there are not used.

    Raises:
        CheckpointError, HubError, OutputError: See `read_checkpoint`.
    """
    found = local_files.find_description(Path(path_of_file_url(str(name)) or name))
    if found is None:
        other = read_weights(name)
        config, card = other.config, other.card
    else:
        config, card = _describe(found, {}, str(name))
    return replace(checkpoint, config=checkpoint.config or config, card={**card, **checkpoint.card})


def read_checkpoint(source: str | Path, *, public_only: bool = False, **options: Any) -> Checkpoint:
    """Read a checkpoint of the reference, timm, transformers or this toolkit.

    Args:
        source: A file, a folder with model.safetensors (and config.json), an http(s) or file://
            URL, a file or folder at a remote place (`s3://...`), or a hub repository, `owner/name`
            or `hf://owner/name@revision`. In place of a file, an index of several
            (`model.safetensors.index.json`).
        public_only: Refuse servers of http(s) URLs that are in private networks.
        options: For hub repositories, see `download.from_hub`.

    Raises:
        UsageError: The source is "", or not a valid URL.
        CheckpointError: The file does not exist, is damaged or unsafe, is not a Hiera checkpoint,
            or holds NaN or infinite weights.
        HubError: It cannot be downloaded.
        OutputError: The cache cannot be written.
    """
    names.check_not_empty(source)
    text = str(source)
    if (local := find_local(Path(path_of_file_url(text) or text))) is not None:
        return _load(local, text)
    if is_web(text) or is_remote(text):
        _check_whole(text)
    if is_web(text):
        return _load_cached(
            lambda: download.from_urls(text, check_weights_file, public_only=public_only),
            text,
            {},
        )
    if found := HUB_URL.fullmatch(text):
        revision = {"revision": urllib.parse.unquote(found[2])} if found[2] else {}
        return _load_from_hub(found[1], text, {**options, **revision})
    if is_remote(text):
        return _load_cached(lambda: _copy_remote(text), text, {})
    is_file_name = text.startswith(".") or text.endswith(names.FILE_ENDINGS)
    if HUB_ID.fullmatch(text) and not is_file_name:
        return _load_from_hub(text, text, options)
    raise CheckpointError(
        f"no file, folder or hub repository {text!r}", "check the path, or see `hiera models`"
    )


def _check_whole(url: str) -> None:
    """Check that a URL does not name one of the files over which weights are spread.

    Raises:
        CheckpointError: It does.
    """
    folder, _, name = url.partition("?")[0].rpartition("/")
    if names.PART.fullmatch(name):
        whole = re.sub(r"-\d{5}-of-\d{5}", "", name)  # model-00001-of-00002.bin -> model.bin
        index = f"{whole}{names.INDEX_ENDING}"
        raise CheckpointError(
            f"{url} is one of several files with the weights", f"name the index: {folder}/{index}"
        )


def _copy_remote(url: str) -> download.FetchedFiles:
    found = find_local(remote_weights.copy_checkpoint(url))
    assert found is not None
    return found


def _load_from_hub(repo: str, source: str, options: dict[str, Any]) -> Checkpoint:
    try:
        return _load_cached(lambda: download.from_hub(repo, **options), source, options)
    except HubError as error:
        owner, _, name = repo.partition("/")
        if name and Path(owner).is_dir():  # more likely a path with a typing error
            error.hint = f"if you mean a path: the folder {owner!r} has no {name!r}; {error.hint}"
        raise


def read_released(entry: zoo.ModelEntry, tag: str | None = None, **options: Any) -> Checkpoint:
    """Read a checkpoint from the zoo.

    It is looked for in the package, the hub's cache and torch.hub's cache, and then downloaded from
    the hub, or, if that fails, as a .pth file.

    Args:
        entry: The model.
        tag: Which of its checkpoints; None for the default.
        options: For hub repositories, see `download.from_hub`.

    Raises:
        UsageError: The model has no such checkpoint.
        HubError: It cannot be downloaded.
        OutputError: The cache cannot be written.
    """
    if not entry.checkpoints:
        raise UsageError(
            f"no weights of {entry.name} have been released",
            "give your own with --checkpoint, or use --random-init",
        )
    tag = tag or str(entry.default)
    if tag not in entry.checkpoints:
        hint = did_you_mean(tag, entry.checkpoints) or f"it has {', '.join(entry.checkpoints)}"
        raise UsageError(f"{entry.name} has no checkpoint {tag!r}", hint)
    found, source = entry.checkpoints[tag], f"{entry.name}.{tag}"
    if found.bundled_path is not None:
        return _load(download.FetchedFiles(found.bundled_path), source)
    return _load_cached(lambda: _fetch_released(found, options), source, options)


def identify_model(state: Mapping[str, torch.Tensor]) -> zoo.ModelEntry | None:
    """Return the model in the zoo whose weights have these shapes, or None."""
    if PATCH_WEIGHT not in state:
        return None
    pattern = re.compile(r"blocks\.(\d{1,4})\.attn\.proj\.bias")
    matches = ((pattern.fullmatch(name), t) for name, t in state.items())
    dims = [t.shape[0] for _, t in sorted((int(m[1]), t) for m, t in matches if m)]
    kernel = tuple(state[PATCH_WEIGHT].shape[2:])
    traits = traits_of(state)
    fitting = [
        entry
        for entry in zoo.models().values()
        if zoo.block_dims(entry.config) == dims
        and entry.autoencoder == ("decoder_pos_embed" in state)
        and entry.config.get("patch_kernel", (7, 7)) == kernel
    ]
    exact = [entry for entry in fitting if traits == _expected_traits(entry)]
    # A Hiera of this size that differs in a trait is the next best. A HieraDet is not, because its
    # shapes do not show its windows.
    similar = [] if traits["hieradet"] else [e for e in fitting if e.family == "hiera"]
    return next(iter(exact + similar), None)


def traits_of(state: Mapping[str, torch.Tensor]) -> dict[str, bool]:
    """Return what the names of a Hiera's parameters show about its architecture."""
    return {
        "abs_win_pos_embed": "pos_embed_win" in state,
        "layer_scale": any(name.endswith(".ls1.gamma") for name in state),
        "use_expand_proj": any(WIDENING.fullmatch(name) for name in state),
        "hieradet": key_mapping.SAM2_EMBEDDING in state,
    }


def _expected_traits(entry: zoo.ModelEntry) -> dict[str, bool]:
    config = entry.config
    return {
        "abs_win_pos_embed": bool(config.get("abs_win_pos_embed")),
        "layer_scale": config.get("init_values") is not None,
        "use_expand_proj": bool(config.get("use_expand_proj", True)),
        "hieradet": entry.family == "hieradet",
    }


@dataclass
class Fit:
    """A checkpoint matched with the parameters of a model."""

    state: dict[str, torch.Tensor]  # tensors for the model
    dropped: list[str]  # names in the checkpoint that the model does not use
    missing: list[str]  # names in the model that the checkpoint lacks


def fit(
    checkpoint: Checkpoint, expected: Mapping[str, torch.Size], *, name: str, strict: bool = True
) -> Fit:
    """Match a checkpoint with the parameters of a model.

    An autoencoder's checkpoint fits a classifier: its decoder is dropped, and norm and head stay
    newly initialised, as in the reference. A head for another number of classes is dropped. Both
    are logged. A patch embedding for another number of channels is adapted as in timm.

    Args:
        checkpoint: The weights.
        expected: Shapes of the model's parameters.
        name: Name of the model, for messages.
        strict: Whether all other parameters must be in both. Shapes must always agree.

    Raises:
        CheckpointError: The checkpoint does not fit. The message names the first parameters that
            differ; the hint names the model that would fit.
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
        state[PATCH_WEIGHT] = adapt_channels(state[PATCH_WEIGHT], expected[PATCH_WEIGHT][1])

    missing = [n for n in expected if n not in state]
    unexpected = [n for n in state if n not in expected]
    misshapen = [n for n in state if n in expected and state[n].shape != expected[n]]
    if misshapen or (strict and (unexpected or set(missing) - set(may_miss))):
        raise _misfit(checkpoint, expected, name, misshapen, missing, unexpected)
    _log_differences(name, dropped + unexpected, missing)
    kept = {n: t for n, t in state.items() if n in expected}
    return Fit(kept, dropped + unexpected, missing)


def _fetch_released(entry: zoo.CheckpointEntry, options: dict[str, Any]) -> download.FetchedFiles:
    """Return the local files of a checkpoint in the zoo; see `read_released`."""
    url = download.url_of(entry.file)
    try:
        return download.from_hub(entry.hub, **{**options, "cached_only": True})
    except HubError:
        if not entry.file:
            return download.from_hub(entry.hub, **options)
        if path := download.cached_url(url, entry.sha256):
            return download.FetchedFiles(path)
    try:
        return download.from_hub(entry.hub, **options)
    except HubError as error:
        if _is_offline(options):
            raise
        log.debug("%s; trying %s", error.message, url)
        try:
            return download.from_url(url, entry.sha256, check_weights_file)
        except HubError as second:
            raise HubError(f"{error.message}; {second.message}", download.HINTS) from second


def _load_cached(
    fetch: Callable[[], download.FetchedFiles], source: str, options: Mapping[str, Any]
) -> Checkpoint:
    """Read a checkpoint that lies in a cache, or is downloaded now; see `read_cached`."""
    return read_cached(fetch, lambda found: _load(found, source), source, _is_offline(options))


def _is_offline(options: Mapping[str, Any]) -> bool:
    return download.is_offline() or bool(options.get("local_files_only"))


def _load(fetched: download.FetchedFiles, source: str) -> Checkpoint:
    """Read the files of a checkpoint, and check its weights."""
    raw, extras = local_files.read(fetched.weights, fetched.parts)
    state, naming = key_mapping.to_reference(raw)
    map_norms = key_mapping.TRANSFORMERS_MAP_NORMS
    if any(map_norms in name for name in raw):
        log.warning("%s: %s* not used; maps are those before these norms", source, map_norms)
    check_shapes(state, source)
    files.check_weights(state, source)
    try:
        config, card = valid_text(_describe(fetched, extras, source))
    except RecursionError as error:
        raise CheckpointError(f"{source}: its card is nested too deeply", "fix it") from error
    return _with_norm(Checkpoint(source, state, naming, config, card))


def _with_norm(checkpoint: Checkpoint) -> Checkpoint:
    """Return an encoder's checkpoint with a final norm. Backbones have none, because it serves the
    pooled output alone, which is then normalised without scale and shift."""
    state = checkpoint.state
    last = max((n for n in state if BLOCK_OUTPUT.fullmatch(n)), key=_block_number, default=None)
    if not checkpoint.is_headless or last is None or any(name in state for name in NORM):
        return checkpoint
    log.warning(
        "%s has no final norm: embeddings get one without scale and shift. Unless it is a "
        "backbone, a part of its weights is missing",
        checkpoint.source,
    )
    width, dtype = state[last].shape, state[last].dtype
    values = torch.ones(width, dtype=dtype), torch.zeros(width, dtype=dtype)
    return replace(checkpoint, state={**state, **dict(zip(NORM, values, strict=True))})


def _block_number(name: str) -> int:
    """`blocks.7.mlp.fc2.bias` -> 7"""
    return int(name.split(".")[1])


def _describe(
    fetched: download.FetchedFiles, extras: Mapping[str, Any], source: str
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the constructor arguments and the card of a checkpoint.

    What this toolkit wrote comes first: extras in the file, hiera.json, and a config.json with
    constructor arguments. Then comes what other libraries say in their files.
    """
    config = files.read_json(fetched.config) if fetched.config else None
    card = {**extras.get("card", {}), **(files.read_json(fetched.card) if fetched.card else {})}
    _check_card(card, source)
    own = config if config is not None and "stages" in config else None  # constructor arguments
    if own is not None or extras or config is None:
        return own or extras.get("config"), card
    processor = files.read_json(fetched.processor) if fetched.processor else None
    arguments, facts = foreign_config.read_config(config, processor, source)
    return arguments, {**facts, **card}


def _check_card(card: Mapping[str, Any], source: str) -> None:
    """Check the parts of a card that are looked into.

    Raises:
        CheckpointError: The preprocessing is no dictionary, or the classes are no list of names.
    """
    classes = card.get("classes")
    is_names = isinstance(classes, list | tuple) and all(isinstance(c, str) for c in classes)
    if not isinstance(card.get("preprocessing"), dict | None):
        raise CheckpointError(f"{source}: preprocessing in its card is no dictionary", "fix it")
    if classes is not None and not is_names:
        raise CheckpointError(f"{source}: classes in its card is no list of names", "fix it")


def _misfit(
    checkpoint: Checkpoint,
    expected: Mapping[str, torch.Size],
    name: str,
    misshapen: list[str],
    missing: list[str],
    unexpected: list[str],
) -> CheckpointError:
    """Return the error for a checkpoint that does not fit the model `name`."""
    reasons = []
    if misshapen:
        key = misshapen[0]
        shape, expected_shape = tuple(checkpoint.state[key].shape), tuple(expected[key])
        reasons.append(f"{key} is {shape} where {expected_shape} is expected{_more(misshapen)}")
    if missing:
        reasons.append(f"{missing[0]} is missing{_more(missing)}")
    if unexpected:
        reasons.append(f"{unexpected[0]} is not a parameter of the model{_more(unexpected)}")
    entry = identify_model(checkpoint.state)
    if entry is not None and entry.name != name:
        hint = f"these are weights of {entry.name}: use --model {entry.name}"
    elif "pos_embed_win" in unexpected:
        hint = "it has an absolute-window position embedding: name the file itself as the model"
    elif any(n.startswith(("pos_embed", "decoder_pos_embed")) for n in misshapen):
        hint = "it was made for another input size: build the model with that input_size"
    else:
        hint = "use the model that it was made for"
    return CheckpointError(f"{checkpoint.source} does not fit {name}: {'; '.join(reasons)}", hint)


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _log_differences(name: str, dropped: list[str], missing: list[str]) -> None:
    if dropped:
        log.warning("%s: %s not used", name, _summary(dropped))
    if missing:
        log.warning("%s: %s newly initialised (not in the checkpoint)", name, _summary(missing))


def _summary(names: list[str]) -> str:
    """`decoder_blocks.0.norm1.weight, ...` -> `decoder_blocks (96), ...`"""
    modules = [n.split(".")[0] for n in names]
    return ", ".join(f"{m} ({modules.count(m)})" for m in dict.fromkeys(modules))
