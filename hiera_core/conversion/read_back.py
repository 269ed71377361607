"""Load a written file again, with the library of its format, or with this package instead."""

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
from ..models.hiera import HieraEncoder
from ..models.masking import MASK_RATIOS, visible_count
from ..weights.load import read_checkpoint
from .formats import FORMATS, WEIGHTS_NAME
from .plan import ConversionPlan, transformers_class
from .program import Program, draw_keep, input_names, takes_units, tensor_names

log = logging.getLogger("hiera")

Forward = Callable[[torch.Tensor], torch.Tensor | dict[str, torch.Tensor]]


@dataclass
class LoadedModel:
    """A model that a library has loaded.

    Args:
        name: Library and version.
        run: Function from a batch to logits or embeddings [b, c], or to the losses [b, 1] of an
            autoencoder, masked according to `noise_for`. That of a program returns what the program
            does; several outputs are a dictionary.
        computes_as_stored: Whether `run` computes in the precision of the file instead of float32.
    """

    name: str
    run: Forward
    computes_as_stored: bool = False


def wrap_model(model: Any, autoencoder: bool) -> LoadedModel:
    """Wrap a model of this package."""
    model = model.eval()
    if model.family == "hieradet":
        return LoadedModel("hiera-toolkit", lambda x: model.embedding(model(x)))
    return LoadedModel("hiera-toolkit", _losses(model) if autoencoder else model.forward_logits)


def wrap_program(plan: ConversionPlan) -> LoadedModel:
    """Wrap the program of a plan before its export, computed by this package in float32."""
    program = Program(plan.build(), plan.outputs, torch.float32).eval()
    return LoadedModel("hiera-toolkit", lambda x: program(*program_inputs(plan, x)))


def program_inputs(plan: ConversionPlan, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the inputs of a program for a batch of images or clips."""
    return [x, draw_keep(plan, len(x))] if takes_units(plan) else [x]


def read_back(plan: ConversionPlan, name: str, path: Path) -> LoadedModel:
    """Load a written file with the library of its format.

    Args:
        plan: The model that was written.
        name: Name of the format, a key of `READERS`.
        path: File or folder.

    Raises:
        CheckpointError: The library cannot load it.
    """
    if plan.is_sam2 and name in ("hub", "sam2"):  # no library on PyPI reads the encoder alone
        return wrap_model(factory.from_checkpoint(read_checkpoint(path)), autoencoder=False)
    module, distribution, load = READERS[name]
    if importlib.util.find_spec(module) is None:
        log.warning("%s is not installed: the file is read back with this package", distribution)
        return wrap_model(factory.from_checkpoint(read_checkpoint(path)), plan.is_autoencoder)
    try:
        with _hide_output():
            run = load(plan, path)
    except Exception as error:  # libraries raise errors of many types
        reason = first_line(error)
        raise CheckpointError(
            f"{distribution} cannot load the written file ({reason}); it was removed",
            "report this, and include the command",
        ) from error
    library = f"{distribution} {_version(distribution)}".rstrip()
    return LoadedModel(library, run, computes_as_stored=FORMATS[name].naming is None)


def named(
    plan: ConversionPlan, found: torch.Tensor | dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the output of a model by name. A single tensor gets the name of the only output."""
    if isinstance(found, dict):
        return found
    return {(tensor_names(plan) or [""])[0]: found}


def noise_for(windows: int) -> torch.Tensor:
    """Return the noise that selects visible mask units, the same at every call. -> [1, windows]

    Units with the smallest noise stay visible.
    """
    return torch.rand(1, windows, generator=torch.Generator().manual_seed(0))


def _losses(model: Any) -> Forward:
    """Return a function for the losses of an autoencoder, which may be ours or the reference's."""
    noise = noise_for(math.prod(model.mask_spatial_shape))
    visible = visible_count(noise.shape[1], MASK_RATIOS["image"])
    mask = torch.zeros_like(noise, dtype=torch.bool)
    mask[0, noise.argsort(1)[0, :visible]] = True
    return lambda x: torch.stack([model(one[None], mask=mask)[0] for one in x]).view(-1, 1)


def _load_reference(plan: ConversionPlan, path: Path) -> Forward:
    import hiera
    from hiera.hiera_mae import MaskedAutoencoderHiera

    cls = MaskedAutoencoderHiera if plan.is_autoencoder else hiera.Hiera
    model = cls.from_pretrained(path) if path.is_dir() else cls(**plan.config)
    if not (plan.is_autoencoder or plan.num_classes):
        model.head = torch.nn.Identity()  # the reference builds a layer with 0 outputs
    if path.is_file():
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        model.load_state_dict(content["model_state"], strict=True)
    model = model.float().eval()
    if plan.is_autoencoder:
        return _losses(model)
    if plan.num_classes:
        model.head.act_func = torch.nn.Identity()  # otherwise it returns probabilities
    return model


def _load_timm(plan: ConversionPlan, path: Path) -> Forward:
    import timm

    config = json.loads((path / "config.json").read_text())
    model: Any = timm.create_model(
        config["architecture"],
        checkpoint_path=path / WEIGHTS_NAME,
        num_classes=config["num_classes"],
        **config["model_args"],
    )
    model = model.float().eval()
    return (lambda x: model.forward_features(x).mean((1, 2))) if plan.is_sam2 else model


def _load_transformers(plan: ConversionPlan, path: Path) -> Forward:
    import transformers

    cls = getattr(transformers, transformers_class(plan))
    model = cls.from_pretrained(path, dtype=torch.float32).eval()
    if plan.is_sam2:
        return lambda x: model(x).last_hidden_state.mean((1, 2))
    if not plan.is_autoencoder:
        output = "logits" if plan.num_classes else "pooler_output"
        return lambda x: getattr(model(x), output)
    assert isinstance(plan.model, HieraEncoder)
    noise = noise_for(plan.model.layout.windows)
    return lambda x: torch.stack([model(one[None], noise=noise).loss for one in x]).view(-1, 1)


def _load_onnx(plan: ConversionPlan, path: Path) -> Forward:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # errors only
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = tensor_names(plan)

    def run(x: torch.Tensor) -> dict[str, torch.Tensor]:
        given = zip(input_names(plan), program_inputs(plan, x), strict=True)
        found = session.run(names, {name: tensor.numpy() for name, tensor in given})
        return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}

    return run


def _load_pt2(plan: ConversionPlan, path: Path) -> Forward:
    program = torch.export.load(path).module()
    return lambda x: program(*program_inputs(plan, x))


def _load_aoti(plan: ConversionPlan, path: Path) -> Forward:
    program = torch._inductor.aoti_load_package(str(path))
    size = plan.batch_size or 1

    def run(x: torch.Tensor) -> dict[str, torch.Tensor]:
        full = torch.cat([x, x[-1:].expand(size - len(x), *x.shape[1:])])
        found = named(plan, program(*program_inputs(plan, full)))
        return {name: tensor[: len(x)] for name, tensor in found.items()}

    return run


@contextlib.contextmanager
def _hide_output() -> Iterator[None]:
    """Hide warnings, and what libraries print to stdout and stderr while they load."""
    discarded = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(discarded),
        contextlib.redirect_stderr(discarded),
    ):
        warnings.simplefilter("ignore")
        yield


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


# Format: module to import, name of the distribution, function that loads the file.
READERS: dict[str, tuple[str, str, Callable[[ConversionPlan, Path], Any]]] = {
    "hub": ("hiera", "hiera-transformer", _load_reference),
    "pth": ("hiera", "hiera-transformer", _load_reference),
    "timm": ("timm", "timm", _load_timm),
    "transformers": ("transformers", "transformers", _load_transformers),
    "onnx": ("onnxruntime", "onnxruntime", _load_onnx),
    "pt2": ("torch", "torch", _load_pt2),
    "aoti": ("torch", "torch", _load_aoti),
}
