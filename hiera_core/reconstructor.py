"""What a masked autoencoder makes of what it cannot see, as pictures.

The released autoencoders predict the pixels of each patch normalised by its own mean and deviation.
To show them they are scaled back with the true ones, which come from the original: colours and
contrast of a patch are given, its content is the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from . import factory, movies, panels, zoo
from .config import AutoencoderConfig
from .errors import InputError, UsageError
from .files import replacing
from .mae import MaskedAutoencoderHiera, check_mask_ratio, gather_rows, patch_statistics
from .mirror import target
from .pipeline import Pipeline, of_whole_videos
from .preprocess.image import ImageTransform
from .preprocess.video import Piece, Sampling, VideoTransform
from .records import Kind, Record
from .runner import Runner

MASK_RATIOS: dict[Kind, float] = {"image": 0.6, "video": 0.9}  # as pre-trained (paper, section 4)
GREY = 0.5  # what masked patches are shown as
COLUMNS = ("original", "masked", "reconstruction")


@dataclass(frozen=True)
class Reconstruction:
    """Of a batch, or (without the dimension b) of one input. Pictures are [b, 3, height, width] in
    [0, 1] (a reconstruction may leave it a little); of video [b, 3, t, height, width], the frames
    that are predicted: the first of each token's."""

    original: torch.Tensor
    masked: torch.Tensor
    reconstruction: torch.Tensor
    preds: torch.Tensor  # [b, m, p], of the deleted tokens, normalised
    labels: torch.Tensor  # [b, m, p]
    loss: torch.Tensor  # [b], mean squared difference of those two
    mask: torch.Tensor  # [b, mask units], True = visible

    def unbind(self) -> list[Reconstruction]:
        """One for each input."""
        parts = zip(*(getattr(self, f.name).unbind() for f in fields(self)), strict=True)
        return [Reconstruction(*part) for part in parts]

    def cpu(self) -> Reconstruction:
        return Reconstruction(*(getattr(self, f.name).cpu() for f in fields(self)))


@torch.no_grad()
def reconstruct(
    model: MaskedAutoencoderHiera,
    x: torch.Tensor,
    mask_ratio: float | None = None,
    *,
    mask: torch.Tensor | None = None,
    raw: bool = False,
    forward: Callable[..., Any] | None = None,
) -> Reconstruction:
    """Mask inputs, let the model fill in what is hidden, and give the pictures.

    Args:
        model: an autoencoder.
        x: [b, 3, *size], normalised as in the model's preprocessing.
        mask_ratio: share of mask units deleted, in (0, 1); by default 0.6 for pictures, 0.9 for
            video. Drawn with torch's random numbers.
        mask: [b, mask units] bool, True = visible, or the visible units' numbers [b, k] int64, in
            place of a random one.
        raw: show what the decoder drew everywhere; otherwise visible patches are the original's.
        forward: stands in for the model's own forward (compiled, in parallel).

    Raises:
        UsageError: the ratio leaves no visible or no masked unit, or shapes do not fit.
    """
    if mask is None:
        ratio = MASK_RATIOS[_kind(model)] if mask_ratio is None else mask_ratio
        check_mask_ratio(ratio, model.layout.windows)
        mask = model.random_visible(x, ratio).mask
    visible = model.visible_from_mask(mask)
    cells = model.deleted_tokens(visible).cells
    patches = model.pixel_labels(x.float())  # [b, n, p]
    mean, deviation = patch_statistics(patches)
    normed = x.to(next(model.parameters()).dtype)
    if raw:
        latent, _ = model.forward_encoder(normed, mask=mask)
        everywhere = model.forward_decoder(latent, visible).float()
        preds, painted = gather_rows(everywhere, cells), everywhere * deviation + mean
    else:
        preds = (forward or model)(normed, mask=mask)[1].float().unflatten(0, (len(x), -1))
        there = preds * gather_rows(deviation, cells) + gather_rows(mean, cells)
        painted = _put(patches, cells, there)
    labels = gather_rows((patches - mean) / deviation, cells)
    transform = transform_of(model)
    original = transform.denormalise(model.pixels_of(patches))
    nothing = torch.zeros_like(patches)
    hidden = model.pixels_of(_put(nothing, cells, torch.ones_like(preds))).bool()
    return Reconstruction(
        original,
        original.masked_fill(hidden, GREY),
        transform.denormalise(model.pixels_of(painted)),
        preds,
        labels,
        (preds - labels).square().mean((1, 2)),
        visible.mask,
    )


class Painter(Runner[MaskedAutoencoderHiera, Reconstruction]):
    """Reconstructions of preprocessed views. Every view is masked alike, by the seed: the mask is
    the one that the model itself draws for a single input after `torch.manual_seed(seed)`.

    Args:
        model: an autoencoder.
        mask_ratio: None for the usual one of pictures or video.
        options: see `Runner`.

    Raises:
        UsageError: a classifier, or a ratio that leaves no visible or no masked unit.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        mask_ratio: float | None = None,
        seed: int = 0,
        raw: bool = False,
        **options: Any,
    ) -> None:
        if not isinstance(model, MaskedAutoencoderHiera):
            raise UsageError(
                "this is a classifier: it has no decoder to reconstruct with",
                "use an autoencoder such as mae_hiera_base_224",
            )
        super().__init__(model, **options)
        self.raw = raw
        self.mask_ratio = MASK_RATIOS[self.kind] if mask_ratio is None else mask_ratio
        windows = self.model.layout.windows
        check_mask_ratio(self.mask_ratio, windows)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(1, windows, generator=generator)
        self.units = noise.argsort(dim=1)[:, : int(windows * (1 - self.mask_ratio))]
        self._forward = self.compiled(self.model)

    def compute(self, x: torch.Tensor) -> Sequence[Reconstruction]:
        units = self.units.to(x.device).expand(len(x), -1)
        found = reconstruct(self.model, x, mask=units, raw=self.raw, forward=self._forward)
        return found.cpu().unbind()

    @property
    def rate(self) -> Fraction:
        """Predicted frames of a video, a second."""
        clip, frames = self.transform, self.model.config["patch_stride"][0]
        return Fraction(clip.fps).limit_denominator(1001) / (clip.stride * frames)


class Reconstructor(Pipeline[Painter]):
    """Reconstructs pictures and videos; of a video its centre clip.

    Records have `result`, a `Reconstruction` of one input on the CPU.

    Args:
        model: see `Pipeline`: autoencoders; the defaults are mae_hiera_base_224 and
            mae_hiera_base_16x224.
        options: `mask_ratio`, `seed`, `raw`, `workers`, `device`, `dtype`, `batch_size`, `compile`,
            `sampling`, as for `Painter` and `Pipeline`.

    Raises:
        UsageError: a classifier, an unknown name, or a mask ratio out of bounds.
        CheckpointError, HubError: see `weights.read`.
        DeviceError: the device is not there.
    """

    default_models: ClassVar[dict[Kind, str]] = {
        "image": f"mae_{zoo.DEFAULT_IMAGE_MODEL}",
        "video": f"mae_{zoo.DEFAULT_VIDEO_MODEL}",
    }

    def __init__(
        self,
        model: str | MaskedAutoencoderHiera | Callable[[Kind], Any] | None = None,
        *,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> None:
        sampling = replace(of_whole_videos(sampling), clips=1, crops=1)
        super().__init__(model, sampling=sampling, **options)

    def load(self, name: str) -> MaskedAutoencoderHiera:
        return factory.create_autoencoder(name)

    def make_runner(self, model: torch.nn.Module, **options: Any) -> Painter:
        return Painter(model, **options)

    def see_picture(self, record: Record, pixels: np.ndarray, result: Reconstruction) -> None:
        if not bool(result.loss.isfinite()):
            record.fail(InputError("the model's output is not finite", "use --dtype bf16 or fp32"))
            return
        painter = self.runner(record.kind)
        visible = int(result.mask.sum())
        record.result = result
        record.extra["mae"] = {
            "loss": float(result.loss),
            "mask_ratio": painter.mask_ratio,
            "visible": visible,
            "masked": len(result.mask) - visible,
        }

    def see_video(self, record: Record, pieces: Iterator[Piece]) -> None:
        (piece,) = pieces
        (result,) = self.runner("video").run(piece.views)
        self.see_picture(record, piece.views[0], result)


def save(record: Record, folder: Path, painter: Painter, only: bool = False) -> list[Path]:
    """Write a record's pictures below `folder`: a PNG with the three side by side (of a video, its
    frames in three rows), and of a video an MP4 of the three at their true rate.

    Args:
        only: the reconstruction alone, at its own size.

    Raises:
        InputError: a file would replace the input.
        OutputError: it cannot be written.
    """
    result: Reconstruction = record.result
    names = COLUMNS[-1:] if only else COLUMNS
    pictures = [getattr(result, name) for name in names]
    if record.kind == "video":
        pictures = [frames.transpose(0, 1) for frames in pictures]  # c t y x -> t c y x
    shown = [panels.to_bytes(picture) for picture in pictures]
    path = target(folder, record.input, ".png")
    if record.kind == "image":
        picture = Image.fromarray(shown[0]) if only else panels.grid([shown], columns=names)
        panels.save(picture, path)
        return [path]
    panels.save(panels.grid([list(frames) for frames in shown], rows=names), path)
    movie = target(folder, record.input, ".mp4")
    with replacing(movie) as temporary:
        temporary.write_bytes(movies.encode(panels.beside(shown), painter.rate))
    return [movie, path]


def mask_units(row: zoo.Model) -> int:
    """How many mask units a model of the zoo has."""
    return AutoencoderConfig(**row.config).layout.windows


def transform_of(model: MaskedAutoencoderHiera) -> ImageTransform | VideoTransform:
    """A model's preprocessing, from its card.

    Raises:
        UsageError: the model takes signals.
    """
    size = model.config["input_size"]
    if len(size) == 1:
        raise UsageError("this model takes signals", "give one for pictures or videos")
    card = getattr(model, "card", {}).get("preprocessing")
    chosen: Any = ImageTransform if len(size) == 2 else VideoTransform
    transform: ImageTransform | VideoTransform = chosen.from_card(card, size)
    return transform


def _kind(model: MaskedAutoencoderHiera) -> Kind:
    return "video" if len(model.config["input_size"]) == 3 else "image"


def _put(patches: torch.Tensor, cells: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Rows in place of others. b n p, b m, b m p -> b n p"""
    return patches.scatter(1, cells[..., None].expand_as(values), values)
