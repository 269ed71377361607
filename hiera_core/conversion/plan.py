"""What is to be written: a source's tensors, as the model that DEST will hold has them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data.transforms import ImageTransform, VideoTransform, transform_for
from ..device import DTYPES, dtype_name
from ..errors import CheckpointError
from ..models import factory, pretrained
from ..models.config import HieraConfig
from ..models.hiera import Hiera, HieraEncoder
from ..models.mae import MaskedAutoencoderHiera
from ..models.pos_embed import ResampleRule
from ..weights import download, files, load
from .formats import full_size

log = logging.getLogger("hiera")


@dataclass
class ConversionPlan:
    """Everything the writers need, from the source. Tensors are memory-mapped where they keep
    their values."""

    checkpoint: load.Checkpoint  # the source as it was read
    model: HieraEncoder  # what is written, on the meta device
    state: dict[str, torch.Tensor]  # its parameters in the reference's names
    card: dict[str, Any]  # hiera.json: model, classes, preprocessing, source, licence
    dtype: str  # fp32, bf16, fp16: of most parameters
    changed: list[str] = field(default_factory=list)  # in which way values differ from the source's
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        return self.model.config

    @property
    def size(self) -> tuple[int, ...]:
        """Input size in pixels, (frames,) y, x."""
        return tuple(self.config["input_size"])

    @property
    def name(self) -> str:
        return str(self.card.get("model") or type(self.model).__name__)

    @property
    def is_autoencoder(self) -> bool:
        return isinstance(self.model, MaskedAutoencoderHiera)

    @property
    def num_classes(self) -> int:
        return 0 if self.is_autoencoder else int(self.config["num_classes"])

    @property
    def class_names(self) -> list[str] | None:
        return None if self.is_autoencoder else factory.class_names_of(self.model)

    @property
    def transform(self) -> ImageTransform | VideoTransform:
        """Preprocessing of the model that is written."""
        return transform_for(self.model)

    def add_note(self, note: str) -> None:
        """A line about what was dropped or changed on the way."""
        self.notes.append(note)
        log.warning("%s", note)

    def build(self) -> HieraEncoder:
        """The model with its weights, in float32, for comparison and export."""
        with torch.device("meta"):
            built = type(self.model)(**self.arguments)
        built.load_state_dict(self.state, strict=True, assign=True)
        return built.to(torch.float32).eval()

    @property
    def arguments(self) -> dict[str, Any]:
        """Constructor arguments."""
        return dict(vars(self.model._config))


def make_plan(
    checkpoint: load.Checkpoint,
    *,
    size: Sequence[int] | None = None,
    dtype: str = "auto",
    resample: ResampleRule = "absolute-window",
) -> ConversionPlan:
    """Fit a checkpoint to the model it was saved from, at the size and precision asked for.

    Raises:
        CheckpointError: it fits no model, or does not survive the precision.
        UsageError: no such input size, with the nearest legal ones.
    """
    arguments = pretrained.architecture(checkpoint)
    cls = MaskedAutoencoderHiera if checkpoint.is_autoencoder else Hiera
    if not checkpoint.is_autoencoder and not checkpoint.num_classes:
        arguments = {**arguments, "num_classes": 0}
    own = tuple(arguments.get("input_size", cls.config_class.input_size))
    wanted = own if size is None else full_size(tuple(size), len(own))
    overrides = {} if wanted == own else {"input_size": wanted}
    model, found, _ = pretrained.match(
        cls, arguments, checkpoint, overrides=overrides, resample=resample
    )
    state = {name: found.state[name] for name in model.state_dict()}
    model.card = _card(checkpoint)
    plan = ConversionPlan(checkpoint, model, state, model.card, _precision(state))
    if overrides and not model._config.abs_win_pos_embed:
        rule = "absolute-window rule" if resample == "absolute-window" else "plain bicubic"
        plan.changed.append("size")
        plan.notes.append(
            f"position embedding resampled from {_times(own)} to {_times(wanted)} ({rule})"
        )
    if dtype != "auto" and any(tensor.dtype != DTYPES[dtype] for tensor in state.values()):
        _cast(plan, dtype)
    return plan


def transformers_class(plan: ConversionPlan) -> str:
    """The class of transformers that a plan's model is."""
    if plan.is_autoencoder:
        return "HieraForPreTraining"
    return "HieraForImageClassification" if plan.num_classes else "HieraModel"


def adapt_to_format(plan: ConversionPlan, name: str) -> None:
    """Bring a plan to what a format can hold, with a line about each change."""
    if plan.is_autoencoder and name == "timm":
        dropped = drop_decoder(plan)
        plan.add_note(f"timm has no autoencoder: the decoder is dropped ({dropped} tensors)")
    if plan.config.get("abs_win_pos_embed") and name != "timm":
        _fold_positions(plan)


def drop_decoder(plan: ConversionPlan) -> int:
    """An autoencoder as its encoder, normalised and pooled, without a classifier. -> tensors lost

    It pools once more, as the classifiers that are fine-tuned from it do.
    """
    known = {field.name for field in dataclasses.fields(HieraConfig)}
    arguments = {name: value for name, value in plan.arguments.items() if name in known}
    arguments |= {"num_classes": 0, "q_pool": len(plan.config["stages"]) - 1}
    with torch.device("meta"):
        model = Hiera(**arguments)
    state = {name.replace("encoder_norm.", "norm."): t for name, t in plan.state.items()}
    plan.model, plan.model.card = model, plan.card
    plan.state = {name: state[name] for name in model.state_dict()}
    return len(state) - len(plan.state)


def _fold_positions(plan: ConversionPlan) -> None:
    """An absolute-window model as a plain one of its size, for formats that know no other."""
    arguments = {**plan.arguments, "abs_win_pos_embed": False}
    composed = plan.build().get_pos_embed().detach()
    with torch.device("meta"):
        plan.model = type(plan.model)(**arguments)
    plan.model.card = plan.card
    state = {n: t for n, t in plan.state.items() if n != "pos_embed_win"}
    state["pos_embed"] = composed.to(plan.state["pos_embed"].dtype)
    plan.state = {name: state[name] for name in plan.model.state_dict()}
    plan.changed.append("positions")
    plan.add_note(
        f"absolute-window position embedding written as a plain one of {_times(plan.size)} pixels"
    )


def _cast(plan: ConversionPlan, dtype: str) -> None:
    plan.state = {name: tensor.to(DTYPES[dtype]) for name, tensor in plan.state.items()}
    try:
        files.check_weights(plan.state, plan.checkpoint.source)
    except CheckpointError as error:
        raise CheckpointError(
            f"{plan.checkpoint.source}: weights beyond the range of {dtype}", "use bf16 or fp32"
        ) from error
    if dtype != "fp32" or plan.dtype == "float64":  # fp32 holds every 16-bit number as it is
        plan.changed.append("dtype")
    plan.dtype = dtype


def _card(checkpoint: load.Checkpoint) -> dict[str, Any]:
    row, source = load.identify_model(checkpoint.state), checkpoint.source
    if Path(source).exists():  # where it lies here is nobody's business there
        source = Path(source).name
    if row is None:
        return {"source": source, **checkpoint.card}
    known = factory.card_of(row, source)
    if checkpoint.source.startswith(download.RELEASED_BY):
        known["licence"] = row.licence
    return {**known, **checkpoint.card}


def _precision(state: dict[str, torch.Tensor]) -> str:
    counts: dict[torch.dtype, int] = {}
    for tensor in state.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    most = max(counts, key=lambda kind: counts[kind])
    return dtype_name(most)


def _times(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
