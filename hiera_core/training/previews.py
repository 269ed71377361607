"""Pictures of reconstructions after each pass over the data in pre-training, always of the same
samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..atomic import translate_write_errors
from ..data.datasets import MediaDataset
from ..inference.reconstruct import PICTURE_NAMES, Reconstruction, reconstruct
from ..models.mae import MaskedAutoencoderHiera
from ..viz import grid
from .build import TrainingSetup
from .dataloader import EvalDataset
from .distributed import World, unwrap_model
from .sampler import SampleKey
from .validate import ema_weights

FOLDER, NAME = "pictures", "epoch-{:04}.png"  # in the folder of the run
COUNTS = {"images": 4, "clips": 2}  # number of samples


class Previews:
    """Reconstructions of a few samples, always under the same masks: one PNG after each pass over
    the data.

    All processes compute them, because parameters may be sharded. The main process writes them.

    Args:
        setup: The setup of the run.
        samples: The data set from which the samples are taken, evenly spaced.
        folder: Folder of the run.
        world: The processes of the run.
    """

    def __init__(
        self, setup: TrainingSetup, samples: MediaDataset, folder: Path, world: World
    ) -> None:
        self.setup, self.folder, self.world = setup, folder / FOLDER, world
        count = min(COUNTS[setup.unit], len(samples))
        numbers = np.linspace(0, len(samples) - 1, count).round().astype(int).tolist()
        dataset = EvalDataset(samples, setup.transform, setup.masking)
        loaded = [dataset[SampleKey(0, number)] for number in numbers]
        views = [sample.views for sample in loaded if sample.views is not None]
        units = [sample.visible_units for sample in loaded if sample.visible_units is not None]
        normalise = setup.transform.normalise
        self.x = normalise(torch.cat(views).to(setup.device)) if views else None
        self.visible_units = torch.cat(units).to(setup.device) if units else None

    def draw(self, epoch: int) -> None:
        """Write `pictures/epoch-NNNN.png`.

        Args:
            epoch: Number of the pass, from 1.

        Raises:
            OutputError: The file cannot be written.
        """
        if self.x is None:  # all samples are unreadable
            return
        model, precision = unwrap_model(self.setup.training.model), self.setup.precision
        assert isinstance(model, MaskedAutoencoderHiera)
        autocast = precision is not torch.float32
        model.eval()
        with (
            ema_weights(self.setup.training),
            torch.autocast(self.x.device.type, precision if autocast else None, enabled=autocast),
        ):
            result = reconstruct(model, self.x, keep_ids=self.visible_units)
        model.train()
        with self.world.main_process_step() as is_main, translate_write_errors(self.folder):
            if is_main:
                self._write(result, epoch)

    def _write(self, result: Reconstruction, epoch: int) -> None:
        """Write the picture of a pass."""
        pictures = [getattr(result, name) for name in PICTURE_NAMES]
        if self.setup.clip is None:  # b c y x: a row for each image
            cells = [list(map(grid.to_uint8, row)) for row in zip(*pictures, strict=True)]
            picture = grid.captioned_grid(cells, PICTURE_NAMES)
        else:  # b c t y x: three rows of frames for each clip
            rows = [clip.transpose(0, 1) for row in zip(*pictures, strict=True) for clip in row]
            cells = [list(grid.to_uint8(frames)) for frames in rows]
            picture = grid.captioned_grid(cells, rows=PICTURE_NAMES * len(result.mask))
        self.folder.mkdir(exist_ok=True)
        grid.save_png(picture, self.folder / NAME.format(epoch))
