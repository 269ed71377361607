"""Options of commands whose inputs may be divided among processes, as Annotated types."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from .. import options


class Engine(StrEnum):
    """Values of --engine."""

    local = "local"
    ray = "ray"


ShardOpt = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Process one of N parts of the inputs, counted from 0, and put shard-I-of-N- before "
        "the names of output files. none: all inputs, whatever a launcher says.",
        show_default="the rank of torchrun or srun; else none",
    ),
]
ManifestOpt = Annotated[
    str | None,
    typer.Option(
        parser=options.parse_input_file,
        metavar="FILE",
        help="Table with a row for each input, in place of INPUTS: .parquet (or a folder of such "
        "files), .csv, .tsv, .jsonl, or .txt with a path or URL on each line. A file may be at "
        "https:// or s3://, and is copied.",
    ),
]
PathColumnOpt = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Column of the manifest that holds paths or URLs.",
        show_default="path, url, uri, file, filename, image, image_path or image_url",
    ),
]
IdColumnOpt = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Column of the manifest whose values come through to the results, as `id`.",
        show_default="id, if there is one",
    ),
]
PrivateUrlsOpt = Annotated[
    bool,
    typer.Option(
        "--private-urls",
        help="Also fetch http(s) URLs of the manifest that lead into private networks.",
    ),
]
InputsOpt = Annotated[
    list[str] | None,
    typer.Argument(help=options.INPUTS_HELP, metavar="INPUTS", show_default=False),
]
RowsOpt = Annotated[
    str | None,
    typer.Option(
        parser=options.parse_place,
        metavar="DIR",
        help="Folder, or URL such as s3://bucket/folder, for Parquet files with a row for each "
        "input, also for those that fail. Nothing is printed; --resume continues.",
        show_default=False,
    ),
]
RetryFailedOpt = Annotated[
    bool,
    typer.Option(
        "--retry-failed",
        help="With --rows and --resume, also process the inputs that have failed before, and "
        "replace their rows.",
    ),
]
EngineOpt = Annotated[
    Engine,
    typer.Option(
        metavar="ENGINE",
        help="local: this process. ray: Ray Data, on this machine or a cluster, with --rows.",
    ),
]
AddressOpt = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Ray cluster: auto, HOST:PORT or ray://HOST:PORT.",
        show_default="a new one on this machine, with --workers CPUs",
    ),
]
MAX_DRY_RUN = 1_000_000_000
DryRunOpt = Annotated[
    int | None,
    typer.Option(
        min=2,
        max=MAX_DRY_RUN,
        metavar="N",
        help="Run N of the inputs, write nothing, and say what all of them will take.",
        show_default=False,
    ),
]
