"""Run a pipeline on what a function of the library was given: one input, or several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from ..data import memory, sources
from ..data.memory import MediaInput
from ..data.sources import Source
from ..records import Record
from .pipeline import Pipeline


def run_pipeline(
    pipeline: Pipeline[Any], source: MediaInput | Iterable[MediaInput], expand: bool = False
) -> Record | list[Record]:
    """Return a record for a single image or video, else a list of records.

    Args:
        pipeline: What to compute.
        source: See `MediaInput`; a folder stands for the images and videos in it, and a batch for
            its items (`memory.is_batch`).
        expand: Read texts as the command line does: globs, URLs, `@list.txt` and `-`.

    Raises:
        UsageError: An input is of another type, a folder is empty, or a glob matches nothing; and
            see the pipeline.
    """
    if memory.is_batch(source, pipeline.takes):
        source = list(cast("Iterable[MediaInput]", source))
    single = memory.is_single(source)
    if not single and not isinstance(source, Iterable):
        memory.as_pixels(source)  # raises an error about its type
    given: list[Any] = [source] if single else list(cast("Iterable[MediaInput]", source))
    for item in given:
        if isinstance(item, str | Path):
            sources.check_inputs([str(item)], expand=expand)
    memory.wait_for_tensors(given)
    records = list(pipeline(_as_sources(given, expand)))
    names_one = single and not (isinstance(source, str | Path) and _names_several(source, expand))
    return records[0] if names_one else records


def _as_sources(given: Sequence[Any], expand: bool) -> Iterator[Source]:
    for index, item in enumerate(given):
        if isinstance(item, str | Path):
            yield from sources.expand([str(item)], literally=not expand)
        else:
            yield memory.as_source(item, index)


def _names_several(source: str | Path, expand: bool) -> bool:
    if expand:
        return not sources.names_one(str(source))
    return sources.is_folder(source) or sources.is_tar(source)
