"""Features of a stream of pictures and videos: one vector an input, or maps in spatial order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from . import factory, panels, zoo
from .errors import InputError, UsageError
from .inputs import Source
from .model import HieraEncoder
from .pipeline import Pipeline, of_whole_videos, run_one
from .preprocess.video import Piece, Sampling
from .records import Kind, Record
from .runner import Runner

Features = dict[str, torch.Tensor]  # float32 on the CPU, by name


@dataclass(frozen=True)
class Wanted:
    """Which features of an input.

    Args:
        stages: of whose maps, counted from 1; () for the model's embedding (with `pool`) or the
            last stage's map (without); None for all stages.
        pool: average the maps over space and time.
    """

    stages: tuple[int, ...] | None = ()
    pool: bool = True

    def of(self, depth: int, name: str) -> tuple[int, ...]:
        """The stages of a model that has `depth` of them.

        Raises:
            UsageError: it has no such stage.
        """
        if self.stages is None:
            return tuple(range(1, depth + 1))
        if any(not 1 <= stage <= depth for stage in self.stages):
            raise UsageError(
                f"{name} has {depth} stages", f"choose among 1 to {depth}, not {self.stages}"
            )
        return self.stages or (() if self.pool else (depth,))


class Extractor(Runner[HieraEncoder, Features]):
    """Features of preprocessed views.

    A result holds `embedding` [c], or `stage1`, `stage2`, ... as [*grid, c] (pooled: [c]), and
    `maps` for the pictures where asked for. Options: see `Runner`.
    """

    def __init__(
        self, model: HieraEncoder, wanted: Wanted, *, keep_maps: bool = False, **options: Any
    ) -> None:
        super().__init__(model, **options)
        self.wanted = wanted
        self.stages = wanted.of(len(self.model.stage_ends), self.name)
        self.keep_maps = keep_maps  # of the stages chosen, or of all, to draw them
        self._features = self.compiled(self._forward)

    def _forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        _, ends = self.model.encode(x, collect=True)
        return self.model.embedding(ends), self.model.stage_maps(ends)

    def compute(self, x: torch.Tensor) -> Sequence[Features]:
        embedding, maps = self._features(x.to(self.dtype))
        found: Features = {}
        if not self.stages:
            found["embedding"] = embedding.float().cpu()
        for stage in self.stages:
            values = maps[stage - 1].float()
            values = values.flatten(1, -2).mean(1) if self.wanted.pool else values
            found[f"stage{stage}"] = values.cpu()
        if self.keep_maps:
            drawn = self.stages or range(1, len(maps) + 1)
            found |= {f"map{stage}": maps[stage - 1].float().cpu() for stage in drawn}
        return [{name: values[i] for name, values in found.items()} for i in range(len(x))]

    def cell(self, stage: int) -> tuple[int, ...]:
        """Pixels (and frames) that a cell of a stage's map stands for."""
        return self.model.reduction(stage - 1)


class FeatureExtractor(Pipeline[Extractor]):
    """Features of what is on pictures and in videos.

    Records have `result`, a dictionary of float32 tensors (see `Extractor`); of a video that of its
    centre clip, or with more views their average.

    Args:
        model: see `Pipeline`: classifiers and autoencoders; the defaults are hiera_base_224 and
            hiera_base_16x224.
        wanted: which features.
        visualize: also draw the stages: records get `shots`, one picture (see `draw`).
        sampling: which parts of a video are seen; by default one clip, one crop.
        options: `workers`, `device`, `dtype`, `batch_size`, `compile`, as for `Pipeline`.

    Raises:
        UsageError: an unknown model or stage, maps of several views, or pieces of videos.
        CheckpointError, HubError: see `weights.read`.
        DeviceError: the device is not there.
    """

    default_models: ClassVar[dict[Kind, str]] = {
        "image": zoo.DEFAULT_IMAGE_MODEL,
        "video": zoo.DEFAULT_VIDEO_MODEL,
    }

    def __init__(
        self,
        model: str | HieraEncoder | Callable[[Kind], HieraEncoder] | None = None,
        *,
        wanted: Wanted | None = None,
        visualize: bool = False,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> None:
        self.wanted, self.visualize = wanted or Wanted(), visualize
        sampling = of_whole_videos(sampling)
        if not self.wanted.pool and sampling.views != (1, 1):
            raise UsageError(
                "maps of several views show different parts and cannot be averaged",
                "use one clip and one crop, or pooled features",
            )
        # What an earlier run has of an input, by its name and place; see `FeatureStore.known`.
        self.done: Callable[[str, int], dict[str, Any] | None] = lambda name, index: None
        super().__init__(model, sampling=sampling, **options)

    def known(self, source: Source, index: int) -> Record | None:
        found = self.done(source.name, index)
        if found is None:
            return None
        record = Record(source.name, index, found["model"], found["kind"])
        shapes = {name: {"shape": shape} for name, shape in found["shapes"].items()}
        record.extra = {"features": shapes, "file": found["file"]}
        return record

    def load(self, name: str) -> HieraEncoder:
        return factory.create_encoder(name)

    def make_runner(self, model: HieraEncoder, **options: Any) -> Extractor:
        return Extractor(model, self.wanted, keep_maps=self.visualize, **options)

    def see_picture(self, record: Record, pixels: np.ndarray, result: Features) -> None:
        self._take(record, result, pixels[None])

    def see_video(self, record: Record, pieces: Iterator[Piece]) -> None:
        (piece,) = pieces
        results = self.runner("video").run(piece.views)
        together = {n: torch.stack([r[n] for r in results]).mean(0) for n in results[0]}
        # Maps are of one place each: those of the first view are drawn, beside its frames.
        together |= {n: v for n, v in results[0].items() if n.startswith("map")}
        self._take(record, together, piece.views[0])

    def _take(self, record: Record, found: Features, frames: np.ndarray) -> None:
        """Write down what was found. `frames` [t, height, width, 3] in 0..255."""
        if not all(bool(values.isfinite().all()) for values in found.values()):
            record.fail(InputError("the features are not finite", "use --dtype bf16 or fp32"))
            return
        runner = self.runner(record.kind)
        if self.visualize:
            record.shots = [draw(found, frames, runner)]
        record.result = {n: v for n, v in found.items() if not n.startswith("map")}
        record.extra["features"] = {
            name: {"shape": list(values.shape)} | _cell_of(name, runner)
            for name, values in record.result.items()
        }


def features(
    source: str | Path | Iterable[str | Path],
    model: str | HieraEncoder | None = None,
    *,
    stages: Sequence[int] | None = (),
    pool: bool = True,
    **options: Any,
) -> Any:
    """Features in one line: `hiera_core.features("x.jpg")["embedding"]`.

    Args:
        source: a picture or video, a folder, glob or URL, or several of them.
        stages, pool: see `Wanted`.
        model, options: see `FeatureExtractor`.

    Returns:
        A dictionary of float32 tensors for a single file or URL, else a list of them in the order
        of the inputs.

    Raises:
        InputError: an input that cannot be read.
        UsageError: an empty folder, a glob that matches nothing; and as `FeatureExtractor`.
    """
    wanted = Wanted(None if stages is None else tuple(stages), pool)
    found = run_one(FeatureExtractor(model, wanted=wanted, **options), source)
    records = found if isinstance(found, list) else [found]
    for record in records:
        if record.error is not None:
            raise InputError(f"{record.input}: {record.error.message}", record.error.hint)
    results = [record.result for record in records]
    return results if isinstance(found, list) else results[0]


def draw(found: Features, frames: np.ndarray, runner: Extractor) -> Image.Image:
    """The input beside its stages' maps, each as its first three principal components; of a video a
    strip of its frames above those of the maps."""
    maps = {int(name[3:]): values for name, values in found.items() if name.startswith("map")}
    colours = {stage: panels.principal_colours(values) for stage, values in maps.items()}
    sizes = {s: "x".join(map(str, v.shape)) for s, v in maps.items()}
    captions = ["input", *(f"stage {s}, {sizes[s]}" for s in maps)]
    shown = frames.round().clip(0, 255).astype(np.uint8)
    if runner.kind == "image":
        size = shown.shape[1:3]
        cells = [shown[0], *(_enlarged(colours[s], size) for s in maps)]
        return panels.grid([cells], columns=captions)
    count = next(iter(maps.values())).shape[0]
    strip = shown[:: len(shown) // count]  # the first frame of each token
    rows = [list(strip[:count])]
    rows += [[_enlarged(c, shown.shape[1:3]) for c in colours[s]] for s in maps]
    return panels.grid(rows, rows=captions)


def _enlarged(cells: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """A map's cells as squares of the input's size."""
    image = Image.fromarray(cells).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.asarray(image)


def _cell_of(name: str, runner: Extractor) -> dict[str, Any]:
    if not name.startswith("stage"):
        return {}
    return {"cell": list(runner.cell(int(name.removeprefix("stage"))))}
