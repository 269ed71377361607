"""How pre-training comes along, as pictures: the same few samples after every pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..data.datasets import MediaDataset
from ..inference.reconstruct import PICTURE_NAMES, reconstruct
from ..models.mae import MaskedAutoencoderHiera
from ..viz import grid
from .build import TrainingSetup
from .dataloader import EvalDataset
from .distributed import World, unwrap_model
from .sampler import SampleKey
from .validate import ema_weights

FOLDER = "pictures"  # within a run's
COUNTS = {"images": 4, "clips": 2}


class Previews:
    """Reconstructions of fixed samples under fixed masks, a PNG after each pass.

    Args:
        parts: of the run.
        samples: held-out ones, where there are; a few, evenly spread, are shown.
        folder: of the run.
        world: every process computes (parameters may be spread over them), the first one writes.
    """

    def __init__(
        self, parts: TrainingSetup, samples: MediaDataset, folder: Path, world: World
    ) -> None:
        self.parts, self.folder, self.world = parts, folder / FOLDER, world
        count = min(COUNTS[parts.unit], len(samples))
        places = np.linspace(0, len(samples) - 1, count).round().astype(int).tolist()
        read = [
            EvalDataset(samples, parts.transform, parts.masking)[SampleKey(0, i)] for i in places
        ]
        views = [i.views for i in read if i.views is not None]
        units = [i.units for i in read if i.units is not None]
        self.x = torch.cat(views).to(parts.device) if views else None
        self.units = torch.cat(units).to(parts.device) if units else None

    def draw(self, epoch: int) -> None:
        """Write `pictures/epoch-0001.png` and so on.

        Raises:
            OutputError: it cannot be written.
        """
        if self.x is None:  # all of them unreadable
            return
        model, precision = unwrap_model(self.parts.training.model), self.parts.precision
        assert isinstance(model, MaskedAutoencoderHiera)
        half = precision is not torch.float32
        model.eval()
        with (
            ema_weights(self.parts.training),
            torch.autocast(self.x.device.type, precision if half else None, enabled=half),
        ):
            found = reconstruct(model, self.x, mask=self.units)
        model.train()
        if not self.world.is_main_process:
            return
        shown = [getattr(found, name) for name in PICTURE_NAMES]
        if self.parts.clip is None:
            picture = grid.captioned_grid(
                [list(map(grid.to_uint8, row)) for row in zip(*shown, strict=True)], PICTURE_NAMES
            )
        else:  # b c t y x: three rows of frames a clip
            rows = [clip.transpose(0, 1) for three in zip(*shown, strict=True) for clip in three]
            cells = [list(grid.to_uint8(frames)) for frames in rows]
            picture = grid.captioned_grid(cells, rows=PICTURE_NAMES * len(found.mask))
        self.folder.mkdir(exist_ok=True)
        grid.save_png(picture, self.folder / f"epoch-{epoch:04}.png")
