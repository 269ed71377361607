"""Download weights from the Hugging Face hub or by URL, and find them in the caches.

Hub repositories are downloaded by huggingface_hub, so HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and
HF_TOKEN have their usual meaning. Files from a URL go to torch.hub's cache, which the reference
package uses, too.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import zoo
from ..errors import HubError, OutputError, UsageError, first_line
from . import download_record, fetch, hub_patience, resume
from .download_record import sha256_of
from .integrity import DamagedFile, as_unreadable
from .names import INDEX_ENDING, USUAL_NAMES, WEIGHT_NAMES

log = logging.getLogger("hiera")

CONFIG_NAMES = ("config.json", "hiera.json", "preprocessor_config.json")  # as in `FetchedFiles`
WEIGHTS_URL = "https://dl.fbaipublicfiles.com/hiera/"  # the reference's model zoo
WEIGHTS_URL_VARIABLE = "HIERA_WEIGHTS_URL"  # environment variable with another URL for it
HINTS = (
    "give a local file with --checkpoint, fill the cache on a machine with a network (HF_HOME), or "
    "set a mirror with HF_ENDPOINT"
)
RELEASED_BY = "facebook/"
NON_COMMERCIAL = "CC-BY-NC-4.0"
LICENCE_NOTE = "released Hiera weights are under CC BY-NC 4.0: no commercial use"
HEAD_TRIES, HEAD_PAUSE_S = 3, 1.0  # for answers that say "try again"
TRY_AGAIN = (408, 429, 500, 502, 503, 504)
MAX_NAME = 50  # characters of a URL's last part that the name in the cache keeps


@dataclass(frozen=True)
class FetchedFiles:
    """Local files of one checkpoint."""

    weights: Path  # or an index of weights in several files
    config: Path | None = None  # config.json
    card: Path | None = None  # hiera.json
    processor: Path | None = None  # preprocessor_config.json, which transformers writes
    # The files that an index lists, by name, where they are not beside it.
    parts: Mapping[str, Path] = field(default_factory=dict, kw_only=True)


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
    cached = any(_in_cache(repo, name, options) for name in USUAL_NAMES)
    if not options["local_files_only"] and not is_offline():
        options["local_files_only"] = not _hub_answers(repo, options, cached)
        if not cached:
            log.info("downloading %s from the hub%s", repo, _licence(repo))
    # The weights come last: if they are in the cache, the other files are too, if they exist.
    others = [_hub_file(repo, name, options) for name in CONFIG_NAMES]
    for name in sorted(USUAL_NAMES, key=lambda name: not _in_cache(repo, name, options)):
        if weights := _hub_file(repo, name, options):
            if name.endswith(INDEX_ENDING):
                _fetch_parts(repo, weights, options)
            return FetchedFiles(weights, *others)
    raise HubError(f"{repo} holds no {' or '.join(WEIGHT_NAMES)}", HINTS)


def _fetch_parts(repo: str, index: Path, options: dict[str, Any]) -> None:
    """Get the files of a repository that an index lists into the folder of the index.

    Raises:
        DamagedFile: The index is wrong.
        HubError: A file cannot be fetched.
    """
    from .files import read_weight_map

    for name in sorted(set(read_weight_map(index).values())):
        if _hub_file(repo, name, options) is None:
            raise HubError(f"{repo}: {index.name} lists {name}, which is not there", HINTS)


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def url_of(file: str) -> str:
    """Return the URL of a released .pth file, on the reference's server or at HIERA_WEIGHTS_URL."""
    return os.environ.get(WEIGHTS_URL_VARIABLE, WEIGHTS_URL).rstrip("/") + "/" + file


def cached_url(url: str, sha256: str | None = None) -> Path | None:
    """Return the file in torch.hub's cache that was downloaded from `url`, if there is one.

    Args:
        url: The URL.
        sha256: The checksum that the file must have, if it is known.

    Raises:
        DamagedFile: The file has changed since it was downloaded, or has another checksum.
        CheckpointError: It cannot be read.
    """
    path = url_cache() / _file_name(url)
    try:
        if not path.is_file():
            return None
        download_record.check(path, sha256)
    except FileNotFoundError:  # another process has just removed it
        return None
    except OSError as error:
        raise as_unreadable(path, error) from error
    return path


def from_url(
    url: str,
    sha256: str | None = None,
    check: Callable[[Path], Any] | None = None,
    *,
    public_only: bool = False,
) -> FetchedFiles:
    """Download a file to torch.hub's cache, or find it there. Interrupted downloads are resumed.

    Args:
        url: The http(s) URL.
        sha256: The checksum that the file must have, if it is known.
        check: Called with the path of the complete download, before it gets its final name. It
            raises a DamagedFile if the content cannot be right.
        public_only: Refuse servers in private networks.

    Raises:
        UsageError: The URL is not valid.
        HubError: The server does not answer, the file is missing, the download is interrupted, or
            the content or its checksum is wrong.
        DamagedFile: The file in the cache has changed, or has another checksum.
        OutputError: The disk is full, or the cache cannot be written.
    """
    try:
        fetch.check_url(url)
    except fetch.FetchError as error:
        raise UsageError(f"{url!r}: {error.reason}", "check it") from error
    if path := cached_url(url, sha256):
        return FetchedFiles(path)
    if is_offline():
        raise HubError(f"{url} is not in the cache, and HF_HUB_OFFLINE is set", HINTS)
    from huggingface_hub.utils import WeakFileLock

    target = url_cache() / _file_name(url)
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(target.with_name(target.name + ".lock")):  # one download at a time
            if not target.is_file():
                _download(url, partial, target, sha256, check, public_only)
    except fetch.FetchError as error:
        raise _as_hub_error(url, error) from error
    except OSError as error:
        raise OutputError(f"{target} cannot be written ({error.strerror or error})") from error
    return FetchedFiles(target)


def from_urls(
    url: str, check: Callable[[Path], None], *, public_only: bool = False
) -> FetchedFiles:
    """Download a weights file, or an index and the files that it lists, which are beside it; see
    `from_url`.

    Args:
        url: The http(s) URL.
        check: See `from_url`; for a weights file.
        public_only: Refuse servers in private networks.
    """
    from .files import read_weight_map

    place, _, query = url.partition("?")
    if not place.endswith(INDEX_ENDING):
        return from_url(url, check=check, public_only=public_only)
    index = from_url(url, check=read_weight_map, public_only=public_only).weights
    parts = {}
    for name in sorted(set(read_weight_map(index).values())):
        part = f"{place.rpartition('/')[0]}/{urllib.parse.quote(name)}{'?' if query else ''}{query}"
        parts[name] = from_url(part, check=check, public_only=public_only).weights
    return FetchedFiles(index, parts=parts)


def drop_from_cache(path: Path, unless_newer: float) -> None:
    """Remove a damaged file from the hub's or torch.hub's cache, with the record of its download.

    Args:
        path: The file. In the hub's cache, it is a link to a blob, which is removed too. If a link
            leads out of the cache, what it leads to stays.
        unless_newer: Time (as of `time.time`) when reading began. Another process may have
            replaced the file since then; the new file stays.
    """
    try:
        content = path.resolve()
        if content.stat().st_ctime > unless_newer:
            return
        for file in (*_cached_parts(path), download_record.record_path(path)):
            file.unlink(missing_ok=True)
    except FileNotFoundError:
        return  # another process has removed it
    except OSError as error:
        raise OutputError(f"{path} cannot be removed ({error.strerror or error})") from error


def _download(
    url: str,
    partial: Path,
    target: Path,
    sha256: str | None,
    check: Callable[[Path], Any] | None,
    public_only: bool,
) -> None:
    """Download a URL to `partial`, check the content, and rename it to `target`."""

    def announce() -> None:
        is_released = Path(url).name == _file_name(url)
        log.info("downloading %s%s", url, f" ({LICENCE_NOTE})" if is_released else "")

    version = resume.download(url, partial, announce, public_only=public_only)
    actual = sha256_of(partial)
    try:
        if sha256 and actual != sha256:
            raise HubError(f"{url} sent other bytes than expected (SHA-256 differs)", "try again")
        if check is not None:
            check(partial)
    except DamagedFile as error:
        resume.remove(partial)
        raise HubError(f"what {url} sent {error.reason}", "check the URL, or try again") from error
    except HubError:
        resume.remove(partial)
        raise
    partial.replace(target)
    download_record.write(target, actual, version)
    resume.remove(partial)  # only its description is left


def _as_hub_error(url: str, error: fetch.FetchError) -> HubError:
    if isinstance(error, resume.BrokenOff):
        return HubError(f"{url} broke off ({error.reason})", "call again to resume")
    return HubError(f"{url} could not be fetched ({error.reason})", HINTS)


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

    cached, is_weights = _in_cache(repo, name, options), name not in CONFIG_NAMES
    try:
        with hub_patience.limited():
            path = Path(hf_hub_download(repo, name, **options))
    except LocalEntryNotFoundError as error:
        if (options["local_files_only"] or is_offline()) and not is_weights:
            return None  # the repository has no such file, or it would be in the cache
        raise as_error(repo, error) from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # network libraries raise many types
        raise as_error(repo, error) from error
    if is_weights and not cached:
        _verify_blob(path, repo)
    return path


def _hub_answers(repo: str, options: dict[str, Any], cached: bool) -> bool:
    """Send a request to the hub, so that a missing network or repository is reported at once.

    A download would retry for minutes.

    Args:
        repo: The repository.
        options: See `from_hub`.
        cached: Whether the weights are in the cache. They are then used if the hub does not answer.

    Raises:
        HubError: The hub does not answer, or refuses, and nothing is in the cache.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    url = hf_hub_url(repo, WEIGHT_NAMES[0], revision=options.get("revision"))
    for attempt in range(1, HEAD_TRIES + 1):
        try:
            with hub_patience.limited():
                get_hf_file_metadata(url, token=options.get("token"))
        except EntryNotFoundError:
            return True
        except Exception as error:  # network libraries raise many types
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if status in TRY_AGAIN and attempt < HEAD_TRIES:
                time.sleep(HEAD_PAUSE_S)
                continue
            if cached:
                log.info("%s; the files in the cache are used", as_error(repo, error).message)
                return False
            raise as_error(repo, error) from error
        return True
    return True


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
    elif isinstance(error, hub_patience.HubStalled):
        reason, cure = f"the hub is too slow ({first_line(error)})", f"try again later; {cures}"
    else:
        reason, cure = f"the hub does not answer ({first_line(cause)})", cures
    return HubError(f"{repo} could not be {action}: {reason}", cure)


def _verify_blob(path: Path, repo: str) -> None:
    """Check a new download in the hub's cache, where large files are named by their SHA-256."""
    blob = _blob_of(path)
    if len(blob.name) != 64 or sha256_of(blob) == blob.name:
        return
    for file in _cached_parts(path):
        file.unlink(missing_ok=True)
    raise HubError(f"{repo}: {path.name} arrived damaged (SHA-256 differs)", "try again")


def _blob_of(path: Path) -> Path:
    """Return the blob that a file in the hub's cache is a link to. It is named by its ETag.

    The blob may itself be a link, to a store that all repositories share and that is named by other
    hashes.
    """
    return path.parent / path.readlink() if path.is_symlink() else path


def _cached_parts(path: Path) -> list[Path]:
    """Return a file in the hub's or torch.hub's cache, and what it is a link to within the cache.

    A user may have put a link to a file of their own into the cache.
    """
    # The hub's: CACHE/models--OWNER--NAME/snapshots/COMMIT/FILE.
    cache = path.parents[3] if path.parents[1].name == "snapshots" else path.parent
    linked = {Path(os.path.normpath(file)) for file in (path.resolve(), _blob_of(path))}
    caches = (cache, cache.resolve())
    return [*(file for file in linked if any(map(file.is_relative_to, caches))), path]


def _licence(repo: str) -> str:
    """Return a note on the licence to append to a log line, if the weights are released ones."""
    entries = zoo.models().values()
    licences = {found.hub: e.licence for e in entries for found in e.checkpoints.values()}
    licence = licences.get(repo, NON_COMMERCIAL if repo.startswith(RELEASED_BY) else None)
    if licence is None:
        return ""
    return f" ({LICENCE_NOTE if licence == NON_COMMERCIAL else f'licence: {licence}'})"


def url_cache() -> Path:
    import torch.hub

    return Path(torch.hub.get_dir()) / "checkpoints"


def _file_name(url: str) -> str:
    """Return the name of a URL's file in the cache.

    A released file keeps its name, as torch.hub names it. Other names begin with a hash of the URL,
    because different URLs can end with the same name.
    """
    try:
        name = Path(urllib.parse.urlparse(url).path).name
    except ValueError as error:
        raise UsageError(f"{url!r} is not a valid URL ({first_line(error)})", "check it") from error
    if url in (url_of(name), WEIGHTS_URL + name) and 0 < len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(os.fsencode(url)).hexdigest()[:16]
    return f"{digest}-{name[-MAX_NAME:]}"
