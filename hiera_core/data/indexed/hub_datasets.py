"""Parquet files of data sets on the Hugging Face Hub: `hf://datasets/user/name[@revision]`."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...weights import hub_patience
from ...weights.download import as_error, is_offline
from .parquet_images import TableFile

REFS = "refs/convert/parquet"  # where the Hub keeps its Parquet files of data in other formats
NAME = re.compile(
    r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?(/(?P<inner>.*))?"
)
ENDING = ".parquet"
# Some have a hash behind their number, which differs from file to file.
NUMBERED = re.compile(r"(.*-)([0-9]{3,6})-of-([0-9]{3,6})(?:-[0-9a-f]+)?\.parquet")
MAX_FILES = 10_000  # of which missing ones are looked for
CURES = "check the name, the network and HF_TOKEN, or download it: hf download --repo-type dataset"
log = logging.getLogger("hiera")


@dataclass(frozen=True)
class HubDataset:
    """A data set on the hub.

    Args:
        repo: `user/name`.
        revision: A branch, tag or commit; None for `main`.
        inner: What is wanted of it: a split, a configuration, both, a file or a folder; "" for all.
    """

    repo: str
    revision: str | None
    inner: str

    def files(self) -> dict[str, TableFile]:
        """Return the Parquet files by their paths within the data set.

        Raises:
            HubError: The hub does not answer, or has no such data set.
            UsageError: It has no Parquet files.
        """
        if is_offline():
            return self._cached_files()
        found = self._listed(self.revision)
        if not found and self.revision is None:
            found = self._listed(REFS)
        if not found:
            raise UsageError(
                f"hf://datasets/{self.repo} holds no Parquet files",
                "convert it with `datasets`: load_dataset(...).push_to_hub(...)",
            )
        return found

    def _listed(self, revision: str | None) -> dict[str, TableFile]:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RevisionNotFoundError
        from huggingface_hub.hf_api import RepoFile

        found: dict[str, TableFile] = {}
        try:
            with hub_patience.limited():
                tree = HfApi().list_repo_tree(
                    self.repo, recursive=True, revision=revision, repo_type="dataset"
                )
                for entry in tree:
                    if isinstance(entry, RepoFile) and entry.path.endswith(".parquet"):
                        fetch = functools.partial(self._download, entry.path, revision)
                        at = f"@{revision}" if revision else ""
                        name = f"hf://datasets/{self.repo}{at}/{entry.path}"
                        found[entry.path] = TableFile(name, [entry.size, entry.blob_id], fetch)
        except RevisionNotFoundError as error:
            if revision == REFS:
                return {}
            raise as_error(self.repo, error, cures=CURES) from error
        except Exception as error:  # network libraries raise many types
            raise as_error(self.repo, error, cures=CURES) from error
        return found

    def _download(self, file: str, revision: str | None) -> Path:
        """Return a file in the hub's cache, after downloading it if it is not there."""
        from huggingface_hub import hf_hub_download

        options: dict[str, Any] = {"repo_type": "dataset", "revision": revision}
        try:
            with hub_patience.limited():
                return Path(hf_hub_download(self.repo, file, **options))
        except Exception as error:
            raise as_error(self.repo, error, cures=CURES) from error

    def _cached_files(self) -> dict[str, TableFile]:
        """Return the files that are in the hub's cache, and those that are missing beside them.

        Raises:
            HubError: There are none.
        """
        from huggingface_hub import snapshot_download

        found: dict[str, TableFile] = {}
        missing: Exception = FileNotFoundError("no Parquet files")
        for revision in [self.revision] if self.revision else [None, REFS]:
            try:
                folder = Path(
                    snapshot_download(
                        self.repo, repo_type="dataset", revision=revision, local_files_only=True
                    )
                )
            except Exception as error:
                if revision != REFS or self.revision is not None:
                    missing = error
                continue
            for path in sorted(folder.rglob("*.parquet")):
                inner = path.relative_to(folder).as_posix()
                found[inner] = TableFile.at(str(path))
            if found:
                for inner in _missing_numbers(found):
                    fetch = functools.partial(self._download, inner, revision)  # says what it lacks
                    found[inner] = TableFile(inner, [], fetch)
                return found
        raise as_error(self.repo, missing, cures=CURES) from missing


def _missing_numbers(files: Iterable[str]) -> list[str]:
    """Return the names that are missing from numbered files, such as `train-00001-of-00002`."""
    found: dict[tuple[str, int], dict[int, str]] = {}
    for name in files:
        if numbered := NUMBERED.fullmatch(name):
            start, number, total = numbered.groups()
            found.setdefault((start, int(total)), {})[int(number)] = number
    return [
        f"{start}{number:0{len(next(iter(have.values())))}}-of-{total:05}{ENDING}"
        for (start, total), have in found.items()
        for number in range(min(total, MAX_FILES))
        if number not in have
    ]


def parse(text: str) -> HubDataset | None:
    """Return the data set that `hf://datasets/user/name[@revision][/part]` names, or None if this
    is something else, such as a tar file in a data set."""
    found = NAME.fullmatch(text)
    if found is None or (found["inner"] or "").endswith(".tar"):
        return None
    return HubDataset(found["repo"], found["revision"], (found["inner"] or "").strip("/"))
