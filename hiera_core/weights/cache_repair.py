"""Read files from the hub's or torch.hub's cache, and fetch damaged ones again.

A damaged file in a cache would fail for ever, because nothing would replace it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..errors import CheckpointError, HubError
from .download import FetchedFiles, drop_from_cache
from .integrity import DamagedFile

log = logging.getLogger("hiera")

MAX_FETCHES = 40  # a checkpoint may have many files, and each of them may be damaged
T = TypeVar("T")


def read_cached(
    fetch: Callable[[], FetchedFiles],
    read: Callable[[FetchedFiles], T],
    source: str,
    offline: bool,
) -> T:
    """Fetch the files of a checkpoint, and read them. Remove damaged ones, and fetch them again.

    Each file is fetched again once at most.

    Args:
        fetch: Returns the files, from the cache or by downloading them.
        read: Reads them.
        source: Name of the checkpoint, for messages.
        offline: Whether nothing can be downloaded. Nothing is removed then.

    Raises:
        DamagedFile: A file in the cache is damaged, and we are offline.
        HubError: A file cannot be downloaded, or arrives damaged.
    """
    removed: set[Path] = set()
    for _ in range(MAX_FETCHES):
        start = time.time()
        try:
            fetched = fetch()
            start = time.time()
            return read(fetched)
        except DamagedFile as error:
            if offline:
                hint = "it is in a cache: call again with a network, and it is fetched again"
                raise DamagedFile(error.path, error.reason, hint) from error
            drop_from_cache(error.path, unless_newer=start)
            if error.path in removed:
                message = f"{source}: {error.path.name} {error.reason}"
                raise HubError(message, "try again later, or use --checkpoint") from error
            removed.add(error.path)
            log.warning("%s; it is removed from the cache, and fetched again", error.message)
        except CheckpointError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            log.debug("%s; another process has removed it", error.message)
    raise HubError(f"{source} is damaged each time it is fetched", "try again")
