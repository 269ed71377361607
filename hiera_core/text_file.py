"""Read small text files that users name: lists of class names, options, measurements."""

from __future__ import annotations

from pathlib import Path

from .errors import UsageError

MAX_BYTES = 64 << 20  # a larger file is not what the user meant, and /dev/zero never ends


def read_text(path: Path, what: str, max_bytes: int = MAX_BYTES) -> str:
    """Return the text of a file.

    Args:
        path: The file. It may be a pipe.
        what: What the file is, for messages: `labels`, `config`.
        max_bytes: Size of the largest file that is read.

    Raises:
        UsageError: The file cannot be read, is not UTF-8, or is larger than `max_bytes`.
    """
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{what} {str(path)!r} cannot be read ({reason})") from error
    if len(content) > max_bytes:
        raise UsageError(f"{what} {str(path)!r} is larger than {max_bytes >> 10} KiB")
    try:
        return content.decode("utf-8-sig")  # editors on Windows write a byte order mark
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} {str(path)!r} is not UTF-8 text", "save it as UTF-8") from error
