"""Read samples and collate them into batches. Unreadable samples have zero weight."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..data.clip_reader import read_segments
from ..data.clip_sampling import Sampling, frame_indices
from ..data.datasets import MediaDataset
from ..data.image_reader import open_image
from ..data.transforms import ImageTransform, VideoTransform
from ..data.video_files import decoder_threads
from ..data.video_files.animation_reader import kind_for_model, open_video
from ..data.video_files.video_reader import check_damage
from ..errors import HieraError, InputError
from ..process.cores import cores_per_process
from ..records import Kind
from .augment import Augment
from .loading.batch import Batch as Batch
from .loading.batch import Erasure
from .loading.mixing import PairMix, draw_mix, mix_targets
from .recipe import Recipe
from .sampler import MaskSampler, SampleKey, StepSampler, derive_seed

if TYPE_CHECKING:
    from .build import TrainingSetup

# As soon as they are decoded, video frames are downscaled until their short side is this multiple
# of the model's input size. SlowFast resizes the short side to between 256 and 320 pixels for an
# input size of 224.
MAX_SHORT_SIDE = 320 / 224
FETCHES = 16  # remote samples that a worker fetches at a time


@dataclass
class LoadedSample:
    """The r views (repeats) of one sample, or the error that occurred when it was read.

    Padding has neither views nor an error.
    """

    key: SampleKey
    views: torch.Tensor | None = None  # uint8 [r, 3, *size], or [r, *size, 3] for evaluation
    erasures: tuple[Erasure | None, ...] = ()  # of each view
    label: int = 0
    visible_units: torch.Tensor | None = None  # [r, k] indices of the visible mask units
    name: str = ""
    error: str | None = None


class _Samples(Dataset[LoadedSample]):
    """Samples that a worker loads one by one; remote ones are fetched together."""

    samples: MediaDataset
    expected: Kind

    def __getitem__(self, key: SampleKey) -> LoadedSample:
        return _load(self._read, self.samples, key, self.expected)

    def __getitems__(self, keys: list[SampleKey]) -> list[LoadedSample]:
        """Return several samples. PyTorch calls this for a batch.

        A remote sample takes as long as the answer of its server, so threads fetch the next ones
        while one is decoded.
        """
        numbers = [key.sample for key in keys if key.sample is not None]
        if not numbers or self.samples.sources[numbers[0]].url is None:
            return [self[key] for key in keys]
        with ThreadPoolExecutor(min(FETCHES, len(numbers)), "fetch") as pool:
            fetched = {n: pool.submit(self.samples.sources[n].content) for n in numbers}
            return [self._load_fetched(key, fetched) for key in keys]

    def _load_fetched(
        self, key: SampleKey, fetched: dict[int, Future[Path | bytes]]
    ) -> LoadedSample:
        content = None if key.sample is None else fetched[key.sample].result
        return _load(self._read, self.samples, key, self.expected, content)

    def _read(self, key: SampleKey, content: Path | bytes) -> LoadedSample:
        raise NotImplementedError


class TrainDataset(_Samples):
    """Augmented training samples, addressed by `SampleKey`.

    Args:
        samples: The training data.
        augment: Turns decoded pixels into a view.
        recipe: The recipe, for its seed and repeats.
        clip: The video model's clip length and stride; None for images.
        masking: The masks, for an autoencoder.
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
        self.expected = "video" if clip else "image"

    def _read(self, key: SampleKey, content: Path | bytes) -> LoadedSample:
        epoch, sample = key
        seeds = [(self.seed, epoch, str(sample), repeat) for repeat in range(self.repeats)]
        if self.clip is None:
            image = np.array(open_image(content)[0])
            pixels = [image] * self.repeats
        else:
            positions = [np.random.default_rng(derive_seed("time", *s)).random() for s in seeds]
            pixels = read_clips(content, self.clip, positions)
        views: list[torch.Tensor] = []
        erasures: list[Erasure | None] = []
        with torch.random.fork_rng(devices=[]):
            for seed, view in zip(seeds, pixels, strict=True):
                torch.manual_seed(derive_seed("augment", *seed))
                augmented, erasure = self.augment(view)
                views.append(augmented)
                erasures.append(erasure)
        units = torch.stack([self.masking.draw(*s) for s in seeds]) if self.masking else None
        return LoadedSample(key, torch.stack(views), erasures=tuple(erasures), visible_units=units)


class EvalDataset(_Samples):
    """Samples as evaluation sees them: one centre view each, in bytes, and a fixed mask. The
    transform normalises them, on the device.

    Args:
        samples: The held-out data.
        transform: The model's preprocessing for evaluation.
        masking: The masks, for an autoencoder.
    """

    def __init__(
        self,
        samples: MediaDataset,
        transform: ImageTransform | VideoTransform,
        masking: MaskSampler | None = None,
    ) -> None:
        self.samples, self.transform, self.masking = samples, transform, masking
        self.expected = "image" if isinstance(transform, ImageTransform) else "video"

    def _read(self, key: SampleKey, content: Path | bytes) -> LoadedSample:
        if isinstance(self.transform, ImageTransform):
            view = self.transform.crop(open_image(content)[0])
        else:
            _, segments = read_segments(content, Sampling(clips=1, crops=1), self.transform)
            view = next(segments).views[0]
        x = torch.from_numpy(view)[None]
        units = self.masking.draw("held out", str(key.sample))[None] if self.masking else None
        return LoadedSample(key, x, visible_units=units)


class Collator:
    """Turns samples into a batch; draws mixup and CutMix, and mixes the targets.

    Mixing pairs are samples 0 and 1, 2 and 3, and so on. Processes share a batch in whole pairs, so
    mixing does not depend on the number of processes.

    Args:
        shape: Shape of a view, (3, *size), or (*size, 3) for evaluation.
        num_classes: Number of classes; None for an autoencoder.
        recipe: The recipe, for its mixing, seed and repeats; None for validation, which has none
            of these.
    """

    def __init__(
        self, shape: Sequence[int], num_classes: int | None, recipe: Recipe | None = None
    ) -> None:
        self.shape, self.num_classes = tuple(shape), num_classes
        augment = recipe.augment if recipe else None
        mixes = augment is not None and (augment.mixup or augment.cutmix) and num_classes
        self.mixing = augment if mixes else None
        self.seed, self.repeats = (recipe.seed, recipe.data.repeats) if recipe else (0, 1)

    def __call__(self, items: list[LoadedSample]) -> Batch:
        empty = torch.zeros(self.repeats, *self.shape, dtype=torch.uint8)
        x = torch.stack([empty if item.views is None else item.views for item in items])
        weight = torch.tensor([float(item.views is not None) for item in items])
        bad = tuple((item.name, item.error) for item in items if item.error is not None)
        views = self.repeats * sum(item.key.sample is not None for item in items)
        batch = Batch(
            x.flatten(0, 1),
            weight.repeat_interleave(self.repeats),
            bad=bad,
            views=views,
            repeats=self.repeats,
        )
        batch.erasures = tuple(
            (row * self.repeats + repeat, erasure)
            for row, item in enumerate(items)
            for repeat, erasure in enumerate(item.erasures)
            if erasure is not None
        )
        if self.num_classes is not None:
            batch.target, batch.mixes = self._targets(items, self.num_classes)
        batch.visible_units = _stack_units(items)
        return batch

    def _targets(
        self, items: list[LoadedSample], num_classes: int
    ) -> tuple[torch.Tensor, list[PairMix]]:
        """Return the targets [n r, classes], and how each view of each pair is mixed."""
        labels = torch.tensor([item.label for item in items])
        targets = torch.nn.functional.one_hot(labels, num_classes).float()
        targets = targets[:, None].repeat(1, self.repeats, 1)  # n r classes
        mixes: list[PairMix] = []
        if self.mixing is None:
            return targets.flatten(0, 1), mixes
        for first in range(0, len(items) - 1, 2):
            pair = slice(first, first + 2)
            for repeat in range(self.repeats):
                if any(item.views is None for item in items[pair]):
                    mixes.append(PairMix())
                    continue
                seed = derive_seed("mix", self.seed, *map(str, items[first].key), repeat)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    mixes.append(draw_mix(self.mixing, *self.shape[-2:]))
                targets[pair, repeat] = mix_targets(targets[pair, repeat], mixes[-1])
        return targets.flatten(0, 1), mixes


def make_loader(
    dataset: Dataset[LoadedSample],
    keys: Iterable[list[SampleKey]],
    collate: Collator,
    workers: int,
    device: torch.device,
) -> DataLoader[Batch]:
    """Return a dataloader whose workers prefetch batches. They live as long as the loader.

    Args:
        dataset: The samples.
        keys: Keys of the samples of each batch. A list can be gone through several times.
        collate: Turns samples into a batch.
        workers: Number of worker processes; 0 reads in the main process.
        device: The device that the batches go to; batches for CUDA are in pinned memory.
    """
    # By its type annotation, a DataLoader yields batches of the same type as the items.
    any_dataset: Any = dataset
    return DataLoader(
        any_dataset,
        batch_sampler=keys,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=_prepare_worker if workers else None,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        persistent_workers=workers > 0,
    )


def training_batches(
    setup: TrainingSetup, samples: MediaDataset, recipe: Recipe, sampler: StepSampler, step: int
) -> Iterator[Batch]:
    """Return the training batches of this process, starting at a step."""
    dataset = TrainDataset(samples, setup.augment, recipe, setup.clip, setup.masking)
    collate = Collator(setup.view_shape, setup.num_classes, recipe)
    keys = sampler.batches(step)
    return iter(make_loader(dataset, keys, collate, setup.workers, setup.device))


def _prepare_worker(worker: int) -> None:
    """Make a worker decode with its share of the cores, ignore signals (the main process ends it)
    and exit without a traceback.

    A terminal and `timeout` signal the whole process group, so workers have to ignore the signals.
    When the main process ends, the worker's thread that shares tensors with it loses its
    connection, and would print a traceback through `sys.excepthook`.
    """
    info = get_worker_info()
    assert info is not None  # because this runs in a worker
    decoder_threads.OF_THIS_PROCESS.total = max(1, cores_per_process() // info.num_workers)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.excepthook = _print_unless_disconnected


def _print_unless_disconnected(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)


def read_clips(
    content: Path | bytes, clip: VideoTransform, positions: Sequence[float]
) -> list[np.ndarray]:
    """Read several clips of a video. A frame that several clips share is decoded once.

    Args:
        content: The video.
        clip: Length, stride and size of the clips.
        positions: Position of each clip: 0 is the start of the video, and a clip at 1 ends with
            the last frame.

    Returns:
        The clips, uint8 [t, y, x, 3]. Frames larger than the model needs are downscaled.

    Raises:
        InputError: The video cannot be decoded, or too many frames are damaged.
    """
    short = round(MAX_SHORT_SIDE * max(clip.size))
    with open_video(content) as video:
        span = clip.frames * clip.stride / clip.fps * video.fps
        starts = [position * max(video.frames - span, 0) for position in positions]
        indices = frame_indices(starts, span, clip.frames, video.frames)
        unique_indices, rows = np.unique(indices, return_inverse=True)
        decoded = list(video.read(unique_indices.tolist()))
        check_damage(sum(not frame.intact for frame in decoded), len(decoded))
        frames = [_downscale(frame.pixels, short) for frame in decoded]
    return [np.stack([frames[i] for i in row]) for row in rows.reshape(indices.shape)]


def _load(
    read: Callable[[SampleKey, Path | bytes], LoadedSample],
    samples: MediaDataset,
    key: SampleKey,
    expected: Kind,
    content_of: Callable[[], Path | bytes] | None = None,
) -> LoadedSample:
    """Load a sample with `read`, and return its error if it cannot be read. `content_of` returns
    its content, if that is being fetched already.

    An unreadable sample is not replaced by another one: its `views` are None.
    """
    if key.sample is None:
        return LoadedSample(key)
    source = samples.sources[key.sample]
    name = source.name
    try:
        content = (content_of or source.content)()
        kind = kind_for_model(content, name, takes_videos=expected == "video")
        if kind != expected:
            raise InputError(f"expected {expected}, got {kind}", f"the model takes {expected}s")
        loaded = read(key, content)
    except HieraError as error:
        return LoadedSample(key, name=name, error=error.message)
    except Exception as error:  # a transform can fail too (memory, odd sizes)
        return LoadedSample(key, name=name, error=f"{type(error).__name__}: {error}")
    loaded.name = name
    loaded.label = 0 if samples.labels is None else int(samples.labels[key.sample])
    return loaded


def _stack_units(items: Sequence[LoadedSample]) -> torch.Tensor | None:
    """Return the visible units of all samples, [n r, k], or None if there are no masks.

    Padding and unreadable samples get the units of another sample, because the model needs the
    same number of visible units for each view.
    """
    units = [item.visible_units for item in items if item.visible_units is not None]
    if not units:
        return None
    return torch.cat([units[0] if i.visible_units is None else i.visible_units for i in items])


def _downscale(pixels: np.ndarray, short: int) -> np.ndarray:
    """Downscale a frame whose short side is longer than `short`. uint8 [y, x, 3]"""
    height, width = pixels.shape[:2]
    if min(height, width) <= short:
        return pixels
    scale = short / min(height, width)
    size = (round(width * scale), round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
