"""The formats that a checkpoint can be converted to, as a table. Imports no torch."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError, did_you_mean
from ..weights.key_mapping import Naming

WEIGHTS_NAME = "model.safetensors"  # the weights of a folder
FOLDER_FILES = {WEIGHTS_NAME, "config.json", "hiera.json", "preprocessor_config.json", "README.md"}
FILE_ENDINGS = {".pth", ".pt", ".bin", ".safetensors", ".onnx", ".pt2"}
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Format:
    """One format.

    Args:
        dialect: how it names parameters; None where the model is exported as a program.
        folder: DEST is a folder, complete for its library; else one file.
        packages: what writing it takes besides what we require anyway.
        extra: our installation extra that brings them.
        precisions: number formats it can hold.
    """

    dialect: Naming | None
    folder: bool = False
    packages: tuple[str, ...] = ()
    extra: str = ""
    precisions: tuple[str, ...] = PRECISIONS
    ending: str = ""  # that the library insists on
    beside: str = ""  # ending, after DEST's, of a file that large models need besides


FORMATS: dict[str, Format] = {
    "hub": Format("reference", folder=True),
    "pth": Format("reference"),
    "timm": Format("timm", folder=True),
    "transformers": Format("transformers", folder=True),
    # onnxruntime has no kernels for bf16 on a CPU.
    "onnx": Format(
        None,
        packages=("onnx", "onnxruntime", "onnxscript"),
        extra="onnx",
        precisions=("auto", "fp32", "fp16"),
        beside=".data",
    ),
    "pt2": Format(None, ending=".pt2"),
}


def get_format(name: str) -> Format:
    """The format called `name`, if what it takes is installed.

    Raises:
        UsageError: unknown, or packages are missing.
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
    """The format, if DEST can become it. Nothing is written.

    Raises:
        UsageError: DEST exists, is in no folder that can be written, or is named like another
            format; the format cannot be had in this precision.
    """
    target = get_format(name)
    if dtype not in PRECISIONS:
        raise UsageError(f"unknown dtype {dtype!r}", f"use {', '.join(PRECISIONS)}")
    if dtype not in target.precisions:
        raise UsageError(f"{name} holds no {dtype}", f"use {', '.join(target.precisions)}")
    if target.folder and dest.suffix in FILE_ENDINGS:
        raise UsageError(
            f"{name} is a folder, and {str(dest)!r} is named like a file",
            f"leave out {dest.suffix}",
        )
    if not dest.name.endswith(target.ending):
        raise UsageError(
            f"{str(dest)!r} is no name for {name}", f"torch.export wants NAME{target.ending}"
        )
    if os.path.lexists(dest):
        _check_replaceable(dest, target, overwrite)
    beside = dest.with_name(dest.name + target.beside)
    if not overwrite and os.path.lexists(beside):
        raise UsageError(f"{str(beside)!r} exists", "--overwrite replaces it")
    if not dest.parent.is_dir():
        raise UsageError(f"no folder {str(dest.parent)!r} to write to", "make it first")
    if not os.access(dest.parent, os.W_OK):
        raise UsageError(f"folder {str(dest.parent)!r} is read-only", "write elsewhere")
    return target


def _check_replaceable(dest: Path, target: Format, overwrite: bool) -> None:
    if dest.is_dir() != target.folder:
        kinds = ("folder", "file") if target.folder else ("file", "folder")
        raise UsageError(f"{str(dest)!r} exists and is a {kinds[1]}", f"name a new {kinds[0]}")
    if not overwrite:
        raise UsageError(f"{str(dest)!r} exists", "--overwrite replaces it")
    others = sorted(p.name for p in dest.iterdir() if not _is_ours(p)) if dest.is_dir() else []
    if others:  # a folder is replaced as a whole
        raise UsageError(
            f"{str(dest)!r} holds more than a checkpoint ({', '.join(others[:3])})",
            "name another folder",
        )


def _is_ours(path: Path) -> bool:
    return path.is_file() and path.name in FOLDER_FILES


def parse_size(text: str) -> tuple[int, ...]:
    """`384` -> (384,), `224x448` -> (224, 448).

    Raises:
        UsageError: no numbers.
    """
    if not re.fullmatch(r"\d{1,6}(x\d{1,6}){0,2}", text):
        raise UsageError(
            f"{text!r} is no size", "write 384 or 224x448 (y, x); for video 16x256 or 16x224x288"
        )
    return tuple(map(int, text.split("x")))


def full_size(size: tuple[int, ...], dims: int) -> tuple[int, ...]:
    """A size as given, for a model with so many dimensions: one side stands for both.

    Raises:
        UsageError: too few or too many numbers.
    """
    full = (*size, size[-1]) if len(size) == max(dims - 1, 1) and dims > 1 else size
    if len(full) != dims:
        shapes = {1: "samples", 2: "384 or 224x448", 3: "16x256 or 16x224x288"}
        raise UsageError(
            f"size {'x'.join(map(str, size))} does not fit a model of {dims} dimensions",
            f"write {shapes[dims]}",
        )
    return full
