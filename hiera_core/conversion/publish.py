"""Converted checkpoints to the hub, by huggingface_hub."""

from __future__ import annotations

from pathlib import Path

from ..errors import HubError, UsageError
from ..weights import download

CURES = "what was written is kept; set HF_TOKEN to a token that may write, check HF_ENDPOINT"


def check(repo: str) -> None:
    """What can be known before the work.

    Raises:
        UsageError: no name of a repository.
        HubError: the hub is switched off.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is no name of a hub repository", "use owner/name") from error
    if download.is_offline():
        raise HubError(f"{repo} cannot be published: HF_HUB_OFFLINE is set", "unset it")


def push(dest: Path, repo: str, names: list[str]) -> str:
    """Upload files of DEST (or beside it, where it is a file) in one commit. -> address

    Raises:
        HubError: the hub refuses or does not answer; DEST is there all the same.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = dest if dest.is_dir() else dest.parent
    add = [CommitOperationAdd(name, folder / name) for name in names]
    try:
        api = HfApi()
        url = api.create_repo(repo, exist_ok=True)
        api.create_commit(repo, add, commit_message=f"Add {dest.name}")
    except Exception as error:  # network libraries raise many types
        raise download.as_error(repo, error, "published", CURES) from error
    return str(url)
