"""Reconstruct masked images and videos with an autoencoder, as pictures.

The released autoencoders predict the pixels of each patch, normalised by the mean and standard
deviation of that patch. To show a prediction, the normalisation is undone with the mean and
standard deviation of the original patch. So the brightness and contrast of each patch are those of
the original, and its colours and its content are predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from PIL import Image

from .. import zoo
from ..atomic import atomic_file
from ..data.clip_reader import DecodedSegment
from ..data.clip_sampling import Sampling
from ..data.transforms import transform_for
from ..data.video_files import video_writer
from ..device import Devices
from ..errors import InputError, UsageError, check_type
from ..models import factory
from ..models.config import AutoencoderConfig
from ..models.encoder import find_model, unwrap_model
from ..models.mae import MaskedAutoencoderHiera, patch_statistics, reconstruction_error
from ..models.masking import MASK_RATIOS, check_mask_ratio, draw_units, gather_rows
from ..records import Kind, Record
from ..viz.grid import captioned_grid, save_png, side_by_side, to_uint8
from .batching import BatchOptions, BatchRunner
from .decoded_input import Pixels
from .pipeline import GivenModel, Pipeline

GREY = 0.5  # value of the pixels of masked patches
PICTURE_NAMES = ("original", "masked", "reconstruction")
# Extensions of the files that show a reconstruction.
FILE_ENDINGS: dict[Kind, tuple[str, ...]] = {"image": (".png",), "video": (".mp4", ".png")}


@dataclass(frozen=True)
class Reconstruction:
    """The reconstruction of a batch, or (without the dimension b) of one input.

    Pictures are [b, 3, height, width] in [0, 1]; a reconstruction may exceed this range slightly.
    For video they are [b, 3, t, height, width]: the predicted frames, the first of each token.
    """

    original: torch.Tensor
    masked: torch.Tensor
    reconstruction: torch.Tensor
    preds: torch.Tensor  # [b, m, p], of the deleted tokens, normalised
    labels: torch.Tensor  # [b, m, p]
    loss: torch.Tensor  # [b], mean squared difference of preds and labels
    mask: torch.Tensor  # [b, mask units], True = visible

    def unbind(self) -> list[Reconstruction]:
        """Return one reconstruction for each input of the batch."""
        parts = zip(*(getattr(self, f.name).unbind() for f in fields(self)), strict=True)
        return [Reconstruction(*part) for part in parts]

    def cpu(self) -> Reconstruction:
        return Reconstruction(*(getattr(self, f.name).cpu() for f in fields(self)))


@torch.no_grad()
def reconstruct(
    model: torch.nn.Module,
    x: torch.Tensor,
    mask_ratio: float | None = None,
    *,
    mask: torch.Tensor | None = None,
    keep_ids: torch.Tensor | None = None,
    raw: bool = False,
    forward: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]] | None = None,
    check_ids: bool = True,
) -> Reconstruction:
    """Mask a batch, let the model fill in what is hidden, and return the pictures.

    >>> model = hiera_core.create_model("mae_hiera_nano_32", pretrained=True)
    >>> hiera_core.reconstruct(model, x).reconstruction

    Args:
        model: An autoencoder. It may be compiled, or wrapped by DDP or PEFT.
        x: [b, 3, *size], normalised as in the model's preprocessing.
        mask_ratio: Share of mask units that are hidden, in (0, 1); None for 0.6 (images) or 0.9
            (video). The units are drawn with torch's global generator.
        mask, keep_ids: A fixed mask in one of two forms, see `MaskedAutoencoderHiera.forward`.
        raw: Show the decoder's output everywhere; otherwise visible patches show the original.
        forward: Called in place of `model`, or in place of its `decode_all` with `raw`. It may be a
            compiled version of it.
        check_ids: Check the values of `keep_ids`, for which the host waits for a GPU.

    Raises:
        UsageError: The model is not an autoencoder, the ratio leaves no visible or no masked unit,
            `mask` and `keep_ids` are both given, or a shape does not fit.
    """
    autoencoder = _check_autoencoder(model)
    check_type("x", x, torch.Tensor, "a tensor: x = model.transform(image)")
    layout, size = autoencoder.layout_of(x), x.shape[2:]
    visible = autoencoder.visible_units(mask, keep_ids, check_ids, layout=layout)
    if visible is None:
        ratio = MASK_RATIOS[autoencoder.input_kind()] if mask_ratio is None else mask_ratio
        check_mask_ratio(ratio, layout.windows)
        visible = autoencoder.random_visible(x, ratio)
    cells = autoencoder.deleted_tokens(visible).cells
    patches = autoencoder.pixel_labels(x.float())  # [b, n, p]
    mean, deviation = patch_statistics(patches)
    normed = x.to(next(autoencoder.parameters()).dtype)
    if raw:
        decode: Any = forward or autoencoder.decode_all
        decoded = decode(normed, keep_ids=visible.keep_ids, check_ids=False).float()
        preds, painted = gather_rows(decoded, cells), decoded * deviation + mean
    else:
        found = (forward or model)(normed, keep_ids=visible.keep_ids, check_ids=False)
        preds = found[1].float().unflatten(0, (len(x), -1))
        hidden_pixels = preds * gather_rows(deviation, cells) + gather_rows(mean, cells)
        painted = _replace_rows(patches, cells, hidden_pixels)
    labels = gather_rows((patches - mean) / deviation, cells)
    transform = transform_for(autoencoder)
    original = transform.denormalise(autoencoder.pixels_of(patches, size=size))
    covered = _replace_rows(torch.zeros_like(patches), cells, torch.ones_like(preds))
    hidden = autoencoder.pixels_of(covered, size=size).bool()
    return Reconstruction(
        original,
        original.masked_fill(hidden, GREY),
        transform.denormalise(autoencoder.pixels_of(painted, size=size)),
        preds,
        labels,
        reconstruction_error(preds, labels).mean((1, 2)),
        visible.mask,
    )


class BatchReconstructor(BatchRunner[MaskedAutoencoderHiera, Reconstruction]):
    """Reconstructs preprocessed views.

    All views get the same mask: the one that the model itself draws for a single input after
    `torch.manual_seed(seed)`.

    Args:
        model: An autoencoder.
        mask_ratio: See `reconstruct`.
        seed: Seed of the mask.
        raw: See `reconstruct`.
        sampling: How the views of a video were sampled, for `frame_rate`.
        options: See `BatchRunner`.

    Raises:
        UsageError: The model is a classifier, or the ratio leaves no visible or no masked unit.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        mask_ratio: float | None = None,
        seed: int = 0,
        raw: bool = False,
        sampling: Sampling | None = None,
        **options: Unpack[BatchOptions],
    ) -> None:
        inner = unwrap_model(model)
        zoo.check_is_hiera(inner.family, "this model")
        if not isinstance(inner, MaskedAutoencoderHiera):
            raise UsageError(
                "this is a classifier: it has no decoder to reconstruct with",
                "use an autoencoder such as mae_hiera_base_224",
            )
        super().__init__(inner, **options)
        self.raw, self.sampling = raw, sampling or Sampling()
        self.mask_ratio = MASK_RATIOS[self.kind] if mask_ratio is None else mask_ratio
        windows = self.model.layout.windows
        check_mask_ratio(self.mask_ratio, windows)
        generator = torch.Generator().manual_seed(seed)
        units = draw_units(1, windows, self.mask_ratio, generator=generator)
        self.units = units.to(self.device)  # once, because the host waits for such a copy
        self.bind()

    def bind(self) -> None:
        self._forward = self.compiled(self.model.decode_all if self.raw else self.model)

    def compute(self, x: torch.Tensor) -> Reconstruction:
        units = self.units.expand(len(x), -1)
        return reconstruct(
            self.model,
            x,
            keep_ids=units,
            raw=self.raw,
            forward=self._forward,
            check_ids=False,  # they were drawn here
        )

    def _split(self, found: Reconstruction) -> Sequence[Reconstruction]:
        return found.unbind()

    @property
    def frame_rate(self) -> Fraction:
        """Number of predicted frames of a video per second."""
        frames_per_token = self.model.config["patch_stride"][0]
        fps = Fraction(self.sampling.fps or self.transform.fps).limit_denominator(1001)
        return fps / ((self.sampling.stride or self.transform.stride) * frames_per_token)


class Reconstructor(Pipeline[BatchReconstructor]):
    """Reconstructs a stream of images and videos. A video is represented by its centre clip.

    Records have a `result`: a `Reconstruction` of one input, on the CPU.

    Args:
        model: See `Pipeline`. It must be an autoencoder. The defaults are mae_hiera_base_224 and
            mae_hiera_base_16x224.
        mask_ratio, seed, raw: See `BatchReconstructor`.
        sampling: Only its `stride`, `fps` and `max_pixels` are used.
        workers, device, dtype, batch_size, compile: See `PipelineOptions`.

    Raises:
        UsageError: The model is a classifier, its name is unknown, or the mask ratio is out of
            bounds.
        CheckpointError, HubError: See `read_checkpoint`.
        DeviceError: The device does not exist.
    """

    default_models: ClassVar[dict[Kind, str]] = {
        "image": f"mae_{zoo.DEFAULT_IMAGE_MODEL}",
        "video": f"mae_{zoo.DEFAULT_VIDEO_MODEL}",
    }

    def __init__(
        self,
        model: GivenModel = None,
        *,
        mask_ratio: float | None = None,
        seed: int = 0,
        raw: bool = False,
        sampling: Sampling | None = None,
        workers: int | None = None,
        device: Devices = "auto",
        dtype: str | torch.dtype = "auto",
        batch_size: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(
            model,
            sampling=replace(sampling or Sampling(), clips=1, crops=1),
            workers=workers,
            mask_ratio=mask_ratio,
            seed=seed,
            raw=raw,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            compile=compile,
        )

    def load(self, name: str) -> MaskedAutoencoderHiera:
        return factory.create_autoencoder(name)

    def make_runner(self, model: torch.nn.Module, **options: Any) -> BatchReconstructor:
        return BatchReconstructor(model, sampling=self.sampling, **options)

    def finish_image(self, record: Record, pixels: Pixels, result: Reconstruction) -> None:
        self._finish(record, result)

    def _finish(self, record: Record, result: Reconstruction) -> None:
        if not bool(result.loss.isfinite()):
            record.fail(InputError("the model's output is not finite", "use --dtype bf16 or fp32"))
            return
        visible = int(result.mask.sum())
        record.result = result
        record.extra["mae"] = {
            "loss": float(result.loss),
            "mask_ratio": self.runner(record.kind).mask_ratio,
            "visible": visible,
            "masked": len(result.mask) - visible,
        }

    def finish_video(self, record: Record, segments: Iterator[DecodedSegment]) -> None:
        (segment,) = segments
        (result,) = self.runner("video").run(segment.views)
        self._finish(record, result)


def save_reconstruction(
    record: Record,
    files: Sequence[Path],
    runner: BatchReconstructor,
    reconstruction_only: bool = False,
) -> None:
    """Write the pictures of a record.

    A .png file shows the original, the masked image and the reconstruction side by side; for a
    video, its frames in three rows. An .mp4 file shows the three videos side by side, at the rate
    of the predicted frames.

    Args:
        record: A record of a `Reconstructor`.
        files: The files to write.
        runner: The runner that computed the record.
        reconstruction_only: Write the reconstruction alone, at its own size.

    Raises:
        InputError: A file is for videos, and this is an image.
        OutputError: A file cannot be written.
    """
    result: Reconstruction = record.result
    names = PICTURE_NAMES[-1:] if reconstruction_only else PICTURE_NAMES
    pictures = [getattr(result, name) for name in names]
    if record.kind == "video":
        pictures = [frames.transpose(0, 1) for frames in pictures]  # c t y x -> t c y x
    shown = [to_uint8(picture) for picture in pictures]
    for path in files:
        if path.suffix.lower() == ".mp4":
            if record.kind == "image":
                raise InputError(f"an image, and {path} would be a video", "write a .png file")
            with atomic_file(path) as temporary:
                temporary.write_bytes(video_writer.encode(side_by_side(shown), runner.frame_rate))
        elif record.kind == "video":
            save_png(captioned_grid([list(frames) for frames in shown], rows=names), path)
        else:
            alone = Image.fromarray(shown[0]) if reconstruction_only else None
            save_png(alone or captioned_grid([shown], columns=names), path)


def _check_autoencoder(model: torch.nn.Module) -> MaskedAutoencoderHiera:
    inner = find_model(model)
    zoo.check_is_hiera(inner.family if inner else None, "this model")
    if not isinstance(inner, MaskedAutoencoderHiera):
        name = type(model).__name__
        hint = "create one, such as create_model('mae_hiera_base_224', pretrained=True)"
        raise UsageError(f"reconstruct takes an autoencoder, not a model of type {name}", hint)
    return inner


def mask_units(entry: zoo.ModelEntry) -> int:
    """Return how many mask units a model in the zoo has."""
    return AutoencoderConfig(**entry.config).layout.windows


def _replace_rows(patches: torch.Tensor, cells: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Replace the rows at `cells`. b n p, b m, b m p -> b n p"""
    return patches.scatter(1, cells[..., None].expand_as(values), values)
