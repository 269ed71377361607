"""The paths and URLs in a stream of text: a list, or standard input."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator
from typing import BinaryIO

from ...errors import InputError
from ...plain_data import text_encoding

PARQUET = b"PAR1"
NO_TEXT = re.compile(rb"[\x01-\x08\x0e-\x1a\x1c-\x1f]")


def read_names(stream: BinaryIO, start: bytes = b"") -> Iterator[str]:
    """Yield the paths and URLs of a stream, separated by NUL if the bytes that are read first
    contain one, else by newlines.

    The stream is in UTF-8 or UTF-16 (see `text_encoding`). Names that are not UTF-8 keep their
    bytes (`os.fsdecode`). A byte order mark is left out.

    Args:
        stream: The stream, read up to the end of `start`.
        start: The bytes that have been read from it before.

    Raises:
        InputError: It begins like UTF-16, and is not.
    """
    blocks = _blocks_in_utf8(stream, start)
    rest, separator = next(blocks, b""), b""
    while True:
        if not separator and (b"\0" in rest or b"\n" in rest):
            separator = b"\0" if b"\0" in rest else b"\n"
        if separator:
            *lines, rest = rest.split(separator)
            yield from (_name(line) for line in lines if line.strip())
        block = next(blocks, None)
        if block is None:
            break
        rest += block
    if rest.strip():
        yield _name(rest)


def read_available(stream: BinaryIO) -> bytes:
    """Return the bytes that are available, without waiting for a full block; b"" at the end."""
    block: bytes = getattr(stream, "read1", stream.read)(1 << 16)
    return block


def check_text(start: bytes) -> bytes:
    """Return the first bytes of a list, if they are text. Names may hold control characters, or
    bytes that are not UTF-8; a list with both is another kind of file.

    Raises:
        InputError: They are not.
    """
    is_wide = text_encoding(start).startswith("utf-16")
    is_table = start.startswith(PARQUET)
    if is_table or (not is_wide and NO_TEXT.search(start) and not _is_utf8(start)):
        hint = "--manifest FILE reads a Parquet table" if is_table else "write one path per line"
        raise InputError("the list is not a text file", hint)
    return start


def _is_utf8(start: bytes) -> bool:
    """Return whether these are UTF-8, but for a character that may be cut at the end."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return True


def _blocks_in_utf8(stream: BinaryIO, start: bytes) -> Iterator[bytes]:
    """Yield the bytes of a stream as they arrive, without a byte order mark, and in UTF-8 if they
    are in UTF-16."""
    first = start
    while len(first) < len(codecs.BOM_UTF8) and (block := read_available(stream)):
        first += block
    encoding = text_encoding(first)
    if not encoding.startswith("utf-16"):
        yield first.removeprefix(codecs.BOM_UTF8)
        while block := read_available(stream):
            yield block
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        yield decoder.decode(first).encode()
        while block := read_available(stream):
            yield decoder.decode(block).encode()
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise InputError("the list is not in UTF-16 as it begins", "save it as UTF-8") from error


def _name(line: bytes) -> str:
    return os.fsdecode(line.removesuffix(b"\r"))
