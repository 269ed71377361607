"""The sections of a recipe. `Recipe` checks their values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ModelSettings:
    """The model."""

    name: str  # a name in the zoo
    config: dict[str, Any] = field(default_factory=dict)  # constructor arguments to change


@dataclass(frozen=True)
class DataSettings:
    """The data: where it is, what is held out, and how samples are read."""

    path: str | None = None  # the training data, see `open_splits`
    val: str | float | None = None  # path of held-out data, or share of the data to hold out
    balanced: bool = False  # whether all classes are equally frequent in a pass
    repeats: int = 1  # views of a sample each time it is read (repeated sampling)
    max_bad: float = 0.01  # largest share of unreadable samples; above it the run stops


@dataclass(frozen=True)
class AugmentSettings:
    """Random augmentation of samples. All frames of a clip get the same augmentation."""

    scale: tuple[float, float] = (0.08, 1.0)  # area of the random crop, as a share of the image
    ratio: tuple[float, float] = (0.75, 1.3333333333333333)  # width / height of the crop
    flip: float = 0.5  # probability of a horizontal flip
    randaugment: float = 0.0  # magnitude, up to 10; 0 turns RandAugment off
    randaugment_std: float = 0.5  # standard deviation of the magnitude
    randaugment_ops: int = 2  # operations for each sample
    erasing: float = 0.0  # probability of random erasing
    mixup: float = 0.0  # alpha of the Beta distribution; 0 turns mixup off
    cutmix: float = 0.0  # alpha of the Beta distribution; 0 turns CutMix off
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class ProbeSettings:
    """Accuracy of a simple classifier on the frozen features, measured during the run."""

    method: Literal["knn", "linear"] = "knn"
    every: float = 10.0  # passes between measurements
    data: str | None = None  # labelled data; None: that of the run
    val: str | float | None = None  # what is held out of it, see `open_splits`
    samples: int = 10_000  # most training samples of the probe, evenly spaced
    neighbours: int = 20  # training samples that vote, for knn


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (Hu et al. 2021) in place of training the weights of the encoder."""

    rank: int = 8
    alpha: float = 16.0  # the update is scaled by alpha / rank
    layers: Literal["attention", "all"] = "attention"  # attention: qkv and proj; all: the MLP, too


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of AdamW."""

    lr: float  # peak rate for `lr_batch_size`; scaled linearly to the recipe's batch size
    lr_batch_size: int
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05
    layer_decay: float = 1.0  # learning rate of a block, divided by that of the next block
    clip_grad: float | None = None  # largest L2 norm of the gradient; None: no clipping


@dataclass(frozen=True)
class ScheduleSettings:
    """Length of the run and learning rate schedule."""

    epochs: float  # effective epochs: passes over the data times data.repeats
    warmup_epochs: float = 0.0  # linear warm-up from 0
    kind: Literal["cosine", "constant"] = "cosine"
    final_lr: float = 0.0  # final rate of the cosine, for `lr_batch_size`
