"""Publish converted checkpoints on the hub."""

from __future__ import annotations

from pathlib import Path

from ..errors import HubError, UsageError
from ..weights import download

HINTS = (
    "the converted files are kept; set HF_TOKEN to a token with write access, or check HF_ENDPOINT"
)


def check(repo: str) -> None:
    """Check that a repository name is valid and the hub not offline, before the conversion begins.

    Raises:
        UsageError: The name is not valid.
        HubError: HF_HUB_OFFLINE is set.
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
    """Upload a converted checkpoint in one commit. The repository is created if it is missing.

    Args:
        dest: Folder with the files, or one of the files in it.
        repo: Name of the repository, `owner/name`.
        names: Names of the files to upload.

    Returns:
        The URL of the repository.

    Raises:
        HubError: The hub refuses the upload or does not answer. The local files are kept.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = dest if dest.is_dir() else dest.parent
    operations = [CommitOperationAdd(name, folder / name) for name in names]
    try:
        api = HfApi()
        url = api.create_repo(repo, exist_ok=True)
        api.create_commit(repo, operations, commit_message=f"Add {dest.name}")
    except Exception as error:  # network libraries raise errors of many types
        raise download.as_error(repo, error, "published", HINTS) from error
    return str(url)
