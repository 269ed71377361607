"""Images and clips in memory give the results of their files."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import hiera_core
from hiera_core.data.memory import as_pixels, device_pixels
from hiera_core.data.video_files.video_reader import Video
from hiera_core.errors import InputError

SAMPLES = Path(hiera_core.__file__).parent / "zoo" / "assets" / "samples"
CLIP = SAMPLES / "moving_right.mp4"


@pytest.fixture(scope="module")
def photo(pictures: Path) -> Path:
    return pictures / "rocket.png"


FORMS: dict[str, Callable[[Path], Any]] = {
    "PIL": Image.open,
    "bytes": Path.read_bytes,
    "bytearray": lambda p: bytearray(p.read_bytes()),
    "open file": lambda p: p.open("rb"),
    "BytesIO": lambda p: io.BytesIO(p.read_bytes()),
    "array": lambda p: np.array(Image.open(p)),
    "float array": lambda p: np.array(Image.open(p)) / 255,
    "reversed array": lambda p: np.array(Image.open(p))[:, ::-1][:, ::-1],
    "RGBA array": lambda p: np.array(Image.open(p).convert("RGBA")),
    "int64 array": lambda p: np.array(Image.open(p)).astype(np.int64),
    "uint16 array": lambda p: np.array(Image.open(p)).astype(np.uint16) * 257,
    "tensor": lambda p: torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1),
    "float tensor": lambda p: torch.from_numpy(np.array(Image.open(p)) / 255).permute(2, 0, 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_result_of_the_file(form: str, photo: Path) -> None:
    options: Any = {"model": "hiera_nano_32", "dtype": "fp32", "topk": 10}
    expected = hiera_core.predict(photo, **options)
    with contextlib.ExitStack() as stack:

        def source() -> Any:
            made = FORMS[form](photo)
            return stack.enter_context(made) if hasattr(made, "__exit__") else made

        record = hiera_core.predict(source(), **options)
        several = hiera_core.predict([source(), str(photo)], **options)
        vector = hiera_core.features(source(), "hiera_nano_32", dtype="fp32")["embedding"]
    assert isinstance(expected, dict) and record["topk"] == expected["topk"]
    for found in several:  # in a batch of two, up to rounding
        assert [p["id"] for p in found["topk"]] == [p["id"] for p in expected["topk"]]
        assert found["topk"][0]["prob"] == pytest.approx(expected["topk"][0]["prob"], abs=1e-6)
    assert torch.equal(
        vector, hiera_core.features(photo, "hiera_nano_32", dtype="fp32")["embedding"]
    )


def test_grey_pictures_are_read_like_their_files(tmp_path: Path, photo: Path) -> None:
    grey = Image.open(photo).convert("L")
    grey.save(tmp_path / "grey.png")
    expected = hiera_core.predict(tmp_path / "grey.png", "hiera_nano_32", dtype="fp32")
    for source in (
        grey,
        np.array(grey),
        np.array(grey)[..., None],
        torch.from_numpy(np.array(grey)),
    ):
        record = hiera_core.predict(source, "hiera_nano_32", dtype="fp32")
        assert record["topk"] == expected["topk"]  # type: ignore[call-overload]


def test_orientation_of_pil_images_is_applied(photo: Path) -> None:
    image = Image.open(photo).convert("RGB")
    image.getexif()[0x0112] = 6  # to be rotated by 90 degrees
    assert as_pixels(image).shape == (image.width, image.height, 3)


def test_clips_in_memory(photo: Path) -> None:
    with Video(CLIP) as video:
        frames = np.stack([frame.pixels for frame in video.read(range(video.frames))])
    options: Any = {"model": "hiera_nano_8x32", "dtype": "fp32", "topk": 4}
    forms = [
        frames,
        torch.from_numpy(frames),
        torch.from_numpy(frames).permute(0, 3, 1, 2) / 255,
        frames[:8],  # as many frames as the model takes: they are the clip
    ]
    for source in forms:
        record = hiera_core.predict(source, **options)
        assert record["kind"] == "video" and record["status"] == "ok"
        assert record["topk"][0]["label"] == "moving right"
    record = hiera_core.predict(frames, "hiera_nano_32")
    assert record["status"] == "error" and "takes pictures" in record["error"]["message"]
    record = hiera_core.predict(photo, "hiera_nano_8x32")
    assert isinstance(record, dict) and "takes video clips" in record["error"]["message"]


@given(
    hnp.arrays(
        st.sampled_from((np.uint8, np.bool_, np.float32, np.float16, np.uint16, np.int32)),
        st.tuples(st.integers(1, 5), st.integers(1, 5), st.sampled_from((1, 3, 4))),
        elements={"min_value": 0, "max_value": 1},
    )
)
@settings(deadline=None)
def test_pixels_are_rgb_of_the_same_size(array: np.ndarray) -> None:
    pixels = as_pixels(array)
    assert pixels.dtype == np.uint8 and pixels.shape == (*array.shape[:2], 3)
    assert np.array_equal(as_pixels(torch.from_numpy(array.astype(np.float32))) is not None, True)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((3, 8, 9)), "no image or clip"),
        (np.zeros((8, 8, 2), np.uint8), "no image or clip"),
        (np.zeros((0, 8, 3), np.uint8), "no image or clip"),
        (np.zeros(5), "no image or clip"),
        (np.full((8, 8, 3), 1.5), "lie in 1.5..1.5"),
        (np.full((8, 8, 3), np.nan), "lie in nan..nan"),
        (np.full((8, 8, 3), -1), "lie in -1..-1"),
        (torch.randn(3, 8, 8), "lie in"),
        (b"not a picture", "not a picture"),
        (b"", "empty file"),
        (io.StringIO("text"), "a text file"),
    ],
)
def test_bad_values_are_the_error_of_that_input(source: Any, message: str, photo: Path) -> None:
    bad, good = hiera_core.predict([source, photo], "hiera_nano_32")
    assert bad["status"] == "error" and message in bad["error"]["message"]
    assert good["status"] == "ok"
    with pytest.raises(InputError, match=message):
        hiera_core.features(source, "hiera_nano_32")["embedding"]


def test_wide_integers_may_hold_bytes(photo: Path) -> None:
    """As in files of TIFF: if all values fit into 8 bits, they are values of 8 bits."""
    pixels = np.array(Image.open(photo).convert("RGB"))
    for dtype in (np.uint16, np.int32, np.int64, np.uint64):
        assert np.array_equal(as_pixels(pixels.astype(dtype)), pixels), dtype
    assert np.array_equal(as_pixels(pixels.astype(np.uint16) * 257), pixels)
    # 16-bit values that are nearly black cannot be told from these, so the caller scales them.
    dark = pixels.astype(np.uint16)
    assert as_pixels((dark / 257).astype(np.uint8)).max() <= 1
    # A clip is judged as a whole.
    clip = np.stack([dark, dark * 257])
    assert np.array_equal(as_pixels(clip), np.stack([dark >> 8, pixels]))


def test_tensors_of_any_layout(photo: Path) -> None:
    pixels = np.array(Image.open(photo).convert("RGB"))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    for form in (
        torch._neg_view(-tensor),
        tensor.to_sparse(),
        tensor.clone().requires_grad_(),
        torch.nn.Parameter(tensor),
        tensor.to(memory_format=torch.contiguous_format).flip(-1).flip(-1),
    ):
        assert np.array_equal(as_pixels(form), pixels)
    assert device_pixels(tensor.to_sparse()) is None  # as it is called on a GPU


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        (np.zeros((3, 8, 9), np.uint8), "shape (3, 8, 9)", "numpy.moveaxis(array, -3, -1)"),
        (np.zeros((2, 1, 8, 9), np.uint8), "shape (2, 1, 8, 9)", "numpy.moveaxis(array, -3, -1)"),
        (np.zeros((8, 8, 3), complex), "of type complex128", "give uint8"),
        (np.zeros((8, 8, 3), object), "of type object", "give uint8"),
        (torch.zeros(3, 8, 8, dtype=torch.cfloat), "of type complex64", "give uint8"),
        (torch.empty(3, 8, 8, device="meta"), "has no values", "give pixels"),
        (np.array(3), "shape ()", "[height, width, channels]"),
    ],
)
def test_what_is_no_image_says_what_to_do(source: Any, message: str, hint: str) -> None:
    record = hiera_core.predict(source, "hiera_nano_32")
    assert isinstance(record, dict) and record["status"] == "error"
    assert message in record["error"]["message"] and hint in record["error"]["hint"]


def test_an_image_opened_as_text_is_called_so(photo: Path) -> None:
    with photo.open(encoding="utf-8") as file:
        record = hiera_core.predict(file, "hiera_nano_32")
    assert record["error"]["message"] == "a text file"  # type: ignore[call-overload]
    assert record["error"]["hint"] == "open it with mode 'rb'"  # type: ignore[call-overload]


def test_texts_are_paths_unless_they_are_expanded(tmp_path: Path, photo: Path) -> None:
    (tmp_path / "a*b?[1].png").write_bytes(photo.read_bytes())
    (tmp_path / "@list").write_bytes(photo.read_bytes())
    for name in ("a*b?[1].png", "@list"):
        assert hiera_core.predict(str(tmp_path / name), "hiera_nano_32")["status"] == "ok"  # type: ignore[call-overload]
    pattern = str(tmp_path / "a*.png")
    record = hiera_core.predict(pattern, "hiera_nano_32")
    assert isinstance(record, dict) and record["status"] == "error"
    assert "expand=True" in record["error"]["hint"]
    (found,) = hiera_core.predict(pattern, "hiera_nano_32", expand=True)
    assert found["status"] == "ok"
    for text in ("-", "@none.txt", "https://example.org/x.png"):
        record = hiera_core.predict(text, "hiera_nano_32")
        assert isinstance(record, dict) and "expand=True" in record["error"]["hint"]
