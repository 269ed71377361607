"""Options of `hiera features` alone, as Annotated types."""

from __future__ import annotations

import re
import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from . import options, output_formats


class Pool(StrEnum):
    """Values of --pool."""

    mean = "mean"
    none = "none"


class SaveAs(StrEnum):
    """Values of --save-as."""

    safetensors = "safetensors"
    npz = "npz"
    parquet = "parquet"


def _parse_block(text: str) -> int:
    """Return the number of a block.

    Raises:
        BadParameter: It is none. The message proposes what was meant: a path is an input, or where
            drawings go.
    """
    try:
        number = int(text)
    except ValueError:
        message = f"{text!r} is not the number of a block, counted from 1"
        if re.search("[^0-9.,x-]", text):
            option = "" if Path(text).is_file() else "--visualize "
            message += f"; for block 5, write --attention 5 {option}{shlex.quote(text)}"
        raise typer.BadParameter(message) from None
    if number < 1:
        raise typer.BadParameter("blocks are counted from 1")
    return number


ReturnIntermediatesOpt = Annotated[
    bool,
    typer.Option(
        "--return-intermediates",
        help="Return the feature map of every stage, in spatial order, instead of a vector.",
    ),
]
SizeOpt = Annotated[
    str | None,
    typer.Option(
        help="Input size in pixels: 384, or 224x448 for height x width. For videos, with the "
        "number of frames: 16x256x256. Position embeddings are resized.",
        metavar="SIZE",
        show_default="the size of the model",
    ),
]
StagesOpt = Annotated[
    str | None,
    typer.Option(
        help="Return the feature maps of these stages, counted from 1.",
        metavar="1,2,...",
        show_default=False,
    ),
]
PoolOpt = Annotated[
    Pool | None,
    typer.Option(
        help="mean: average the features over space and time, which gives vectors. none: return "
        "maps.",
        show_default="mean, or none with --stages or --return-intermediates",
    ),
]
AttentionOpt = Annotated[
    int | None,
    typer.Option(
        parser=_parse_block,
        help="Also return the attention weights of this block, [heads, queries, keys] in the order "
        "of the grid. With --visualize, they are drawn over the input.",
        metavar="BLOCK",
        show_default=False,
    ),
]
FeaturesOutputOpt = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        parser=options.parse_place,
        metavar="FILE|DIR",
        help="Where to write the features: a file (.safetensors, .npz or .parquet; for one array "
        ".npy), or a folder for several files (shards); also a URL such as s3://bucket/folder/. "
        "Without it, json and jsonl results hold the values of vectors.",
        show_default=False,
    ),
]
SaveAsOpt = Annotated[
    SaveAs | None,
    typer.Option(
        metavar="FORMAT",
        help="File format in the folder of --output: safetensors, npz or parquet.",
        show_default=SaveAs.safetensors.value,
    ),
]
ShardSizeOpt = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=options.MAX_SHARD,
        help="Largest number of inputs per file in the folder of --output or --rows. A new file "
        "also begins at about 64 MiB.",
        show_default="1000, or 4096 with --rows",
    ),
]
VisualizeOpt = Annotated[
    Path | None,
    typer.Option(
        parser=options.parse_path,
        help="Folder for images of the stages: their first three principal components as red, "
        "green and blue, beside the input. For one input, also a file (.png).",
        metavar="DIR|FILE",
    ),
]
ClipsOpt = Annotated[
    int,
    typer.Option(
        min=1,
        max=options.MAX_CLIPS,
        help="Number of clips, evenly spread over a video or segment. Their vectors are averaged; "
        "maps need a single clip.",
    ),
]
CropsOpt = Annotated[
    int,
    typer.Option(
        min=1,
        max=options.MAX_CROPS,
        help="Number of crops of each clip. Their vectors are averaged; maps need a single crop.",
    ),
]
SegmentsOpt = Annotated[
    float | None,
    typer.Option(
        help="Split videos into segments of this length, and return a vector for each.",
        metavar="SECONDS",
    ),
]
EveryOpt = Annotated[
    float | None,
    typer.Option(
        help="Show videos to an image model, one frame every SECONDS seconds, and return a vector "
        "for each.",
        metavar="SECONDS",
    ),
]
PrintedFormatOpt = Annotated[
    output_formats.Format,
    typer.Option(
        "--format",
        "-f",
        metavar="FORMAT",
        help="Format of what is printed: table, json, jsonl or csv. auto: table on a terminal or "
        "without inputs, else jsonl.",
    ),
]
OverwriteFilesOpt = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace the output file, or write into folders that are not empty."
    ),
]
ResumeFolderOpt = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue an interrupted run: keep the files in the folder of --output, and process "
        "the remaining inputs.",
    ),
]
