"""Download weights from the Hugging Face hub or by URL, and find them in the caches.

Hub repositories are downloaded by huggingface_hub, so HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and
HF_TOKEN have their usual meaning. Files from a URL go to torch.hub's cache, which the reference
package uses, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HubError, OutputError, first_line

log = logging.getLogger("hiera")

WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
FILE_ENDINGS = (".pth", ".pt", ".bin", ".safetensors")
WEIGHTS_URL = "https://dl.fbaipublicfiles.com/hiera/"  # the reference's model zoo
WEIGHTS_URL_VARIABLE = "HIERA_WEIGHTS_URL"  # environment variable with another URL for it
HINTS = (
    "give a local file with --checkpoint, fill the cache on a machine with a network (HF_HOME), or "
    "set a mirror with HF_ENDPOINT"
)
RELEASED_BY = "facebook/"
LICENCE_NOTE = "released Hiera weights are under CC BY-NC 4.0: no commercial use"
TIMEOUT_S = 30
CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class FetchedFiles:
    """Local files of one checkpoint."""

    weights: Path
    config: Path | None = None  # config.json
    card: Path | None = None  # hiera.json


def is_location(text: str) -> bool:
    """Return whether a string is a path, URL or hub repository, and not the name of a model."""
    return "/" in text or "\\" in text or text.endswith(FILE_ENDINGS) or Path(text).exists()


def from_hub(repo: str, *, cached_only: bool = False, **options: Any) -> FetchedFiles:
    """Return the weights and the configuration of a hub repository, from the cache or the hub.

    Args:
        repo: `owner/name`.
        cached_only: Use the cache only.
        options: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`, as for
            `hf_hub_download`.

    Raises:
        HubError: The hub is offline, the repository is missing or gated, or a file arrives damaged.
    """
    options = {**options, "local_files_only": cached_only or options.get("local_files_only", False)}
    weights = None
    for name in sorted(WEIGHT_NAMES, key=lambda name: not _in_cache(repo, name, options)):
        weights = weights or _hub_file(repo, name, options)
    if weights is None:
        raise HubError(f"{repo} holds no {' or '.join(WEIGHT_NAMES)}", HINTS)
    config = _hub_file(repo, "config.json", options)
    return FetchedFiles(weights, config, _hub_file(repo, "hiera.json", options))


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def url_of(file: str) -> str:
    """Return the URL of a released .pth file, on the reference's server or at HIERA_WEIGHTS_URL."""
    return os.environ.get(WEIGHTS_URL_VARIABLE, WEIGHTS_URL).rstrip("/") + "/" + file


def cached_url(url: str) -> Path | None:
    """Return the file in torch.hub's cache that was downloaded from `url`, if there is one."""
    path = _url_cache() / _file_name(url)
    return path if path.is_file() else None


def from_url(url: str, sha256: str | None = None) -> FetchedFiles:
    """Download a file to torch.hub's cache, or find it there. Interrupted downloads are resumed.

    Args:
        url: The http(s) URL.
        sha256: The checksum that the file must have, if it is known.

    Raises:
        HubError: The server does not answer, the file is missing, the download is interrupted, or
            the checksum differs.
        OutputError: The disk is full, or the cache cannot be written.
    """
    if path := cached_url(url):
        return FetchedFiles(path)
    if is_offline():
        raise HubError(f"{url} is not in the cache, and HF_HUB_OFFLINE is set", HINTS)
    from huggingface_hub.utils import WeakFileLock

    target = _url_cache() / _file_name(url)
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(target.with_name(target.name + ".lock")):  # one download at a time
            if not target.is_file():
                _download(url, partial)
                _check_sha256(partial, sha256, url)
                partial.replace(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written ({error.strerror or error})") from error
    return FetchedFiles(target)


def _in_cache(repo: str, name: str, options: dict[str, Any]) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    selected = {k: options[k] for k in ("cache_dir", "revision") if options.get(k)}
    try:
        return isinstance(try_to_load_from_cache(repo, name, **selected), str)
    except HFValidationError as error:
        raise HubError(f"{repo!r} is no name of a hub repository", "use owner/name") from error


def _hub_file(repo: str, name: str, options: dict[str, Any]) -> Path | None:
    """Return one file of a repository, or None if the repository has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached, is_weights = _in_cache(repo, name, options), name in WEIGHT_NAMES
    try:
        if is_weights and not cached and not options["local_files_only"] and not is_offline():
            _check_hub_answers(repo, name, options)
        path = Path(hf_hub_download(repo, name, **options))
    except LocalEntryNotFoundError as error:
        if not is_weights:
            return None  # this file is optional, and the weights are in the cache
        raise as_error(repo, error) from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # network libraries raise many types
        raise as_error(repo, error) from error
    if is_weights and not cached:
        _verify_blob(path, repo)
    return path


def _check_hub_answers(repo: str, name: str, options: dict[str, Any]) -> None:
    """Send one request to the hub, so that a missing network is reported at once.

    The download itself would retry for half a minute.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    url = hf_hub_url(repo, name, revision=options.get("revision"))
    try:
        get_hf_file_metadata(url, token=options.get("token"))
    except HfHubHTTPError:
        return  # the hub answers; the download reports what is wrong
    log.info("downloading %s from the hub%s", repo, _licence(repo.startswith(RELEASED_BY)))


def as_error(repo: str, error: Exception, action: str = "fetched", cures: str = HINTS) -> HubError:
    """Return an error of huggingface_hub as a HubError.

    Args:
        repo: The repository.
        error: What huggingface_hub raised.
        action: What could not be done with the repository: "fetched", "published".
        cures: The hint, if nothing more specific is known.
    """
    from huggingface_hub import errors

    cause = error.__cause__ or error
    if isinstance(error, errors.GatedRepoError):
        reason, cure = "access is gated", "accept its terms on the hub, and set HF_TOKEN"
    elif isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
        reason, cure = "no such repository or revision", f"check the name; {cures}"
    elif is_offline() or isinstance(error, errors.OfflineModeIsEnabled):
        reason, cure = "not in the cache, and HF_HUB_OFFLINE is set", cures
    elif isinstance(error, OSError) and error.errno == 28:  # ENOSPC
        reason, cure = "the disk is full", "free some space, or set HF_HOME to another disk"
    elif isinstance(error, errors.HfHubHTTPError):
        reason, cure = first_line(error), cures
    else:
        reason, cure = f"the hub does not answer ({first_line(cause)})", cures
    return HubError(f"{repo} could not be {action}: {reason}", cure)


def _verify_blob(path: Path, repo: str) -> None:
    """Check a new download in the hub's cache, where large files are named by their SHA-256."""
    blob = path.resolve()
    if len(blob.name) != 64 or sha256_of(blob) == blob.name:
        return
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)
    raise HubError(f"{repo}: {path.name} arrived damaged (SHA-256 differs)", "try again")


def _download(url: str, partial: Path) -> None:
    """Download to `partial`. Resume where an earlier attempt stopped. Progress goes to stderr."""
    offset = partial.stat().st_size if partial.exists() else 0
    try:
        with _as_hub_errors(url):
            headers = {"Range": f"bytes={offset}-"} if offset else {}
            request = urllib.request.Request(url, headers=headers)
            response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except HubError as error:
        cause = error.__cause__  # status 416: the file ends at or before the offset
        if not isinstance(cause, urllib.error.HTTPError) or cause.code != 416:
            raise
        size = (cause.headers.get("Content-Range") or "").rpartition("/")[2]
        if size == str(offset):
            return  # the file is complete
        partial.unlink()  # it is longer than the file at the URL, so it belongs to another file
        _download(url, partial)
        return
    log.info("downloading %s%s", url, _licence(Path(url).name == _file_name(url)))
    with response:
        if offset and response.status != 206:  # the server sends the whole file again
            offset = 0
        length = response.headers.get("Content-Length")
        total = offset + int(length) if length else None
        mode = "ab" if offset else "wb"
        with partial.open(mode) as file, _progress_bar(partial.stem, offset, total) as advance:
            while True:
                with _as_hub_errors(url):
                    chunk = response.read(CHUNK)
                if not chunk:
                    break
                file.write(chunk)
                advance(len(chunk))
    if total is not None and partial.stat().st_size != total:
        raise HubError(f"{url} broke off", "call again to resume")


@contextlib.contextmanager
def _as_hub_errors(url: str) -> Iterator[None]:
    """Convert network errors to a HubError.

    Do not write files within the block, because disk errors are OSErrors, too.
    """
    try:
        yield
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        reason = getattr(error, "reason", None) or first_line(error)
        raise HubError(f"{url} could not be fetched ({reason})", HINTS) from error


@contextlib.contextmanager
def _progress_bar(name: str, done: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar, and yield a function that advances it by a number of bytes.

    Nothing is shown if stderr is not a terminal, or if the hub's progress bars are disabled.
    """
    from huggingface_hub.utils import are_progress_bars_disabled

    if not sys.stderr.isatty() or are_progress_bars_disabled():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total, completed=done)
        yield lambda count: progress.advance(task, count)


def _licence(released: bool) -> str:
    """Return a note on the licence to append to a log line, if the weights are released ones."""
    return f" ({LICENCE_NOTE})" if released else ""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sha256(path: Path, expected: str | None, url: str) -> None:
    if expected and sha256_of(path) != expected:
        path.unlink()
        raise HubError(f"{url} sent other bytes than expected (SHA-256 differs)", "try again")


def _url_cache() -> Path:
    import torch.hub

    return Path(torch.hub.get_dir()) / "checkpoints"


def _file_name(url: str) -> str:
    """Return the name of a URL's file in the cache.

    A released file keeps its name, as torch.hub names it. Other names begin with a hash of the URL,
    because different URLs can end with the same name.
    """
    name = Path(urllib.parse.urlparse(url).path).name
    if url in (url_of(name), WEIGHTS_URL + name):
        return name
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
