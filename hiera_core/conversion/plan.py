"""Plan of a conversion: the tensors of a source, fitted to the model that DEST will hold."""

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
from ..models.encoder import Encoder
from ..models.hiera import Hiera, HieraEncoder
from ..models.mae import MaskedAutoencoderHiera
from ..models.pos_embed import ResampleRule
from ..plain_data import valid_text
from ..weights import download, files, load
from ..zoo.input_sizes import full_size

log = logging.getLogger("hiera")

# The layer whose output each layer scale of a block multiplies.
LAYER_SCALED = {"ls1": "attn.proj", "ls2": "mlp.fc2"}


@dataclass
class ConversionPlan:
    """Everything that the writers need. Tensors whose values do not change stay memory-mapped."""

    checkpoint: load.Checkpoint  # the source, as read
    model: Encoder  # the model to write, on the meta device
    state: dict[str, torch.Tensor]  # parameters of the model, in the reference's naming
    card: dict[str, Any]  # hiera.json: model, classes, preprocessing, source, licence
    dtype: str  # dtype of most parameters, such as fp32
    changed: list[str] = field(default_factory=list)  # reasons why values differ from the source
    notes: list[str] = field(default_factory=list)  # for the user: what was changed or dropped
    outputs: tuple[str, ...] = ()  # of a program, see `formats.OUTPUTS`
    batch_size: int | None = None  # of a program that takes batches of one size only

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments of the model, ready for JSON."""
        config: dict[str, Any] = {**self.model.config}
        config.pop("dynamic_size", None)  # other libraries do not have it
        return config

    @property
    def size(self) -> tuple[int, ...]:
        """Input size: (y, x) or (frames, y, x) in pixels, or (samples,)."""
        return tuple(self.config["input_size"])

    @property
    def name(self) -> str:
        return str(self.card.get("model") or type(self.model).__name__)

    @property
    def is_autoencoder(self) -> bool:
        return isinstance(self.model, MaskedAutoencoderHiera)

    @property
    def is_sam2(self) -> bool:
        """Whether the model is SAM 2's image encoder."""
        return self.model.family == "hieradet"

    @property
    def num_classes(self) -> int:
        return 0 if self.is_autoencoder else int(self.config.get("num_classes", 0))

    @property
    def class_names(self) -> list[str] | None:
        return self.model.class_names

    @property
    def transform(self) -> ImageTransform | VideoTransform:
        """Preprocessing of the model to write."""
        return transform_for(self.model)

    def add_note(self, note: str) -> None:
        """Record and log that something is dropped or changed."""
        self.notes.append(note)
        log.warning("%s", note)

    def build(self) -> Encoder:
        """Build the model with its weights, in float32, to compare outputs or to export it."""
        with torch.device("meta"):
            built = type(self.model)(**self.arguments)
        built.load_state_dict(self.state, strict=True, assign=True)
        return built.to(torch.float32).eval()

    @property
    def arguments(self) -> dict[str, Any]:
        """Constructor arguments of the model."""
        return dict(vars(self.model._config))


def make_plan(
    checkpoint: load.Checkpoint,
    *,
    size: Sequence[int] | None = None,
    dtype: str = "auto",
    resample: ResampleRule = "absolute-window",
) -> ConversionPlan:
    """Fit a checkpoint to the model that it was saved from, in the given size and precision.

    Args:
        checkpoint: The source.
        size: Input size, or None for the source's. A single side stands for height and width.
        dtype: `fp32`, `bf16` or `fp16`; or `auto` for the source's precision.
        resample: Rule that resamples position embeddings to another size.

    Raises:
        CheckpointError: The checkpoint fits no model, or a weight is beyond the range of `dtype`.
        UsageError: The input size is not legal; the hint names the nearest legal sizes.
    """
    arguments = pretrained.architecture(checkpoint)
    cls = factory.class_of(checkpoint.family, checkpoint.is_autoencoder)
    if checkpoint.is_headless:
        arguments = {**arguments, "num_classes": 0}
    source_size = tuple(arguments.get("input_size", cls.config_class.input_size))
    new_size = source_size if size is None else full_size(tuple(size), len(source_size))
    overrides = {} if new_size == source_size else {"input_size": new_size}
    model, fit, _ = pretrained.match(
        cls, arguments, checkpoint, overrides=overrides, resample=resample
    )
    state = {name: fit.state[name] for name in model.state_dict()}  # in the model's order
    model.card = _make_card(checkpoint)
    plan = ConversionPlan(checkpoint, model, state, model.card, _main_dtype(state))
    target = model._config
    if overrides and isinstance(target, HieraConfig) and not target.abs_win_pos_embed:
        rule = "absolute-window rule" if resample == "absolute-window" else "plain bicubic"
        plan.changed.append("size")
        plan.notes.append(
            f"position embedding resampled from {_format_size(source_size)} "
            f"to {_format_size(new_size)} ({rule})"
        )
    if dtype != "auto" and any(tensor.dtype != DTYPES[dtype] for tensor in state.values()):
        _cast(plan, dtype)
    return plan


def normalisation(transform: ImageTransform) -> dict[str, Any]:
    """Return how pixels are normalised, as transformers' image processors name it."""
    return {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": transform.mean,
        "image_std": transform.std,
    }


def transformers_class(plan: ConversionPlan) -> str:
    """Return the name of the class in transformers that can hold the model of a plan."""
    if plan.is_sam2:
        return "Sam2HieraDetModel"
    if plan.is_autoencoder:
        return "HieraForPreTraining"
    return "HieraForImageClassification" if plan.num_classes else "HieraModel"


def adapt_to_format(plan: ConversionPlan, name: str) -> None:
    """Change a plan to what a format can hold, and add a note about each change."""
    if plan.is_autoencoder and name == "timm":
        dropped = drop_decoder(plan)
        plan.add_note(f"timm has no autoencoder: the decoder is dropped ({dropped} tensors)")
    if plan.config.get("abs_win_pos_embed") and name != "timm":
        _merge_window_positions(plan)
    is_scaled = plan.config.get("init_values") is not None and not plan.is_sam2
    if is_scaled and name in ("hub", "pth", "transformers"):
        _fold_layer_scale(plan)


def drop_decoder(plan: ConversionPlan) -> int:
    """Replace an autoencoder with its encoder and final norm, without a classifier.

    Unlike the autoencoder, the new model pools queries at every stage transition, as classifiers
    that are fine-tuned from the autoencoder do.

    Returns:
        The number of tensors that are dropped.
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


def _merge_window_positions(plan: ConversionPlan) -> None:
    """Replace an absolute-window position embedding with a plain one for the model's input size.
    Most formats cannot hold the window part."""
    arguments = {**plan.arguments, "abs_win_pos_embed": False}
    built = plan.build()
    assert isinstance(built, HieraEncoder)
    merged = built.get_pos_embed().detach()
    with torch.device("meta"):
        plan.model = type(plan.model)(**arguments)
    plan.model.card = plan.card
    state = {n: t for n, t in plan.state.items() if n != "pos_embed_win"}
    state["pos_embed"] = merged.to(plan.state["pos_embed"].dtype)
    plan.state = {name: state[name] for name in plan.model.state_dict()}
    plan.changed.append("positions")
    plan.add_note(
        "absolute-window position embedding written as a plain one for inputs of "
        f"{_format_size(plan.size)} pixels"
    )


def _fold_layer_scale(plan: ConversionPlan) -> None:
    """Multiply the layer scales into the layers before them, for formats that cannot hold them.

    The products are float32, because weights that are scaled by 1e-5 would underflow in 16 bits.
    """
    with torch.device("meta"):
        plan.model = type(plan.model)(**{**plan.arguments, "init_values": None})
    plan.model.card = plan.card
    state = dict(plan.state)
    for gamma in [name for name in state if name.endswith((".ls1.gamma", ".ls2.gamma"))]:
        block, scale, _ = gamma.rsplit(".", 2)
        factor = state.pop(gamma).float()
        layer = f"{block}.{LAYER_SCALED[scale]}"
        state[f"{layer}.weight"] = state[f"{layer}.weight"].float() * factor[:, None]
        state[f"{layer}.bias"] = state[f"{layer}.bias"].float() * factor
    plan.state = {name: state[name] for name in plan.model.state_dict()}
    plan.changed.append("layer scale")
    plan.add_note("layer scale multiplied into the layers that it scales")


def _cast(plan: ConversionPlan, dtype: str) -> None:
    plan.state = {name: tensor.to(DTYPES[dtype]) for name, tensor in plan.state.items()}
    try:
        files.check_weights(plan.state, plan.checkpoint.source)
    except CheckpointError as error:
        raise CheckpointError(
            f"{plan.checkpoint.source} has weights beyond the range of {dtype}", "use bf16 or fp32"
        ) from error
    if dtype != "fp32" or plan.dtype == "float64":  # fp32 holds 16-bit numbers exactly
        plan.changed.append("dtype")
    plan.dtype = dtype


def _make_card(checkpoint: load.Checkpoint) -> dict[str, Any]:
    """Return the checkpoint's card. Missing values come from the zoo entry with the same shapes."""
    entry, source = load.identify_model(checkpoint.state), checkpoint.source
    if Path(source).exists():  # publish only the name, not a path on this machine
        source = valid_text(Path(source).name)
    if entry is None:
        return {"source": source, **checkpoint.card}
    card = factory.card_of(entry, source)
    if checkpoint.source.startswith(download.RELEASED_BY):
        card["licence"] = entry.licence
    return {**card, **checkpoint.card}


def _main_dtype(state: dict[str, torch.Tensor]) -> str:
    """Return the name of the dtype that most parameters have."""
    counts: dict[torch.dtype, int] = {}
    for tensor in state.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return dtype_name(max(counts, key=lambda dtype: counts[dtype]))


def _format_size(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
