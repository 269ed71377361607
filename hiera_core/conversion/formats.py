"""Table of the formats that a checkpoint can be converted to. This module does not import torch."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError, did_you_mean, is_whole
from ..plain_data import is_utf8
from ..weights.key_mapping import Naming

WEIGHTS_NAME = "model.safetensors"  # name of the weights file in a folder format
FOLDER_FILES = {WEIGHTS_NAME, "config.json", "hiera.json", "preprocessor_config.json", "README.md"}
FILE_ENDINGS = {".pth", ".pt", ".bin", ".safetensors", ".onnx", ".pt2"}
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
# What a program can return. maps: stage1, stage2, ...; reconstruction: also predictions and mask.
OUTPUTS = ("logits", "probabilities", "embedding", "maps", "reconstruction")


@dataclass(frozen=True)
class Format:
    """Output format of a conversion.

    Args:
        naming: Naming of the parameters, or None if the model is exported as a program.
        folder: Whether DEST is a folder with all files that the library needs, or a single file.
        packages: Packages that writing needs in addition to our dependencies.
        extra: Installation extra of this package that contains `packages`.
        precisions: Precisions that the format can hold.
        ending: File extension that the library requires, or an empty string.
        side_file_ending: Extension, appended to the name of DEST, of a second file for large
            weights, or an empty string.
        fixed_batch: Whether a program takes batches of one size only.
    """

    naming: Naming | None
    folder: bool = False
    packages: tuple[str, ...] = ()
    extra: str = ""
    precisions: tuple[str, ...] = PRECISIONS
    ending: str = ""
    side_file_ending: str = ""
    fixed_batch: bool = False

    @property
    def is_program(self) -> bool:
        """Whether the model is exported as a program."""
        return self.naming is None


FORMATS: dict[str, Format] = {
    "hub": Format("reference", folder=True),
    "pth": Format("reference"),
    "timm": Format("timm", folder=True),
    "transformers": Format("transformers", folder=True),
    "sam2": Format("sam2"),
    # No bf16, because onnxruntime has no bf16 kernels for a CPU.
    "onnx": Format(
        None,
        packages=("onnx", "onnxruntime", "onnxscript"),
        extra="onnx",
        precisions=("auto", "fp32", "fp16"),
        side_file_ending=".data",
    ),
    "pt2": Format(None, ending=".pt2"),
    "aoti": Format(None, ending=".pt2", fixed_batch=True),
}


# Formats by extension, where none is named. `aoti` writes `.pt2`, too, and has to be named.
BY_ENDING = {".onnx": "onnx", ".pt2": "pt2", ".pth": "pth"}
PROGRAMS = [name for name, target in FORMATS.items() if target.is_program]


def format_of(dest: str | Path) -> str | None:
    """Return the name of the format that the extension of DEST stands for; None if it is none."""
    return BY_ENDING.get(Path(dest).suffix.lower())


def get_format(name: str) -> Format:
    """Return the format called `name`, and check that its packages are installed.

    Raises:
        UsageError: The name is unknown, or packages are missing.
    """
    if name not in FORMATS:
        raise UsageError(
            f"unknown format {name!r}", did_you_mean(name, FORMATS) or f"use {', '.join(FORMATS)}"
        )
    target = FORMATS[name]
    missing = [p for p in target.packages if importlib.util.find_spec(p) is None]
    if missing:
        raise UsageError(
            f"{name} needs {' and '.join(missing)}",
            f"pip install 'hiera-toolkit[{target.extra}]', or pip install {' '.join(missing)}",
        )
    return target


def check_destination(
    dest: Path, name: str, *, dtype: str = "auto", overwrite: bool = False
) -> Format:
    """Return the format called `name`, and check that DEST can be written in it.

    Raises:
        UsageError: DEST exists, its parent folder is missing or read-only, its extension belongs
            to another format, or the format cannot hold this precision.
    """
    target = get_format(name)
    if dtype not in PRECISIONS:
        raise UsageError(f"unknown dtype {dtype!r}", f"use {', '.join(PRECISIONS)}")
    if dtype not in target.precisions:
        raise UsageError(f"{name} cannot store {dtype} here", f"use {', '.join(target.precisions)}")
    if target.folder and dest.suffix in FILE_ENDINGS:
        raise UsageError(
            f"{name} writes a folder, but {str(dest)!r} is named like a file",
            f"leave out {dest.suffix}",
        )
    _check_name(dest)
    if not dest.name.endswith(target.ending):
        raise UsageError(
            f"{str(dest)!r} does not end in {target.ending}",
            f"PyTorch wants NAME{target.ending}",
        )
    if os.path.lexists(dest):
        _check_replaceable(dest, target, overwrite)
    side_file = dest.with_name(dest.name + target.side_file_ending)
    if not overwrite and os.path.lexists(side_file):
        raise UsageError(f"{str(side_file)!r} exists", "--overwrite replaces it")
    if not dest.parent.is_dir():
        raise UsageError(f"folder {str(dest.parent)!r} does not exist", "make it first")
    if not os.access(dest.parent, os.W_OK):
        raise UsageError(f"folder {str(dest.parent)!r} is read-only", "choose another folder")
    return target


def check_ending(dest: str | Path, name: str) -> None:
    """Check that DEST does not end in a slash if the format writes a file.

    Raises:
        UsageError: It does.
    """
    if str(dest).endswith(("/", os.sep)) and not get_format(name).folder:
        raise UsageError(
            f"{name} writes a file, but {str(dest)!r} is named like a folder",
            "give the name of a file",
        )


def check_program_options(name: str, outputs: Sequence[str], batch_size: int | None) -> None:
    """Check that a format takes the options of programs that are given.

    Raises:
        UsageError: It does not, an output is unknown, or the batch size is not positive.
    """
    if outputs and not FORMATS[name].is_program:
        raise UsageError(
            f"{name} stores weights, and --returns is for programs", f"use {', '.join(PROGRAMS)}"
        )
    for output in outputs:
        if output not in OUTPUTS:
            hint = did_you_mean(output, OUTPUTS) or f"use {', '.join(OUTPUTS)}"
            raise UsageError(f"unknown output {output!r}", hint)
    if batch_size is None:
        return
    if not FORMATS[name].fixed_batch:
        raise UsageError(f"{name} has no fixed batch size", "leave it out, or use aoti")
    if not is_whole(batch_size) or batch_size < 1:
        raise UsageError(f"batch size {batch_size}", "give a number above 0")


def _check_name(dest: Path) -> None:
    """Check that DEST can be the name of a new file or folder."""
    if dest.name in ("", ".."):
        raise UsageError(
            f"{str(dest)!r} cannot be replaced", "give the name of a new file or folder"
        )
    if not is_utf8(dest):
        raise UsageError(f"the path {str(dest)!r} is not valid UTF-8", "choose another name")
    try:
        with contextlib.suppress(FileNotFoundError):
            dest.with_name(f".{dest.name}.lock").lstat()  # the longest name beside it
            dest.lstat()
        is_special = dest.exists() and not (dest.is_file() or dest.is_dir())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{str(dest)!r} cannot be written ({reason})", "choose another name"
        ) from error
    if is_special:
        raise UsageError(f"{str(dest)!r} is not a regular file", "give the name of a new file")


def _check_replaceable(dest: Path, target: Format, overwrite: bool) -> None:
    if dest.is_dir() != target.folder:
        needed, existing = ("folder", "file") if target.folder else ("file", "folder")
        raise UsageError(
            f"{str(dest)!r} exists and is a {existing}", f"give the name of a new {needed}"
        )
    if not overwrite:
        raise UsageError(f"{str(dest)!r} exists", "--overwrite replaces it")
    if not dest.is_dir():
        return
    others = sorted(path.name for path in dest.iterdir() if not _is_checkpoint_file(path))
    if others:  # replacing the folder would delete them
        raise UsageError(
            f"{str(dest)!r} holds more than a checkpoint ({', '.join(others[:3])})",
            "choose another folder",
        )


def _is_checkpoint_file(path: Path) -> bool:
    return path.is_file() and path.name in FOLDER_FILES
