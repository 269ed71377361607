"""Plain callables for engines such as Ray Data, Daft and Spark: a batch of rows in, a batch out.

A callable takes and returns a dictionary of arrays, one for each column. It can be pickled, and
loads its model when it is first called, in the worker. This file imports no engine.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, Unpack

import numpy as np
import torch

from ... import zoo
from ...data.sources import Source
from ...device import is_failure_of_device
from ...errors import HieraError, InputError, UsageError, first_line
from ...models import factory
from ...models.encoder import Encoder
from ...records import Kind, Record
from ..batching import BatchRunner
from ..decoded_input import DecodedInput
from ..features import FeatureExtractor, FeatureSelection
from ..pipeline import GivenModel, Owned, Pipeline, PipelineOptions
from ..predict import Predictor
from .batch_columns import DECODED, Columns, find_column, object_column, other_columns, read_sources
from .decoded_bytes import from_bytes, source_to_bytes, to_bytes
from .decoded_fit import DECODE_HINT, check_fits

P = TypeVar("P", bound=Pipeline[Any])
SEED = 0  # of random weights, so that all workers have the same


class ColumnsOptions(PipelineOptions, total=False):
    """Keyword arguments of `Embedder`, `Classifier` and `Decoder`.

    Keys:
        checkpoint: Weights in place of the model's own, as for `create_classifier`.
        column: Column that holds the inputs; None for the first of `decoded`, `image`, `bytes`,
            `path`, `url` and `uri` that exists.
        random_init: Use random weights, for dry runs.
        sampling, workers, device, dtype, batch_size, compile: See `PipelineOptions`.
    """

    checkpoint: str | Path | None
    column: str | None
    random_init: bool


class OnColumns(Generic[P]):
    """Base class of `Embedder`, `Classifier` and `Decoder`.

    Args:
        model: A name, hub repository, folder or file (see `create_model`); a built model, which is
            then pickled whole; or None for the task's default model of each kind of input.
        options: See `ColumnsOptions`.

    Raises:
        UsageError: An option has a value that it cannot have.
    """

    def __init__(
        self,
        model: str | Path | torch.nn.Module | None = None,
        **options: Unpack[ColumnsOptions],
    ) -> None:
        if not (model is None or isinstance(model, str | Path | torch.nn.Module)):
            raise UsageError(f"model is {model!r:.60}", "give a name, a path or a model")
        known: dict[str, Any] = dict(options)
        self.checkpoint: str | Path | None = known.pop("checkpoint", None)
        self.column: str | None = known.pop("column", None)
        self.random_init: bool = known.pop("random_init", False)
        self.model = model
        if self.checkpoint is not None and (self.random_init or isinstance(model, torch.nn.Module)):
            raise UsageError("a checkpoint goes with the name of a model only", "give one of both")
        self.options = known
        self._lock = threading.Lock()
        self._built: P | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {n: v for n, v in self.__dict__.items() if n not in ("_lock", "_built")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._lock, self._built = threading.Lock(), None

    @property
    def pipeline(self) -> P:
        """What computes the results. It is built in the process that first needs it.

        Raises:
            UsageError, CheckpointError, HubError, DeviceError: See `Pipeline`.
        """
        with self._lock:
            if self._built is None:
                self._built = self.build()
            return self._built

    def build(self) -> P:
        """Return what computes the results."""
        raise NotImplementedError

    def create(self, name: str | None, checkpoint: str | Path | None) -> Encoder:
        """Return a model of this task with its weights."""
        raise NotImplementedError

    def chosen_model(self) -> GivenModel:
        """Return the model in a form that `Pipeline` takes."""
        name = str(self.model) if isinstance(self.model, Path) else self.model
        if self.random_init:
            return _random_model(name)
        if self.checkpoint is None:
            return name
        assert name is None or isinstance(name, str)
        return Owned(self.create(name, self.checkpoint))

    def records(self, batch: Columns) -> list[Record]:
        """Return one record for each row, in order.

        Raises:
            UsageError: There is no column of inputs, or it holds values of another type.
            DeviceError: There is not enough memory for a single image or clip.
        """
        column = find_column(batch, self.column)
        if column == DECODED:
            return self._of_decoded(batch[column])
        return list(self.pipeline(read_sources(batch, column)))

    def _of_decoded(self, values: np.ndarray) -> list[Record]:
        """Return the records of what a `Decoder` wrote. A value that is damaged costs its row."""
        try:
            return self._compute(values, 0)
        except HieraError:
            raise
        except Exception as error:
            if is_failure_of_device(error):  # no row is at fault, and none can be computed
                raise
            # From one of the values: the others are not at fault.
            return [self._compute_alone(value, row) for row, value in enumerate(values)]

    def _compute_alone(self, value: bytes, row: int) -> Record:
        try:
            return self._compute([value], row)[0]
        except HieraError:
            raise
        except Exception as error:
            if is_failure_of_device(error):
                raise
            reason = InputError(f"not what this model takes ({first_line(error):.80})", DECODE_HINT)
            return Record(f"row {row}", row, "").fail(reason)

    def _compute(self, values: Sequence[bytes] | np.ndarray, first: int) -> list[Record]:
        """Return the records of values; `first` is the number of the first row."""
        inputs = [_read_decoded(value, row) for row, value in enumerate(values, first)]
        here = [i for i in inputs if isinstance(i, DecodedInput)]
        for decoded in here:
            try:
                check_fits(decoded, self.pipeline.runner)
            except InputError as error:
                decoded.record.fail(error)
                decoded.pixels = decoded.segments = None
        done = iter(self.pipeline.compute(here))
        later = iter(self.pipeline([i for i in inputs if isinstance(i, Source)]))
        return [next(done if isinstance(i, DecodedInput) else later) for i in inputs]

    def _with_status(self, batch: Columns, records: Sequence[Record]) -> Columns:
        """Return the columns that come through, and what became of each row."""
        column = find_column(batch, self.column)
        errors = ["" if r.error is None else str(r.error) for r in records]
        return {
            **other_columns(batch, column),
            "status": object_column([r.status for r in records]),
            "error": object_column(errors),
        }


class Embedder(OnColumns[FeatureExtractor]):
    """Computes the embedding of each row: columns in, columns out.

    >>> Embedder("hiera_base_224")({"path": np.array(["a.jpg", "b.jpg"])})["embedding"]

    The result has the columns of the batch, without pixels and content, and besides:

    - `embedding`, float32 [rows, c], or what `selection` selects, such as `stage1` [rows, h, w, c].
      The values of a row that failed are NaN.
    - `status`: `ok`, `partial` or `error`; and `error`: what went wrong, or "".

    Args:
        model: A classifier or an autoencoder; see `OnColumns`.
        selection: The features to return.
        options: See `ColumnsOptions`.

    Raises:
        UsageError: An option has a value that it cannot have.
    """

    def __init__(
        self,
        model: str | Path | torch.nn.Module | None = None,
        *,
        selection: FeatureSelection | None = None,
        **options: Unpack[ColumnsOptions],
    ) -> None:
        super().__init__(model, **options)
        self.selection = selection or FeatureSelection()
        self._shapes: dict[str, tuple[int, ...]] = {}

    def create(self, name: str | None, checkpoint: str | Path | None) -> Encoder:
        return factory.create_encoder(name, checkpoint)

    def build(self) -> FeatureExtractor:
        return _RowExtractor(self.chosen_model(), selection=self.selection, **self.options)

    def __call__(self, batch: Columns) -> Columns:
        """Return the features of each row; see `Embedder`.

        Raises:
            UsageError: There is no column of inputs, or a video has several vectors.
            CheckpointError, HubError, DeviceError: The model cannot be loaded or run.
        """
        if self.pipeline.sampling.is_split:
            raise UsageError("a row holds one vector", "leave out segments and every")
        records = self.records(batch)
        found = [r.result for r in records if r.result is not None]
        if found:
            self._shapes = {name: tuple(value.shape) for name, value in found[0].items()}
        elif not self._shapes:
            self._shapes = self._probe_shapes()
        columns = self._with_status(batch, records)
        for name, shape in self._shapes.items():
            values = np.full((len(records), *shape), np.nan, np.float32)
            for row, record in enumerate(records):
                if record.result is not None:
                    values[row] = record.result[name].numpy()
            columns[name] = values
        return columns

    def _probe_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the features, from a blank input: all rows so far have failed."""
        kind = (*self.pipeline.kinds, "image")[0]
        runner: Any = self.pipeline.runner(kind)
        frames = (runner.transform.frames,) if kind == "video" else ()
        blank = np.zeros((*frames, *runner.transform.size, 3), np.uint8)
        (result,) = runner.run([blank if kind == "image" else blank.astype(np.float32)])
        return {name: tuple(value.shape) for name, value in result.items()}


class _RowExtractor(FeatureExtractor):
    """Extracts one vector for each input. Hints do not name the parts of videos."""

    @property
    def may_split(self) -> bool:
        return False


class Classifier(OnColumns[Predictor]):
    """Computes the most probable classes of each row: columns in, columns out.

    >>> Classifier("hiera_base_224")({"path": np.array(["a.jpg", "b.jpg"])})["label"]

    This is not `hiera_core.Classifier`, which computes on batches of preprocessed views. The result
    has the columns of the batch, without pixels and content, and besides:

    - `topk_id` int64, `topk_prob` float32 and `topk_label`, [rows, k], most probable first; for a
      row that failed -1, NaN and "". `label` is the first label.
    - `status`: `ok`, `partial` or `error`; and `error`: what went wrong, or "".

    Args:
        model: A classifier; see `OnColumns`.
        topk: Number of classes.
        class_names: Names in place of the model's own.
        options: See `ColumnsOptions`.

    Raises:
        UsageError: An option has a value that it cannot have.
    """

    def __init__(
        self,
        model: str | Path | torch.nn.Module | None = None,
        *,
        topk: int = 5,
        class_names: Sequence[str] | None = None,
        **options: Unpack[ColumnsOptions],
    ) -> None:
        super().__init__(model, **options)
        self.topk, self.class_names = topk, class_names

    def create(self, name: str | None, checkpoint: str | Path | None) -> Encoder:
        return factory.create_classifier(name, checkpoint)

    def build(self) -> Predictor:
        return Predictor(
            self.chosen_model(), topk=self.topk, class_names=self.class_names, **self.options
        )

    def __call__(self, batch: Columns) -> Columns:
        """Return the classes of each row; see `Classifier`.

        Raises:
            UsageError: There is no column of inputs.
            CheckpointError, HubError, DeviceError: The model cannot be loaded or run.
        """
        records = self.records(batch)
        shape = len(records), self._width()
        ids, probs = np.full(shape, -1, np.int64), np.full(shape, np.nan, np.float32)
        labels = np.full(shape, "", dtype=object)
        for row, record in enumerate(records):
            for place, one in enumerate(record.topk):
                ids[row, place], probs[row, place] = one.id, one.prob
                labels[row, place] = one.label or ""
        return {
            **self._with_status(batch, records),
            "label": labels[:, 0].copy(),
            "topk_id": ids,
            "topk_prob": probs,
            "topk_label": labels,
        }

    def _width(self) -> int:
        """Return the number of classes in a row, which a model with few classes makes smaller."""
        classes = [self.pipeline.runner(k).model.config["num_classes"] for k in self.pipeline.kinds]
        return min([self.topk, *map(int, classes)])


class Decoder(OnColumns[Pipeline[Any]]):
    """Decodes each row to the pixels that a model sees, on machines or cores without the model.

    >>> Decoder("hiera_base_224")({"path": np.array(["a.jpg"])})["decoded"]

    The result has the columns of the batch, without pixels and content, and `decoded`: bytes for
    the same column of `Embedder` and `Classifier`, with 8-bit pixels. A row that cannot be read has
    its error in there. Reading the bytes runs no code.

    Args:
        model, options: Those of the `Embedder` or `Classifier`. Its weights are read for its
            preprocessing, and dropped.

    Attributes:
        may_split: Whether hints may name the parts of videos, which an `Embedder` does not take.

    Raises:
        UsageError: An option has a value that it cannot have.
    """

    may_split = True

    def create(self, name: str | None, checkpoint: str | Path | None) -> Encoder:
        return factory.create_encoder(name, checkpoint)

    def build(self) -> _DecodingPipeline:
        pipeline = _DecodingPipeline(self.chosen_model(), **self.options)
        pipeline.hints_at_parts = self.may_split
        return pipeline

    def __call__(self, batch: Columns) -> Columns:
        """Return each row decoded; see `Decoder`.

        Raises:
            UsageError: There is no column of inputs.
            CheckpointError, HubError: The model cannot be loaded.
        """
        column = find_column(batch, self.column)
        found = self.decode(read_sources(batch, column))
        return {**other_columns(batch, column), DECODED: object_column(found)}

    def decode(self, inputs: Iterator[Source]) -> list[bytes]:
        """Return the bytes of each input, in order."""
        pipeline = self.pipeline
        with ThreadPoolExecutor(pipeline.workers, thread_name_prefix="decode") as pool:
            return list(pool.map(self._decode_one, enumerate(inputs)))

    def _decode_one(self, item: tuple[int, Source]) -> bytes:
        row, source = item
        index = row if source.position is None else source.position
        is_video = source.pixels is None and source.looks_like_video
        if is_video and source.error is None and self.pipeline.sampling.is_split:
            # Its segments may be any number, and are decoded one by one.
            return source_to_bytes(source, index)
        return to_bytes(self.pipeline.decode(source, index))


class _DecodingPipeline(Pipeline["_Preprocessing"]):
    """Decodes for a model that is elsewhere."""

    default_models: ClassVar[dict[Kind, str]] = Predictor.default_models
    splits_videos: ClassVar[bool] = True
    hints_at_parts = True

    @property
    def may_split(self) -> bool:
        return self.hints_at_parts

    def load(self, name: str) -> Encoder:
        return factory.create_encoder(name)

    def make_runner(self, model: Any, **options: Any) -> _Preprocessing:
        return _Preprocessing(model, batch_size=options.get("batch_size"))


class _Preprocessing(BatchRunner[Any, Any]):
    """What decoding needs to know about a model. Its weights are dropped."""

    def __init__(self, model: Any, batch_size: int | None = None) -> None:
        super().__init__(model, device="cpu", batch_size=batch_size)
        del self.model


def _read_decoded(value: bytes, row: int) -> DecodedInput | Source:
    try:
        return from_bytes(bytes(value))
    except (InputError, TypeError) as error:
        failed = error if isinstance(error, InputError) else InputError("no bytes")
        return DecodedInput(Record(f"row {row}", row, "").fail(failed))


def _random_model(name: Any) -> GivenModel:
    """Return a model with random weights, or, without a name, a function that builds one."""

    def build(kind: Kind) -> Encoder:
        torch.manual_seed(SEED)
        model: Encoder = factory.create_model(name or Predictor.default_models[kind])
        return model

    if name is not None and name not in zoo.names():
        raise UsageError("random_init takes no weights", "give a name from `hiera models`")
    return build if name is None else Owned(build("image"))
