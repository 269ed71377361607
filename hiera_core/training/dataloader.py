"""Batches: how samples are read, and what becomes of one that cannot be."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ..data.clip_reader import read_segments
from ..data.clip_sampling import Sampling, check_damage, frame_indices
from ..data.datasets import MediaDataset
from ..data.image_reader import open_image
from ..data.sources import kind_of
from ..data.transforms import ImageTransform, VideoTransform
from ..data.video_reader import Video
from ..errors import HieraError, InputError
from ..records import Kind
from .augment import Augment, mix
from .recipe import Recipe
from .sampler import SampleKey, derive_seed

# Short side, in sides of the model's input, to which larger frames are reduced at once: SlowFast
# jitters between 256 and 320 pixels for 224.
KEPT_SIDE = 320 / 224


@dataclass
class LoadedSample:
    """What was read of one sample: its views, or why there are none."""

    key: SampleKey
    views: torch.Tensor | None = None  # [r, 3, *size]
    label: int = 0
    units: torch.Tensor | None = None  # [r, k] visible mask units
    name: str = ""
    error: str | None = None


@dataclass
class Batch:
    """Tensors of n samples x r repeats."""

    x: torch.Tensor  # [n r, 3, *size]
    weight: torch.Tensor  # [n r]; 0 where there is no sample
    target: torch.Tensor | None = None  # [n r, classes]
    units: torch.Tensor | None = None  # [n r, k]
    bad: tuple[tuple[str, str], ...] = ()  # name and reason of unreadable ones

    def to(self, device: torch.device) -> Batch:
        def moved(tensor: Any) -> Any:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return Batch(
            moved(self.x), moved(self.weight), moved(self.target), moved(self.units), self.bad
        )

    def pin_memory(self) -> Batch:  # asked for by DataLoader
        self.x = self.x.pin_memory()
        return self


@dataclass(frozen=True)
class MaskSampler:
    """How many of a model's mask units stay visible."""

    windows: int
    kept: int

    def draw(self, *place: int | str) -> torch.Tensor:
        """[kept] unit numbers, from a seed and a place."""
        generator = torch.Generator().manual_seed(derive_seed("mask", *place))
        return torch.rand(self.windows, generator=generator).argsort()[: self.kept]


class TrainDataset(Dataset[LoadedSample]):
    """Reads and augments samples by key.

    Args:
        samples: the data.
        augment: pixels to a view.
        recipe: its seed and repeats.
        clip: the model's sampling of videos; None for pictures.
        masking: for an autoencoder.
    """

    def __init__(
        self,
        samples: MediaDataset,
        augment: Augment,
        recipe: Recipe,
        clip: VideoTransform | None = None,
        masking: MaskSampler | None = None,
    ) -> None:
        self.samples, self.augment, self.clip, self.masking = samples, augment, clip, masking
        self.seed, self.repeats = recipe.seed, recipe.data.repeats

    def __getitem__(self, key: SampleKey) -> LoadedSample:
        return _guarded(self._read, self.samples, key, "video" if self.clip else "image")

    def _read(self, key: SampleKey, content: Path | bytes) -> LoadedSample:
        epoch, sample = key
        places = [(self.seed, epoch, str(sample), repeat) for repeat in range(self.repeats)]
        if self.clip is None:
            picture = np.array(open_image(content)[0])
            pixels = [picture] * self.repeats
        else:
            shares = [np.random.default_rng(derive_seed("time", *p)).random() for p in places]
            pixels = read_clips(content, self.clip, shares)
        views = []
        with torch.random.fork_rng(devices=[]):
            for place, view in zip(places, pixels, strict=True):
                torch.manual_seed(derive_seed("augment", *place))
                views.append(self.augment(view))
        masks = [self.masking.draw(*p) for p in places] if self.masking else []
        return LoadedSample(key, torch.stack(views), units=torch.stack(masks) if masks else None)


class EvalDataset(Dataset[LoadedSample]):
    """The same, as the model's evaluation sees samples: one centre view."""

    def __init__(
        self,
        samples: MediaDataset,
        transform: ImageTransform | VideoTransform,
        masking: MaskSampler | None = None,
    ) -> None:
        self.samples, self.transform, self.masking = samples, transform, masking

    def __getitem__(self, key: SampleKey) -> LoadedSample:
        is_image = isinstance(self.transform, ImageTransform)
        return _guarded(self._read, self.samples, key, "image" if is_image else "video")

    def _read(self, key: SampleKey, content: Path | bytes) -> LoadedSample:
        if isinstance(self.transform, ImageTransform):
            view = self.transform.crop(open_image(content)[0])
        else:
            _, segments = read_segments(content, Sampling(clips=1, crops=1), self.transform)
            view = next(segments).views[0]
        x = self.transform.normalise(torch.from_numpy(view)[None])
        units = self.masking.draw("held out", str(key.sample))[None] if self.masking else None
        return LoadedSample(key, x, units=units)


class Collator:
    """Items to a batch; mixes neighbours.

    A neighbour is the next of two in the batch, whoever computes it: mixing does not depend on the
    number of processes either.
    """

    def __init__(
        self, shape: Sequence[int], num_classes: int | None, recipe: Recipe | None = None
    ) -> None:
        self.shape, self.num_classes = tuple(shape), num_classes
        part = recipe and recipe.augment
        self.mixing = part if part and (part.mixup or part.cutmix) and num_classes else None
        self.seed, self.repeats = (recipe.seed, recipe.data.repeats) if recipe else (0, 1)

    def __call__(self, items: list[LoadedSample]) -> Batch:
        empty = torch.zeros(self.repeats, *self.shape)
        x = torch.stack([empty if item.views is None else item.views for item in items])
        weight = torch.tensor([float(item.views is not None) for item in items])
        bad = tuple((item.name, item.error) for item in items if item.error is not None)
        batch = Batch(x, weight.repeat_interleave(self.repeats), bad=bad)
        if self.num_classes is not None:
            batch.target = self._targets(items, x)
        units = [item.units for item in items if item.units is not None]
        if units:  # an empty place needs some, too
            batch.units = torch.cat([units[0] if i.units is None else i.units for i in items])
        batch.x = x.flatten(0, 1)
        return batch

    def _targets(self, items: list[LoadedSample], x: torch.Tensor) -> torch.Tensor:
        assert self.num_classes is not None
        labels = torch.tensor([item.label for item in items])
        targets = torch.nn.functional.one_hot(labels, self.num_classes).float()
        targets = targets[:, None].repeat(1, self.repeats, 1)  # n r classes
        if self.mixing is None:
            return targets.flatten(0, 1)
        for first in range(0, len(items) - 1, 2):
            two = slice(first, first + 2)
            if any(item.views is None for item in items[two]):
                continue
            for repeat in range(self.repeats):
                seed = derive_seed("mix", self.seed, *map(str, items[first].key), repeat)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    mixed = mix(x[two, repeat], labels[two], self.mixing, self.num_classes)
                x[two, repeat], targets[two, repeat] = mixed
        return targets.flatten(0, 1)


def make_loader(
    dataset: Dataset[LoadedSample],
    keys: Iterator[list[SampleKey]],
    collate: Collator,
    workers: int,
    device: torch.device,
) -> DataLoader[Batch]:
    """Batches, read ahead by worker processes."""
    any_dataset: Any = dataset  # its items become batches in `collate`
    return DataLoader(
        any_dataset,
        batch_sampler=keys,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_the_main_process if workers else None,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
    )


def _leave_signals_to_the_main_process(worker: int) -> None:
    """A terminal and `timeout` signal the whole group; the main process ends the workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def read_clips(
    content: Path | bytes, clip: VideoTransform, shares: Sequence[float]
) -> list[np.ndarray]:
    """Clips that begin at these shares of what room there is: 0 at the start, 1 at the end.

    Frames are decoded once however many clips show them. -> uint8 [t, y, x, 3] each
    """
    short = round(KEPT_SIDE * max(clip.size))
    with Video(content) as video:
        span = clip.frames * clip.stride / clip.fps * video.fps
        starts = [share * max(video.frames - span, 0) for share in shares]
        indices = frame_indices(starts, span, clip.frames, video.frames)
        wanted, rows = np.unique(indices, return_inverse=True)
        shown = list(video.read(wanted.tolist()))
        check_damage(sum(not s.intact for s in shown), len(shown))
        frames = [_reduced(s.pixels, short) for s in shown]
    return [np.stack([frames[i] for i in row]) for row in rows.reshape(indices.shape)]


def _guarded(
    read: Callable[[SampleKey, Path | bytes], LoadedSample],
    samples: MediaDataset,
    key: SampleKey,
    wants: Kind,
) -> LoadedSample:
    """An item in any case: an unreadable sample is one that says so, never another one's pixels."""
    if key.sample is None:
        return LoadedSample(key)
    source = samples.sources[key.sample]
    name, item = source.name, None
    try:
        content = source.content()
        kind = kind_of(content, name)
        if kind != wants:
            raise InputError(f"not {wants} but {kind}", f"this model is trained on {wants}s")
        item = read(key, content)
    except HieraError as error:
        return LoadedSample(key, name=name, error=error.message)
    except Exception as error:  # a transform can fail too (memory, odd sizes)
        return LoadedSample(key, name=name, error=f"{type(error).__name__}: {error}")
    item.name = name
    item.label = 0 if samples.labels is None else int(samples.labels[key.sample])
    return item


def _reduced(pixels: np.ndarray, short: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    if min(height, width) <= short:
        return pixels
    scale = short / min(height, width)
    size = (round(width * scale), round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
