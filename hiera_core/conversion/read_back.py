"""Each format, loaded again by its own library where that is installed, else by this package."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, first_line
from ..models import factory
from ..models.masking import MASK_RATIOS, visible_count
from ..weights.load import read_checkpoint
from .formats import FORMATS, WEIGHTS_NAME
from .plan import ConversionPlan, transformers_class

log = logging.getLogger("hiera")

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class LoadedModel:
    """A loaded model: `run` takes a batch to logits [b, classes], or to an autoencoder's losses
    [b, 1] with the masks of `noise_for`."""

    name: str  # library and version
    run: Forward
    computes_as_stored: bool = False  # in the file's precision, where libraries compute in float32


def wrap_model(model: Any, autoencoder: bool) -> LoadedModel:
    """A model of this package."""
    model = model.eval()
    return LoadedModel("hiera-toolkit", _losses(model) if autoencoder else model.forward_logits)


def read_back(plan: ConversionPlan, name: str, path: Path) -> LoadedModel:
    """The written file as its library sees it.

    Raises:
        CheckpointError: the library refuses it.
    """
    package, distribution, load = READERS[name]
    if importlib.util.find_spec(package) is None:
        log.warning("%s is not installed: the file is read back by this package", distribution)
        return wrap_model(factory.from_checkpoint(read_checkpoint(path)), plan.is_autoencoder)
    try:
        with _quiet():
            run = load(plan, path)
    except Exception as error:  # libraries raise many types
        reason = first_line(error)
        raise CheckpointError(
            f"{distribution} cannot load the written file ({reason}); it was removed",
            "report this, with the command",
        ) from error
    library = f"{distribution} {_version(distribution)}".rstrip()
    return LoadedModel(library, run, computes_as_stored=FORMATS[name].dialect is None)


def noise_for(windows: int) -> torch.Tensor:
    """[1, windows]: units with the least noise stay visible, the same at every call."""
    return torch.rand(1, windows, generator=torch.Generator().manual_seed(0))


def _losses(model: Any) -> Forward:
    """Of an autoencoder of ours or the reference's, which are called alike."""
    noise = noise_for(math.prod(model.mask_spatial_shape))
    kept = visible_count(noise.shape[1], MASK_RATIOS["image"])
    mask = torch.zeros_like(noise, dtype=torch.bool)
    mask[0, noise.argsort(1)[0, :kept]] = True
    return lambda x: torch.stack([model(one[None], mask=mask)[0] for one in x]).view(-1, 1)


def _reference(plan: ConversionPlan, path: Path) -> Forward:
    import hiera
    from hiera.hiera_mae import MaskedAutoencoderHiera

    cls = MaskedAutoencoderHiera if plan.is_autoencoder else hiera.Hiera
    model = cls.from_pretrained(path) if path.is_dir() else cls(**plan.config)
    if not (plan.is_autoencoder or plan.num_classes):
        model.head = torch.nn.Identity()  # it would make a classifier of no classes
    if path.is_file():
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        model.load_state_dict(content["model_state"], strict=True)
    model = model.float().eval()
    if plan.is_autoencoder:
        return _losses(model)
    if plan.num_classes:
        model.head.act_func = torch.nn.Identity()  # it gives probabilities in evaluation
    return model


def _timm(plan: ConversionPlan, path: Path) -> Forward:
    import timm

    config = json.loads((path / "config.json").read_text())
    model = timm.create_model(
        config["architecture"],
        checkpoint_path=path / WEIGHTS_NAME,
        num_classes=config["num_classes"],
        **config["model_args"],
    )
    return model.float().eval()


def _transformers(plan: ConversionPlan, path: Path) -> Forward:
    import transformers

    cls = getattr(transformers, transformers_class(plan))
    model = cls.from_pretrained(path, dtype=torch.float32).eval()
    if not plan.is_autoencoder:
        output = "logits" if plan.num_classes else "pooler_output"
        return lambda x: getattr(model(x), output)
    noise = noise_for(plan.model.layout.windows)
    return lambda x: torch.stack([model(one[None], noise=noise).loss for one in x]).view(-1, 1)


def _onnxruntime(plan: ConversionPlan, path: Path) -> Forward:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # errors
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def _exported(plan: ConversionPlan, path: Path) -> Forward:
    program = torch.export.load(path).module()
    return lambda x: program(x)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Other libraries talk while they load, on both streams."""
    nowhere = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        yield


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


# By format: the package that reads it, what it is called, how.
READERS: dict[str, tuple[str, str, Callable[[ConversionPlan, Path], Any]]] = {
    "hub": ("hiera", "hiera-transformer", _reference),
    "pth": ("hiera", "hiera-transformer", _reference),
    "timm": ("timm", "timm", _timm),
    "transformers": ("transformers", "transformers", _transformers),
    "onnx": ("onnxruntime", "onnxruntime", _onnxruntime),
    "pt2": ("torch", "torch", _exported),
}
