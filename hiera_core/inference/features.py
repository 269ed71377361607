"""Features of images and videos: one vector for each input, or stage maps in spatial order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Unpack, overload

import numpy as np
import torch
from PIL import Image

from .. import zoo
from ..data.clip_reader import DecodedSegment
from ..data.clip_sampling import Sampling
from ..data.memory import InMemory, MediaInput
from ..data.sources import Source
from ..device import Devices
from ..errors import InputError, UsageError, is_whole
from ..models import factory
from ..models.attention_maps import attention_grids, attention_maps
from ..models.encoder import Encoder, unwrap_model
from ..records import Kind, Record
from ..viz.attention_overlay import draw_attention
from ..viz.feature_maps import draw_feature_maps
from .batching import BatchOptions, BatchRunner
from .decoded_input import Pixels, on_host
from .feature_formats import TIMES
from .one_call import run_pipeline
from .pipeline import GivenModel, Pipeline, PipelineOptions
from .segments import run_segments

Tensors = dict[str, torch.Tensor]  # float32 on the CPU, by name; times are float64


class Features(Tensors):
    """The features of one input: float32 tensors on the CPU, by name. Times are float64.

    Attributes:
        input: Name of the input.
        error: Why the input could not be read, or None. Then there are no tensors, and looking for
            one raises this error.
    """

    def __init__(self, tensors: Tensors, input: str, error: InputError | None = None) -> None:
        super().__init__(tensors)
        self.input, self.error = input, error

    def __missing__(self, name: str) -> torch.Tensor:
        raise KeyError(name) if self.error is None else self.error

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        if self.error is None:  # a plain type, which `torch.load` reads
            return OrderedDict, (list(self.items()),)
        return type(self), (dict(self), self.input, self.error)


@overload
def features(  # type: ignore[overload-overlap]  # a str is an Iterable[str], too
    source: str | Path | np.ndarray | torch.Tensor,  # tensors can be batches
    model: str | Path | torch.nn.Module | None = None,
    *,
    stages: int | Sequence[int] | None = (),
    pool: bool = True,
    segments: float | None = None,
    expand: bool = False,
    **options: Unpack[PipelineOptions],
) -> Features | list[Features]: ...


@overload
def features(  # type: ignore[overload-overlap]
    source: InMemory,
    model: str | Path | torch.nn.Module | None = None,
    *,
    stages: int | Sequence[int] | None = (),
    pool: bool = True,
    segments: float | None = None,
    expand: bool = False,
    **options: Unpack[PipelineOptions],
) -> Features: ...


@overload
def features(
    source: Iterable[MediaInput],
    model: str | Path | torch.nn.Module | None = None,
    *,
    stages: int | Sequence[int] | None = (),
    pool: bool = True,
    segments: float | None = None,
    expand: bool = False,
    **options: Unpack[PipelineOptions],
) -> list[Features]: ...


def features(
    source: MediaInput | Iterable[MediaInput],
    model: str | Path | torch.nn.Module | None = None,
    *,
    stages: int | Sequence[int] | None = (),
    pool: bool = True,
    segments: float | None = None,
    expand: bool = False,
    **options: Unpack[PipelineOptions],
) -> Features | list[Features]:
    """Return the features of images and videos with one call.

    >>> hiera_core.features("photo.jpg")["embedding"]
    >>> hiera_core.features("film.mp4", segments=2.0)["embedding"]

    Args:
        source, expand: See `predict`.
        model, options: See `FeatureExtractor` and `PipelineOptions`.
        stages, pool: See `FeatureSelection`.
        segments: Length in seconds of the segments into which videos are split; see
            `FeatureExtractor`. It takes the place of `sampling.segments`.

    Returns:
        A dictionary of tensors for a single image or video, else a list of them in the order of the
        inputs; see `FeatureExtractor`. As for `predict`, an input that cannot be read is not raised
        as an error: its dictionary is empty, and has the error in the attribute `error`.

    Raises:
        UsageError: A folder is empty, or an input is of another type; see also `FeatureExtractor`.
    """
    chosen = None if stages is None else _stage_numbers(stages)
    selection = FeatureSelection(chosen, pool)
    if segments is not None:
        sampling = options.get("sampling") or Sampling()
        options["sampling"] = replace(sampling, segments=segments)
    found = run_pipeline(FeatureExtractor(model, selection=selection, **options), source, expand)
    return [_features_of(r) for r in found] if isinstance(found, list) else _features_of(found)


def _stage_numbers(stages: object) -> tuple[int, ...]:
    """Return stages as a tuple.

    Raises:
        UsageError: They are no numbers.
    """
    given = (stages,) if is_whole(stages) else stages
    if not isinstance(given, Sequence) or not all(map(is_whole, given)):
        raise UsageError(f"stages is {stages!r:.60}", "give numbers of stages, such as [1, 3]")
    return tuple(int(stage) for stage in given)


def _features_of(record: Record) -> Features:
    if record.error is None:
        return Features(record.result, record.input)
    error = InputError(f"{record.input}: {record.error.message}", record.error.hint)
    return Features({}, record.input, error)


@dataclass(frozen=True)
class FeatureSelection:
    """The features to return for an input.

    Args:
        stages: Stages whose maps are returned, counted from 1. (): the model's embedding (if
            `pool`) or the map of the last stage (otherwise). None: all stages.
        pool: Average the maps over space and time.
        attention: Also return the attention weights of this block, counted from 1.
    """

    stages: tuple[int, ...] | None = ()
    pool: bool = True
    attention: int | None = None

    def check_views(self, sampling: Sampling, draws: bool = False) -> None:
        """Check that these features exist for the parts of a video that are sampled.

        Args:
            sampling: Which parts of a video the model sees.
            draws: Whether the features are drawn.

        Raises:
            UsageError: Maps or attention of several views or segments, or drawings of segments.
        """
        if self.is_spatial and sampling.views != (1, 1):
            raise UsageError(
                "maps of several views show different parts and cannot be averaged",
                "use one clip and one crop, or pooled features",
            )
        if sampling.is_split and (self.is_spatial or draws):
            raise UsageError(
                "the parts of a video get vectors only: no maps, attention or drawings",
                "use pooled features (--pool mean), or leave out --segments and --every",
            )

    @property
    def is_spatial(self) -> bool:
        """Whether features keep the positions: maps or attention."""
        return not self.pool or self.attention is not None

    def stages_of(self, depth: int, name: str) -> tuple[int, ...]:
        """Return the selected stages of the model `name`, which has `depth` stages.

        Raises:
            UsageError: The model has no such stage.
        """
        if self.stages is None:
            return tuple(range(1, depth + 1))
        if any(not 1 <= stage <= depth for stage in self.stages):
            raise UsageError(
                f"{name} has {depth} stages",
                f"choose among 1 to {depth}, not {', '.join(map(str, self.stages))}",
            )
        return self.stages or (() if self.pool else (depth,))


class BatchExtractor(BatchRunner[Encoder, Tensors]):
    """Computes the features of preprocessed views.

    A result holds `embedding` [c], or `stage1`, `stage2`, ... as [*grid, c] (pooled: [c]). With
    `keep_maps` it also holds maps to draw, `map1`, ...: of the selected stages, or of all if none
    is selected. `attention` [heads, queries, keys] is in the order of the grid.

    Args:
        model: A built model.
        selection: The features to return.
        keep_maps: Also return maps to draw.
        options: See `BatchRunner`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        selection: FeatureSelection,
        *,
        keep_maps: bool = False,
        **options: Unpack[BatchOptions],
    ) -> None:
        super().__init__(unwrap_model(model), **options)
        self.selection = selection
        self.stages = selection.stages_of(len(self.model.stage_ends), self.name)
        self.keep_maps = keep_maps
        if selection.attention is not None:
            attention_grids(self.model, selection.attention)  # raises an error about the block
        self.bind()

    def bind(self) -> None:
        self._features = self.compiled(self._forward)

    def _forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        _, ends = self.model.encode(x, collect=True)
        return self.model.embedding(ends), self.model.stage_maps(ends, size=x.shape[2:])

    def compute(self, x: torch.Tensor) -> Tensors:
        embedding, maps = self._features(x.to(self.dtype))
        found: Tensors = {}
        if not self.stages:
            found["embedding"] = embedding.float()
        for stage in self.stages:
            values = maps[stage - 1].float()
            values = values.flatten(1, -2).mean(1) if self.selection.pool else values
            found[f"stage{stage}"] = values
        if self.keep_maps:
            drawn = self.stages or range(1, len(maps) + 1)
            found |= {f"map{stage}": maps[stage - 1].float() for stage in drawn}
        if self.selection.attention is not None:
            # One by one, because the weights of a batch can be large.
            block = self.selection.attention
            each = [attention_maps(self.model, one[None], block).weights.cpu() for one in x]
            found["attention"] = torch.cat(each)
        return found

    def _split(self, found: Tensors) -> Sequence[Tensors]:
        count = len(next(iter(found.values())))
        return [{name: values[i] for name, values in found.items()} for i in range(count)]

    def cell_size(self, stage: int) -> tuple[int, ...]:
        """Return how many pixels (and frames) a cell of a stage's map covers."""
        return self.model.reduction(stage - 1)


class FeatureExtractor(Pipeline[BatchExtractor]):
    """Extracts the features of a stream of images and videos.

    Records have a `result`, a dictionary of float32 tensors (see `BatchExtractor`). For a video it
    holds the features of the centre clip, or, with more views, their average. If the sampling
    splits a video, it holds [segments, c], and `start` and `end` [segments] in seconds, float64.

    Args:
        model: See `Pipeline`. It may be a classifier or an autoencoder. The defaults are
            hiera_base_224 and hiera_base_16x224.
        selection: The features to return.
        visualize: Also draw the stage maps as a thumbnail of each record, see `draw_feature_maps`.
        sampling: Which parts of a video the model sees; by default one clip and one crop. With
            `segments` or `every`, a video has a vector for each segment or single frame.
        workers, device, dtype, batch_size, compile: See `PipelineOptions`.

    Raises:
        UsageError: The model, stage or block is unknown, or does not suit the sampling; see also
            `FeatureSelection.check_views`.
        CheckpointError, HubError: See `read_checkpoint`.
        DeviceError: The device does not exist.
    """

    default_models: ClassVar[dict[Kind, str]] = {
        "image": zoo.DEFAULT_IMAGE_MODEL,
        "video": zoo.DEFAULT_VIDEO_MODEL,
    }
    splits_videos: ClassVar[bool] = True

    @property
    def may_split(self) -> bool:
        return not (self.selection.is_spatial or self.visualize)

    def __init__(
        self,
        model: GivenModel = None,
        *,
        selection: FeatureSelection | None = None,
        visualize: bool = False,
        sampling: Sampling | None = None,
        workers: int | None = None,
        device: Devices = "auto",
        dtype: str | torch.dtype = "auto",
        batch_size: int | None = None,
        compile: bool = False,
    ) -> None:
        self.selection, self.visualize = selection or FeatureSelection(), visualize
        sampling = sampling or Sampling()
        sampling = replace(sampling, clips=sampling.clips or 1, crops=sampling.crops or 1)
        self.selection.check_views(sampling, visualize)
        # This function returns what an earlier run wrote for an input, given the input's name and
        # index; see `FeatureStore.find`.
        self.find_done: Callable[[str, int], dict[str, Any] | None] = lambda name, index: None
        super().__init__(
            model,
            sampling=sampling,
            workers=workers,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            compile=compile,
        )

    def finished_record(self, source: Source, index: int) -> Record | None:
        done = self.find_done(source.name, index)
        if done is None:
            return None
        record = Record(source.name, index, done["model"], done["kind"], id=source.id)
        shapes = {name: {"shape": shape} for name, shape in done["shapes"].items()}
        times = {name: done[name] for name in TIMES if name in done}
        record.extra = {"features": shapes, **times, "file": done["file"]}
        return record

    def load(self, name: str) -> Encoder:
        return factory.create_encoder(name)

    def make_runner(self, model: torch.nn.Module, **options: Any) -> BatchExtractor:
        return BatchExtractor(model, self.selection, keep_maps=self.visualize, **options)

    @property
    def looks_at_pixels(self) -> bool:
        return self.visualize

    def finish_image(self, record: Record, pixels: Pixels, result: Tensors) -> None:
        self._finish(record, result, on_host(pixels)[None] if self.visualize else None)

    def finish_video(self, record: Record, segments: Iterator[DecodedSegment]) -> None:
        found: list[Tensors] = []
        times: list[tuple[float, float]] = []
        for segment, results in run_segments(self.runner(record.kind), segments):
            found.append({n: torch.stack([r[n] for r in results]).mean(0) for n in results[0]})
            times.append((segment.start, segment.end))
        if self.sampling.is_split:
            vectors = {n: torch.stack([one[n] for one in found]) for n in found[0]}
            start, end = torch.tensor(times, dtype=torch.float64).unbind(1)
            self._finish(record, {**vectors, "start": start, "end": end}, None)
            return
        # Maps of different views show different places, so only those of the first view are drawn.
        found[0] |= {n: v for n, v in results[0].items() if n.startswith("map")}
        self._finish(record, found[0], segment.views[0] if self.visualize else None)

    def _finish(self, record: Record, found: Tensors, frames: np.ndarray | None) -> None:
        """Complete a record. `frames` is the input, [t, height, width, 3] in 0..255, to draw."""
        if not all(bool(values.isfinite().all()) for values in found.values()):
            record.fail(InputError("the features are not finite", "use --dtype bf16 or fp32"))
            return
        runner = self.runner(record.kind)
        if self.visualize and frames is not None:
            record.thumbnails = [self._draw(found, frames, runner)]
        # Tensors of inference mode could not be used in training.
        kept = {n: v for n, v in found.items() if not n.startswith("map")}
        record.result = {n: v.clone() if v.is_inference() else v for n, v in kept.items()}
        record.extra["features"] = {
            name: {"shape": list(values.shape)} | _cell_of(name, runner)
            for name, values in record.result.items()
            if name not in TIMES
        }
        record.extra |= {name: found[name].tolist() for name in TIMES if name in found}

    def _draw(self, found: Tensors, frames: np.ndarray, runner: BatchExtractor) -> Image.Image:
        """Draw the attention weights, or else the maps, beside the input."""
        if "attention" in found:
            grid = attention_grids(runner.model, self.selection.attention or -1)[1]
            return draw_attention(found["attention"], grid, frames)
        maps = {int(n[3:]): values for n, values in found.items() if n.startswith("map")}
        return draw_feature_maps(maps, frames, runner.kind)


def _cell_of(name: str, runner: BatchExtractor) -> dict[str, list[int]]:
    if not name.startswith("stage"):
        return {}
    return {"cell": list(runner.cell_size(int(name.removeprefix("stage"))))}
