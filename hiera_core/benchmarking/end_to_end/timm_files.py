"""From files to answers as users of timm write it: a data set of files, PyTorch's DataLoader,
timm's transforms and timm's model."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ...data.sources import Source
from ...data.transforms import ImageTransform
from ...device import DTYPES
from ..job import Job
from ..measurement import ANSWERS, Measurement, Variant
from .busy_clock import BusyClock
from .our_files import check_answers, read_inputs

TOP_K = 5


class FileDataset(Dataset[torch.Tensor | None]):
    """Images as tensors, like torchvision's `ImageFolder`; None for one that cannot be read.

    Args:
        sources: The images.
        transform: From a PIL image to a tensor.
    """

    def __init__(self, sources: Sequence[Source], transform: Any) -> None:
        self.sources, self.transform = sources, transform

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> torch.Tensor | None:
        try:
            content = self.sources[index].content()
            with Image.open(
                io.BytesIO(content) if isinstance(content, bytes) else content
            ) as image:
                x: torch.Tensor = self.transform(image.convert("RGB"))
                return x
        except Exception:  # Pillow raises a dozen types on damaged files
            return None


class TimmRun:
    """Classifies the images of a job each time it is called.

    Args:
        job: The job.
        model: timm's model.

    Attributes:
        facts: Fields of the measurement, after a run.
    """

    def __init__(self, job: Job, model: nn.Module) -> None:
        assert job.files is not None
        self.device, self.dtype = torch.device(job.device), DTYPES[job.dtype]
        self.model = model.to(self.device, self.dtype).eval()
        is_cuda = self.device.type == "cuda"
        if is_cuda:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.clock = BusyClock(self.device)
        self.facts: dict[str, Any] = {}
        dataset: Any = FileDataset(list(read_inputs(job.files)), timm_transform(job))
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=job.batch,
            num_workers=job.files.workers,
            collate_fn=_collate,
            pin_memory=is_cuda,
            persistent_workers=True,  # so that later runs do not start them again
        )

    def __call__(self) -> None:
        """Go through all images.

        Raises:
            InputError: None of them can be read.
        """
        check_answers(*self._run(self.loader), None)

    def warm_up(self) -> None:
        """Start the workers, and classify a first batch."""
        self._run(itertools.islice(self.loader, 1))

    @torch.inference_mode()
    def _run(self, batches: Iterable[tuple[torch.Tensor | None, int]]) -> tuple[int, int]:
        """Go through batches. Return how many images have an answer, and how many do not."""
        self.clock.reset()
        answers = failed = 0
        start = time.perf_counter()
        for x, bad in batches:
            failed += bad
            if x is None:
                continue
            x = x.to(self.device, non_blocking=True).to(self.dtype)
            with self.clock.running():
                found = self.model(x).float().softmax(-1)
            ranked = found.topk(min(TOP_K, found.shape[-1]))
            answers += len(list(zip(ranked.indices.tolist(), ranked.values.tolist(), strict=True)))
        seconds = time.perf_counter() - start
        self.facts |= {
            "inputs": answers,
            "unreadable": failed,
            "waiting": self.clock.idle_share(seconds),
        }
        return answers, failed


def timm_transform(job: Job) -> Any:
    """Return timm's preprocessing with the values of a job's model."""
    from timm.data.transforms_factory import create_transform

    entry = job.entry
    ours = ImageTransform.from_preprocessing(entry.preprocessing, entry.config["input_size"])
    return create_transform(
        (3, *ours.size),
        mean=ours.mean,
        std=ours.std,
        crop_pct=min(ours.size) / ours.resize,
        crop_mode=ours.crop_mode,
        interpolation=ours.interpolation,
    )


def build(job: Job, row: Measurement, model: nn.Module) -> list[Variant]:
    """Return the run of a job.

    Args:
        job: The job.
        row: Its measurement.
        model: timm's model.
    """
    run = TimmRun(job, model)
    row.part, row.params = ANSWERS, sum(p.numel() for p in model.parameters())
    return [Variant(row, run, run.warm_up, run.facts)]


def _collate(items: list[torch.Tensor | None]) -> tuple[torch.Tensor | None, int]:
    """Return the images that could be read as a batch, and the number of the others."""
    read = [item for item in items if item is not None]
    return (torch.stack(read) if read else None), len(items) - len(read)
