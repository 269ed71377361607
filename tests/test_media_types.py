"""Tests of telling images, videos and sound apart."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Callable
from pathlib import Path

import pytest

SOUNDS = {
    "mp3": b"\xff\xfb\x90\x00" + bytes(400),
    "mp3 with tags": b"ID3\x04\0\0\0\0\0\x20" + bytes(400),
    "aac": b"\xff\xf1\x50\x80" + bytes(400),
    "flac": b"fLaC\0\0\0\x22" + bytes(400),
    "aiff": b"FORM\0\0\0\xffAIFF" + bytes(400),
}


def wav() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    return file.getvalue()


@pytest.mark.parametrize("ending", [".mp4", ".avi", ".jpg"])
@pytest.mark.parametrize("sound", ["wav", *SOUNDS])
def test_sound_with_another_ending_is_called_sound(
    hiera: Callable[..., tuple[int, str, str]],
    small_folder: Path,
    tmp_path: Path,
    sound: str,
    ending: str,
) -> None:
    path = tmp_path / f"x{ending}"
    path.write_bytes(wav() if sound == "wav" else SOUNDS[sound])
    code, out, err = hiera("predict", path, "-m", small_folder)
    assert code == 1 and json.loads(out)["error"]["message"] == "a sound file"
    assert "a sound file; give images or videos" in err
