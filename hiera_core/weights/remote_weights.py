"""Copies of checkpoints at s3:// and other remote places, in the cache of torch.hub.

A copy is named after the URL and the version of the file (its ETag or time), so that a checkpoint
that has been replaced is fetched again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from ..atomic import atomic_file, translate_write_errors
from ..errors import HubError, InputError, first_line
from ..places.remote_requests import as_input_errors, open_place, read_range, with_retries
from ..plain_data import decode_text
from . import names
from .download import CONFIG_NAMES, url_cache
from .files import JSON_MAX_BYTES
from .integrity import weight_map

log = logging.getLogger("hiera")
READ_BYTES = 16 << 20  # of a request
# What file systems call the version of a file; the first that is there.
VERSIONS = (
    "ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified", "modified",
    "modificationTime", "last_write_time", "modify", "updated", "sha", "created",
)  # fmt: skip
HINT = "check the URL, the network and the credentials, or give a local file"


def copy_checkpoint(url: str) -> Path:
    """Return a local copy of a weights file, or of a folder with weights, and of the configuration
    beside it. If it is an index of weights in several files, these are copied beside it.

    Args:
        url: The file or folder.

    Raises:
        UsageError: The package of the place is not installed.
        HubError: There is no such file, or it cannot be fetched.
        OutputError: The cache cannot be written.
    """
    try:
        with as_input_errors():
            system, path = open_place(url)
            weights, info = _find_weights(system, path.rstrip("/"))
            return _copy(system, weights, info)
    except InputError as error:
        raise HubError(f"{url}: {error.message}", HINT) from error


def _find_weights(system: Any, path: str) -> tuple[str, dict[str, Any]]:
    """Return the path of a weights file and what the place says about it; for a folder, the file
    with a usual name, or the only one."""
    system.invalidate_cache()
    info = with_retries(lambda: system.info(path), path)
    if info["type"] != "directory":
        return path, info
    listed = {one["name"]: one for one in with_retries(lambda: system.ls(path, detail=True), path)}
    files = {name.rpartition("/")[2]: name for name in sorted(listed)}
    usual = [name for name in names.USUAL_NAMES if name in files]
    others = [name for name in files if name.endswith(names.WEIGHT_ENDINGS)]
    for name in usual + (others if len(others) == 1 else []):
        return files[name], listed[files[name]]
    raise InputError(f"the folder holds no {' or '.join(names.WEIGHT_NAMES)}")


def _copy(system: Any, weights: str, info: dict[str, Any]) -> Path:
    """Copy a weights file and the configuration beside it, unless that has been done before."""
    folder, _, name = weights.rpartition("/")
    files = {name: (weights, info)}
    parts = _listed_in(system, weights, info) if name.endswith(names.INDEX_ENDING) else ()
    # As of local files, configurations belong to the weights only if these have a usual name.
    wanted = {*parts, *(CONFIG_NAMES if name in names.USUAL_NAMES else ())}
    if wanted:
        for one in with_retries(lambda: system.ls(folder, detail=True), folder):
            if (found := one["name"].rpartition("/")[2]) in wanted:
                files[found] = one["name"], one
    if missing := sorted(set(parts) - set(files)):
        raise InputError(f"{name} lists {missing[0]}, which is not there")
    versions = (_version(facts) for _, facts in files.values())
    version = "\n".join([system.unstrip_protocol(weights), *versions])
    digest = hashlib.sha256(os.fsencode(version)).hexdigest()[:16]
    copy = url_cache() / f"remote-{digest}"
    if not all((copy / one).is_file() for one in files):
        from huggingface_hub.utils import WeakFileLock

        with translate_write_errors(copy):
            copy.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(copy.with_name(copy.name + ".lock")):  # one download at a time
            for one, (place, facts) in files.items():
                if not (copy / one).is_file():
                    _download(system, place, int(facts["size"] or 0), copy / one)
                    _check_same(system, place, facts, copy / one)
    return copy / name


def _listed_in(system: Any, index: str, info: dict[str, Any]) -> set[str]:
    """Return the names of the files that an index lists.

    Raises:
        InputError: It cannot be fetched, or is a wrong one.
    """
    size = int(info["size"] or 0)
    if size > JSON_MAX_BYTES:
        raise InputError(f"{index} is larger than {JSON_MAX_BYTES >> 20} MiB")
    try:
        content = read_range(system, index, 0, size)
        return set(weight_map(json.loads(decode_text(content))).values())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{index} {first_line(error)}") from error


def _download(system: Any, path: str, size: int, target: Path) -> None:
    """Copy a file to this machine, where it appears when it is complete."""
    log.info("downloading %s", system.unstrip_protocol(path))
    with atomic_file(target) as partial, partial.open("wb") as file:
        done = 0
        while done < size:
            with as_input_errors():  # an OSError of the place, not of the disk
                block = read_range(system, path, done, min(READ_BYTES, size - done))
            if not block:
                raise InputError(f"{done} of {size} bytes of {path} arrived")
            done += file.write(block)


def _check_same(system: Any, path: str, before: dict[str, Any], target: Path) -> None:
    """Check that a file is still the one that was listed; parts of two files fit together by size
    alone. Otherwise, its copy is removed."""
    system.invalidate_cache()
    with as_input_errors():
        now = with_retries(lambda: system.info(path), path)
    same = next((key for key in VERSIONS if before.get(key) and now.get(key)), "size")
    if now["size"] != before["size"] or _plain(now[same]) != _plain(before[same]):
        target.unlink(missing_ok=True)
        raise InputError(f"{path} has changed while it was copied")


def _version(info: dict[str, Any]) -> str:
    """Return what changes when a file is replaced: its size, and its ETag or else its time."""
    found = next((info[key] for key in VERSIONS if info.get(key)), "")
    return f"{info['size']} {_plain(found)}"


def _plain(version: Any) -> Any:
    """Return a time in seconds: a place may list files with another type than it describes one."""
    return version.timestamp() if isinstance(version, datetime) else version
