"""Fetching weights: the hub through huggingface_hub, .pth files by URL, and the caches of both.

huggingface_hub does the hub's work, so HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN mean what
they mean everywhere. URLs land in torch.hub's cache, where the reference package puts them.
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
WEIGHTS_URL_VARIABLE = "HIERA_WEIGHTS_URL"  # a mirror of it
CURES = (
    "give a local file with --checkpoint, fill the cache on a machine with network (HF_HOME), or "
    "set a mirror with HF_ENDPOINT"
)
RELEASED_BY = "facebook/"
LICENCE_NOTE = "released Hiera weights are under CC BY-NC 4.0: no commercial use"
TIMEOUT_S = 30
CHUNK = 1 << 20


@dataclass(frozen=True)
class FetchedFiles:
    """Local files of one checkpoint."""

    weights: Path
    config: Path | None = None  # config.json
    card: Path | None = None  # hiera.json


def is_location(text: str) -> bool:
    """Whether a text names a place (path, URL, hub repository), not a model or a tag."""
    return "/" in text or "\\" in text or text.endswith(FILE_ENDINGS) or Path(text).exists()


def from_hub(repo: str, *, cached_only: bool = False, **options: Any) -> FetchedFiles:
    """A hub repository's weights and configuration, from the cache or the hub.

    Args:
        repo: `owner/name`.
        cached_only: look no further than the cache.
        options: `revision`, `token`, `cache_dir`, `force_download` as in hf_hub_download.

    Raises:
        HubError: offline, missing, gated, interrupted, or damaged on the way.
    """
    options = {**options, "local_files_only": cached_only or options.get("local_files_only", False)}
    weights = None
    for name in sorted(WEIGHT_NAMES, key=lambda name: not _in_cache(repo, name, options)):
        weights = weights or _hub_file(repo, name, options)
    if weights is None:
        raise HubError(f"{repo} holds no {' or '.join(WEIGHT_NAMES)}", CURES)
    config = _hub_file(repo, "config.json", options)
    return FetchedFiles(weights, config, _hub_file(repo, "hiera.json", options))


def is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def url_of(file: str) -> str:
    """The address of a released .pth file, on the reference's server or its mirror."""
    return os.environ.get(WEIGHTS_URL_VARIABLE, WEIGHTS_URL).rstrip("/") + "/" + file


def cached_url(url: str) -> Path | None:
    """The file that torch.hub (and so the reference) has downloaded from `url` before."""
    path = _url_cache() / _file_name(url)
    return path if path.is_file() else None


def from_url(url: str, sha256: str | None = None) -> FetchedFiles:
    """Download a file to torch.hub's cache, or find it there. Interrupted downloads resume.

    Raises:
        HubError: offline, not found, interrupted, or not the recorded bytes.
        OutputError: no room on the disk.
    """
    if path := cached_url(url):
        return FetchedFiles(path)
    if is_offline():
        raise HubError(f"{url} is not in the cache, and HF_HUB_OFFLINE is set", CURES)
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

    where = {k: options[k] for k in ("cache_dir", "revision") if options.get(k)}
    try:
        return isinstance(try_to_load_from_cache(repo, name, **where), str)
    except HFValidationError as error:
        raise HubError(f"{repo!r} is no name of a hub repository", "use owner/name") from error


def _hub_file(repo: str, name: str, options: dict[str, Any]) -> Path | None:
    """One file of a repository; None when the repository has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached, is_weights = _in_cache(repo, name, options), name in WEIGHT_NAMES
    try:
        if is_weights and not cached and not options["local_files_only"] and not is_offline():
            _probe(repo, name, options)
        path = Path(hf_hub_download(repo, name, **options))
    except LocalEntryNotFoundError as error:
        if not is_weights:
            return None  # optional, and the weights are here
        raise as_error(repo, error) from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # network libraries raise many types
        raise as_error(repo, error) from error
    if is_weights and not cached:
        _verify_blob(path, repo)
    return path


def _probe(repo: str, name: str, options: dict[str, Any]) -> None:
    """Ask once whether the hub answers: the download itself would retry for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    url = hf_hub_url(repo, name, revision=options.get("revision"))
    try:
        get_hf_file_metadata(url, token=options.get("token"))
    except HfHubHTTPError:
        return  # it answers; what it says is the download's business
    log.info("fetching %s from the hub%s", repo, _licence(repo.startswith(RELEASED_BY)))


def as_error(repo: str, error: Exception, action: str = "fetched", cures: str = CURES) -> HubError:
    """What went wrong with the hub, in our words, and the cure."""
    from huggingface_hub import errors

    cause = error.__cause__ or error
    if isinstance(error, errors.GatedRepoError):
        reason, cure = "access is gated", "accept its terms on the hub and set HF_TOKEN"
    elif isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
        reason, cure = "no such repository or revision", f"check the name; {cures}"
    elif is_offline() or isinstance(error, errors.OfflineModeIsEnabled):
        reason, cure = "not in the cache, and HF_HUB_OFFLINE is set", cures
    elif isinstance(error, OSError) and error.errno == 28:  # ENOSPC
        reason, cure = "no room on the disk", "free some space or move HF_HOME"
    elif isinstance(error, errors.HfHubHTTPError):
        reason, cure = first_line(error), cures
    else:
        reason, cure = f"the hub does not answer ({first_line(cause)})", cures
    return HubError(f"{repo} could not be {action}: {reason}", cure)


def _verify_blob(path: Path, repo: str) -> None:
    """The cache names a large file by its SHA-256; a fresh download must match its name."""
    blob = path.resolve()
    if len(blob.name) != 64 or sha256_of(blob) == blob.name:
        return
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)
    raise HubError(f"{repo}: {path.name} arrived damaged (SHA-256 differs)", "try again")


def _download(url: str, partial: Path) -> None:
    """Fetch to `partial`, going on where an earlier attempt broke off; progress on stderr."""
    have = partial.stat().st_size if partial.exists() else 0
    try:
        with _network(url):
            headers = {"Range": f"bytes={have}-"} if have else {}
            request = urllib.request.Request(url, headers=headers)
            response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except HubError as error:
        cause = error.__cause__
        if not isinstance(cause, urllib.error.HTTPError) or cause.code != 416:
            raise
        size = (cause.headers.get("Content-Range") or "").rpartition("/")[2]
        if size == str(have):
            return  # nothing left to fetch
        partial.unlink()  # not a beginning of this file: start over
        _download(url, partial)
        return
    log.info("downloading %s%s", url, _licence(Path(url).name == _file_name(url)))
    with response:
        if have and response.status != 206:  # the server starts over
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with partial.open("ab" if have else "wb") as file, _bar(partial.stem, have, total) as show:
            while True:
                with _network(url):
                    chunk = response.read(CHUNK)
                if not chunk:
                    break
                file.write(chunk)
                show(len(chunk))
    if total is not None and partial.stat().st_size != total:
        raise HubError(f"{url} broke off", "call again to resume")


@contextlib.contextmanager
def _network(url: str) -> Iterator[None]:
    """Faults of the line are the hub's, unlike those of the disk."""
    try:
        yield
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        reason = getattr(error, "reason", None) or first_line(error)
        raise HubError(f"{url} could not be fetched ({reason})", CURES) from error


@contextlib.contextmanager
def _bar(name: str, have: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal; off where the hub's bars are off too."""
    from huggingface_hub.utils import are_progress_bars_disabled

    if not sys.stderr.isatty() or are_progress_bars_disabled():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total, completed=have)
        yield lambda count: progress.advance(task, count)


def _licence(released: bool) -> str:
    return f" ({LICENCE_NOTE})" if released else ""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sha256(path: Path, expected: str | None, url: str) -> None:
    if expected and sha256_of(path) != expected:
        path.unlink()
        raise HubError(f"{url} sent other bytes than recorded (SHA-256 differs)", "try again")


def _url_cache() -> Path:
    import torch.hub

    return Path(torch.hub.get_dir()) / "checkpoints"


def _file_name(url: str) -> str:
    """A released file's own name, as torch.hub has it; others are told apart by their address."""
    name = Path(urllib.parse.urlparse(url).path).name
    if url in (url_of(name), WEIGHTS_URL + name):
        return name
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
