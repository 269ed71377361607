"""Tell images from videos: by the first bytes of a file, or by its extension."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import InputError
from ..records import Kind

# Files in a folder are inputs if they have these extensions. A file that the user names is always
# tried.
PICTURE_ENDINGS = frozenset(
    ".jpg .jpeg .jpe .jfif .jif .png .apng .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm "
    ".avif .avifs .heic .heif .hif .mpo .ico .qoi".split()
)
VIDEO_ENDINGS = frozenset(
    ".mp4 .mkv .webm .mov .qt .avi .divx .m4v .mpg .mpeg .m1v .m2v .vob .ts .mts .m2ts .m2t .wmv "
    ".asf .flv .f4v .3gp .3g2 .ogv .ogm .mxf .dv .nut .ivf .h264 .264 .hevc .265".split()
)
ENDINGS = PICTURE_ENDINGS | VIDEO_ENDINGS
# Tables of files in JSON; those with a value on each line come first.
JSON_LINE_ENDINGS = (".jsonl", ".ndjson")
JSON_ENDINGS = (*JSON_LINE_ENDINGS, ".json")
SIGNATURE_BYTES = 200  # how many bytes of a file `sniff_kind` needs
_IMAGE_SIGNATURE = re.compile(
    rb"\xff\xd8\xff"  # JPEG
    rb"|\x89PNG\r\n|GIF8[79]a|II[*+]\0|MM\0[*+]|RIFF....WEBP|qoif.{8}[\x03\x04]"
    rb"|BM....\0\0\0\0|P[1-6][\s#]+[\d#]|\0\0\x01\0[^\0]"
    rb"|\0\0\0\x0cjP  |\xff\x4f\xff\x51"  # JPEG 2000: JP2 file, bare codestream
    rb"|....ftyp(avif|avis|heic|heix|hevc|mif1|msf1)",
    re.DOTALL,
)
_VIDEO_SIGNATURE = re.compile(
    rb"....(ftyp|moov|mdat|free|skip|wide|pnot)"  # MP4, QuickTime
    rb"|\x1a\x45\xdf\xa3"  # Matroska, WebM
    rb"|RIFF....AVI |FLV\x01|OggS\0|\0\0\x01[\xba\xb3]"  # MPEG program and elementary streams
    rb"|\x30\x26\xb2\x75\x8e\x66\xcf\x11"  # ASF
    rb"|\x47.{187}\x47|.{4}\x47.{191}\x47",  # MPEG transport stream, 188 or 192 bytes per packet
    re.DOTALL,
)
_SOUND_SIGNATURE = re.compile(
    rb"RIFF....WAVE|ID3[\x02-\x04]|\xff[\xfb\xf3\xf2\xfa\xf1\xf9]|fLaC|FORM....AIF[FC]|#!AMR|\.snd",
    re.DOTALL,
)


def kind_of(content: Path | bytes, name: str) -> Kind:
    """Return the kind of an input by its first bytes, or, if they match no known format, by the
    extension of `name`.

    Raises:
        InputError: The file cannot be read, is empty, or holds only sound.
    """
    if isinstance(content, bytes):
        start = content[:SIGNATURE_BYTES]
    else:
        try:
            with content.open("rb") as file:
                start = file.read(SIGNATURE_BYTES)
        except OSError as error:
            raise as_input_error(error) from error
    if not start:
        raise InputError("empty file", "the file is damaged, or not an image or video")
    if _SOUND_SIGNATURE.match(start):
        raise InputError("a sound file", "give images or videos")
    return sniff_kind(start) or ("video" if ending_of(name) in VIDEO_ENDINGS else "image")


def sniff_kind(start: bytes) -> Kind | None:
    """Return the kind of a file by its first bytes, or None if they match no known format."""
    if _IMAGE_SIGNATURE.match(start):
        return "image"
    return "video" if _VIDEO_SIGNATURE.match(start) else None


def ending_of(name: str) -> str:
    """Return the file extension of a path or URL, in lower case."""
    return Path(name.partition("?")[0]).suffix.lower()


def as_input_error(error: OSError | ValueError) -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(reason.lower(), "check the path")
