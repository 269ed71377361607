"""Check that a file is complete and undamaged, by what its format says about itself.

A .safetensors file holds its length, and a zipped .pth file holds the CRC of each of its members.
The older .pth format holds neither; it is checked when it is read. No code in a file is run, and
this module does not import torch.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, first_line

ZIP_SIGNATURE = b"PK\x03\x04"
PICKLE_SIGNATURE = b"\x80"
GIT_LFS_SIGNATURE = b"version https://git-lfs"
FILE_NAME = re.compile(r"(?!\.{1,2}\Z)[^/\\:\0-\x1f\ud800-\udfff]+")  # on any system
MAX_PARTS = 1000  # files over which weights are spread
MAX_THREADS = 8  # reading is the limit with more
SAFETENSORS_MAX_HEADER = 100 << 20  # bytes
# A member's local header: 30 bytes with these fields, then its name and an extra field.
LOCAL_HEADER = struct.Struct("<4s2xHH4xLLLHH")
ENCRYPTED, HAS_DESCRIPTOR, UTF8_NAME = 0x01, 0x08, 0x800  # flags; a descriptor holds sizes and CRC
IN_ZIP64_FIELD = 0xFFFFFFFF  # a size that is in the extra field


class DamagedFile(CheckpointError):
    """A file whose bytes cannot be right: truncated, altered, or something else altogether.

    Args:
        path: The file.
        reason: What is wrong with it.
        hint: What to do next.
    """

    def __init__(self, path: Path, reason: str, hint: str = "get it again") -> None:
        super().__init__(f"{path} {reason}", hint)
        self.path, self.reason = path, reason


PROGRAM_HINT = "give the checkpoint that it was made from"


def check_weights_file(path: Path) -> None:
    """Check a .safetensors or .pth file.

    Raises:
        DamagedFile: It is truncated or damaged, or not a checkpoint.
        CheckpointError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(40)
        if is_safetensors(path):
            _check_safetensors(path)
        elif start.startswith(ZIP_SIGNATURE):
            _check_zip(path)
        elif start.startswith(GIT_LFS_SIGNATURE):
            raise DamagedFile(path, "is a Git LFS pointer, not the file", "run `git lfs pull`")
        elif not start:
            raise EOFError("it is empty")
        elif path.suffix.lower() == ".onnx":
            raise DamagedFile(path, "is an ONNX program, not a checkpoint", PROGRAM_HINT)
        elif not start.startswith(PICKLE_SIGNATURE):
            raise DamagedFile(
                path,
                f"is not a checkpoint: it begins with {start[:12]!r}",
                "give a .safetensors file, or a file that torch.save wrote",
            )
    except OSError as error:
        raise as_unreadable(path, error) from error
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # zipfile, struct and json raise many types on damaged files
        raise DamagedFile(path, f"is truncated or damaged ({first_line(error)})") from error


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins with a length and a JSON header, as safetensors does."""
    with path.open("rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return len(start) == 9 and start[8:] == b"{" and 0 < length < SAFETENSORS_MAX_HEADER


def as_unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a file that the system does not let us read. It may be undamaged."""
    return CheckpointError(f"{path} cannot be read ({error.strerror or error})", "check the path")


def _check_safetensors(path: Path) -> None:
    """Check that the header can be read, and that the file has the length that follows from it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        size = file.seek(0, os.SEEK_END)
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise EOFError(f"it has {size} bytes, and its header says {expected}")


def _check_zip(path: Path) -> None:
    """Check the members of a zip file in parallel: their headers, and the CRC of their content.

    torch.save stores members without compression. Others are refused, because a memory-mapped
    tensor would show the compressed bytes, and a small file could expand to a huge one.
    """
    with (
        zipfile.ZipFile(path) as archive,
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as content,
        ThreadPoolExecutor(MAX_THREADS) as pool,
    ):
        members = archive.infolist()
        if what := _kind_of_program(member.filename for member in members):
            raise DamagedFile(path, f"is {what}, not a checkpoint", PROGRAM_HINT)
        # torch can be told to write no CRCs; all of them are 0 then.
        has_crcs = any(member.CRC for member in members)
        for problem in pool.map(lambda member: _find_problem(content, member, has_crcs), members):
            if problem:
                raise zipfile.BadZipFile(problem)


def _kind_of_program(names: Iterable[str]) -> str | None:
    """Return what a zip file is by the names of its members, if that is no checkpoint."""
    last = {name.partition("/")[2] for name in names}
    if "constants.pkl" in last:
        return "a TorchScript program"
    if "archive_format" in last:
        return "an exported program"
    return None if "data.pkl" in last else "an archive"


def _find_problem(content: memoryview, member: zipfile.ZipInfo, has_crcs: bool) -> str | None:
    """Return what is wrong with a member of a zip file, or None.

    Args:
        content: The whole file.
        member: The member, as the archive's directory describes it.
        has_crcs: Whether the file holds CRCs.
    """
    offset, name = member.header_offset, member.filename
    header = bytes(content[offset : offset + LOCAL_HEADER.size])
    if len(header) < LOCAL_HEADER.size:
        return f"the header of {name} is missing"
    signature, flags, method, crc, packed, size, name_length, extra_length = LOCAL_HEADER.unpack(
        header
    )
    if signature != ZIP_SIGNATURE:
        return f"the header of {name} is missing"
    if member.compress_type or method or flags & ENCRYPTED:
        return f"{name} is compressed or encrypted, and torch.save does neither"
    if not flags & HAS_DESCRIPTOR:
        sizes = {packed, size} - {IN_ZIP64_FIELD}
        if crc != member.CRC or not sizes <= {member.file_size}:
            return f"the two headers of {name} differ"
    name_end = offset + LOCAL_HEADER.size + name_length
    raw_name = bytes(content[offset + LOCAL_HEADER.size : name_end])
    if raw_name != member.orig_filename.encode("utf-8" if flags & UTF8_NAME else "cp437"):
        return f"the two headers of {name} differ"
    start = name_end + extra_length
    end = start + member.file_size
    if end > len(content):
        return f"{name} is cut off"
    if has_crcs and zlib.crc32(content[start:end]) != member.CRC:
        return f"the CRC of {name} differs"
    return None


def weight_map(value: Any) -> dict[str, str]:
    """Return the name of the file that holds each tensor, by the value of an index of weights in
    several files (`model.safetensors.index.json`).

    Raises:
        ValueError: It is no index, lists paths that lead out of the folder, or too many files.
    """
    listed = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(listed, dict) or not listed or not all(map(_is_name, listed.values())):
        raise ValueError("has no weight_map of file names")
    if len(set(listed.values())) > MAX_PARTS:
        raise ValueError(f"lists more than {MAX_PARTS} files")
    return listed


def _is_name(text: Any) -> bool:
    """Return whether this is the name of a file, and no path that leads out of the folder."""
    return isinstance(text, str) and FILE_NAME.fullmatch(text) is not None
