"""What is known about a downloaded file: NAME.download.json beside it, in the cache.

It holds where the file came from, and the SHA-256 of what arrived. A file whose size and time have
not changed since is trusted; otherwise its SHA-256 is compared. Files that other programs put into
the cache have no record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from ..atomic import atomic_file
from ..errors import OutputError
from .integrity import DamagedFile
from .resume import Version


def write(file: Path, sha256: str, version: Version | None = None) -> None:
    """Write the record of a file.

    Args:
        file: The file, which is complete.
        sha256: Its checksum.
        version: Where it came from; None keeps what the record says.

    Raises:
        OutputError: The cache cannot be written.
    """
    origin = _read(file) if version is None else dataclasses.asdict(version)
    record = {**origin, **_state_of(file), "sha256": sha256}
    with atomic_file(record_path(file)) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def check(file: Path, sha256: str | None = None) -> None:
    """Check that a file in the cache is what was downloaded.

    Args:
        file: The file.
        sha256: The checksum that it must have, if that is known from elsewhere.

    Raises:
        DamagedFile: It is another file.
    """
    record = _read(file)
    expected = sha256 or record.get("sha256")
    if expected is None:
        return
    unchanged = all(record.get(key) == value for key, value in _state_of(file).items())
    actual = record.get("sha256") if unchanged else None
    if actual is None:
        actual = sha256_of(file)
    if actual != expected:
        raise DamagedFile(file, "is not the file that was downloaded (SHA-256 differs)")
    if not unchanged:  # it was copied or touched: remember its new time
        with contextlib.suppress(OutputError):  # the cache may be read-only
            write(file, actual)


def record_path(file: Path) -> Path:
    """Return the path of a file's record."""
    return file.with_name(file.name + ".download.json")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state_of(file: Path) -> dict[str, int]:
    """Return what changes when a file is written."""
    state = file.stat()
    return {"size": state.st_size, "mtime_ns": state.st_mtime_ns}


def _read(file: Path) -> dict[str, Any]:
    """Return the record of a file; {} if there is none, or it cannot be read."""
    try:
        record = json.loads(record_path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
