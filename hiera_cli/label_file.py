"""Class names from a file or a URL."""

from __future__ import annotations

from pathlib import Path

from hiera_core.data import sources
from hiera_core.errors import InputError, UsageError
from hiera_core.zoo.labels import parse_labels, read_labels


def read_label_file(text: str) -> list[str]:
    """Return class names in the order of class indices; see `read_labels`.

    Args:
        text: A path, or a URL of the web or a remote place.

    Raises:
        UsageError: It cannot be read, is empty, or its numbers are not those of classes.
    """
    source = sources.from_name(text)
    if source.url is None:
        return read_labels(text)
    try:
        content = source.content()
    except InputError as error:
        raise UsageError(f"labels {text} cannot be read ({error.message})", error.hint) from error
    return parse_labels(content.read_bytes() if isinstance(content, Path) else content, text)
