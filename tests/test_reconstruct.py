"""Tests of reconstruction: pixels in the right places, the reference's values, `hiera mae`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hiera.hiera_mae import MaskedAutoencoderHiera as ReferenceAutoencoder
from PIL import Image, ImageDraw, ImageFont

import hiera_core
from hiera_core import zoo
from hiera_core.data import datasets
from hiera_core.data.image_reader import open_image
from hiera_core.errors import UsageError
from hiera_core.inference.reconstruct import BatchReconstructor, reconstruct
from hiera_core.models.mae import MaskedAutoencoderHiera, normalise_patches
from hiera_core.viz.grid import FONT_SIZE, LINE, MAX_LINES, captioned_grid, draw_lines, wrap_text

from .conftest import assert_close, draw_weights
from .test_video_reader import write_video

Command = Callable[..., tuple[int, str, str]]
SAMPLES = zoo.ASSETS / "samples"
NARROW = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2, "embed_dim": 16}
IMAGE = {**NARROW, "stages": (1, 1, 2, 1), "q_pool": 2, "input_size": (128, 64)}
VIDEO = {
    **IMAGE,
    "input_size": (8, 128, 64),
    "q_stride": (1, 2, 2),
    "mask_unit_size": (1, 8, 8),
    "patch_kernel": (3, 7, 7),
    "patch_stride": (2, 4, 4),
    "patch_padding": (1, 3, 3),
    "sep_pos_embed": True,
}
IMAGE_AND_VIDEO = pytest.mark.parametrize("config", [IMAGE, VIDEO], ids=["image", "video"])


def some_model(config: dict[str, Any]) -> MaskedAutoencoderHiera:
    model = MaskedAutoencoderHiera(**config).eval()
    draw_weights(model)
    return model


def some_input(config: dict[str, Any], batch: int = 2) -> torch.Tensor:
    """Return noise. Pixels differ from their neighbours, so a wrong order of pixels is detected."""
    return torch.randn(batch, 3, *config["input_size"], generator=torch.Generator().manual_seed(1))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio, in decibels, of values in [0, 1]."""
    return -10 * float((a - b).square().mean().clamp_min(1e-12).log10())


def scrambled(labels: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Change the order of a patch's values from (channel, y, x) to (y, x, channel), or back."""
    size = int((labels.shape[-1] / 3) ** 0.5)
    if config is IMAGE:
        return labels.unflatten(-1, (3, size, size)).movedim(-3, -1).flatten(-3)
    return labels.unflatten(-1, (size, size, 3)).movedim(-1, -3).flatten(-3)


@IMAGE_AND_VIDEO
@pytest.mark.parametrize("raw", [False, True])
def test_exact_predictions_reconstruct_the_original(
    config: dict[str, Any], raw: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = some_model(config), some_input(config)
    labels = normalise_patches(model.pixel_labels(x))

    def reconstruct_labels(order: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        def decoder(latent: Any, visible: Any, deleted: Any = None) -> torch.Tensor:
            patches = order(labels)
            if deleted is None:
                return patches
            return patches.gather(1, deleted.cells[..., None].expand(-1, -1, patches.shape[-1]))

        monkeypatch.setattr(model, "forward_decoder", decoder)
        torch.manual_seed(0)
        return reconstruct(model, x, raw=raw)

    found = reconstruct_labels(lambda values: values)
    hidden = found.masked != found.original
    target = x if config is IMAGE else x[:, :, ::2]  # a video's target: frames 0, 2, 4, ...
    reconstructor = BatchReconstructor(model)
    assert_close(found.original, reconstructor.transform.denormalise(target))
    share = hidden.float().mean().item()
    assert abs(share - reconstructor.mask_ratio) < 0.15, (
        "the hidden share of the pixels should be about the mask ratio"
    )
    assert psnr(found.reconstruction[hidden], found.original[hidden]) > 50
    assert psnr(found.reconstruction, found.original) > 50
    assert found.loss.max() < 1e-9
    wrong = reconstruct_labels(lambda values: scrambled(values, config))
    assert psnr(wrong.reconstruction[hidden], found.original[hidden]) < 20


@IMAGE_AND_VIDEO
@torch.no_grad()
def test_losses_predictions_and_labels_match_the_reference(config: dict[str, Any]) -> None:
    theirs = draw_weights(ReferenceAutoencoder(**config)).eval()
    ours = MaskedAutoencoderHiera(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    x = some_input(config)
    mask = theirs.get_random_mask(x, 0.6)
    loss, preds, labels, _ = theirs(x, mask=mask)
    for raw in (False, True):
        found = reconstruct(ours, x, mask=mask, raw=raw)
        assert_close(found.preds.flatten(0, 1), preds)
        assert_close(found.labels.flatten(0, 1), labels)
        assert_close(found.loss.mean(), loss)
        assert torch.equal(found.mask, mask)


def test_visible_patches_are_original_pixels_unless_raw() -> None:
    model, x = some_model(IMAGE), some_input(IMAGE)
    mask = model.get_random_mask(x, 0.5)
    found, raw = (reconstruct(model, x, mask=mask, raw=raw) for raw in (False, True))
    hidden = found.masked != found.original
    assert_close(found.reconstruction[~hidden], found.original[~hidden])
    assert_close(raw.reconstruction[hidden], found.reconstruction[hidden])
    assert psnr(raw.reconstruction[~hidden], found.original[~hidden]) < 30
    with pytest.raises(UsageError, match="leaves no visible"):
        reconstruct(model, x, 0.9)


@pytest.mark.parametrize("size", [(64, 128), (96, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("raw", [False, True])
def test_inputs_of_another_size_equal_those_of_a_model_built_for_it(
    size: tuple[int, int], raw: bool, tmp_path: Path
) -> None:
    model = some_model({**IMAGE, "dynamic_size": True})
    model.save_pretrained(tmp_path)
    fixed = hiera_core.create_model(str(tmp_path), input_size=size, dynamic_size=False)
    x = torch.randn(2, 3, *size)
    mask = fixed.get_random_mask(x, 0.5)
    ours, theirs = (reconstruct(each, x, mask=mask, raw=raw) for each in (model, fixed))
    assert_close(ours.original, theirs.original)
    assert torch.equal(ours.masked == 0.5, theirs.masked == 0.5)
    assert_close(ours.reconstruction, theirs.reconstruction)
    assert ours.reconstruction.shape == x.shape
    assert reconstruct(model, x, 0.5).mask.shape == mask.shape  # drawn for this size


def test_the_bundled_autoencoder_beats_the_mean_of_a_patch() -> None:
    """The gain is at least 1 dB on held-out digits. A prediction of 0 shows the mean of a patch."""
    model = hiera_core.mae_hiera_nano_32(pretrained=True).eval()
    held = datasets.open_eval_data("digits").sources
    reconstructor = BatchReconstructor(model)
    views = [reconstructor.transform.crop(open_image(held[i].content())[0]) for i in range(100)]
    print("mask ratio  model  mean of the patch  gain (dB)")
    for ratio in (0.4, 0.6, 0.75):
        reconstructor = BatchReconstructor(model, mask_ratio=ratio, seed=3)
        found = reconstructor.run(views)
        x = reconstructor.transform.normalise(torch.from_numpy(np.stack(views)))
        zeros = torch.zeros_like(torch.cat([f.preds for f in found]))
        units = reconstructor.units.expand(len(x), -1)
        baseline = reconstruct(
            model, x, keep_ids=units, forward=lambda *_, preds=zeros, **__: (0, preds)
        )
        original = torch.stack([f.original for f in found])
        hidden = torch.stack([f.masked for f in found]) != original
        ours = psnr(torch.stack([f.reconstruction for f in found])[hidden], original[hidden])
        mean = psnr(baseline.reconstruction[hidden], original[hidden])
        print(f"{ratio:<10}  {ours:5.2f}  {mean:17.2f}  {ours - mean:.2f}")
        assert ours - mean >= 1


# `hiera mae` ------------------------------------------------------------------------------------


def test_mae_of_pictures_is_reproducible(hiera: Command, tmp_path: Path) -> None:
    digits = [SAMPLES / "three.png", SAMPLES / "eight.png", tmp_path / "none.png"]
    options = ["-m", "mae_hiera_nano_32", "--seed", "5", "--dtype", "fp32"]
    code, out, err = hiera("mae", *digits, *options, "-o", tmp_path / "a")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and [r["status"] for r in records] == ["ok", "ok", "error"]
    assert "none.png: no such file" in err and "2 ok, 1 failed" in err and "true mean" in err
    assert records[0]["mae"]["visible"] == 6 and records[0]["mae"]["masked"] == 10
    file = Path(records[0]["files"][0])
    assert file == tmp_path / "a" / digits[0].name
    row_of_three = pixels(file)
    assert row_of_three.shape == (160 + 12 + 20, 3 * 166 + 6, 3)
    # The same seed gives the same bytes, alone and among others.
    code, *_ = hiera("mae", digits[1], *options, "-o", tmp_path / "b", "-q")
    again = tmp_path / "b" / digits[1].name
    assert code == 0 and again.read_bytes() == Path(records[1]["files"][0]).read_bytes()
    # Another seed, raw predictions and another mask ratio give other pictures.
    for number, extra in enumerate((["--seed", "6"], ["--raw"], ["--mask-ratio", "0.8"])):
        hiera("mae", digits[1], *options, *extra, "-o", tmp_path / f"c{number}", "-q")
        other = tmp_path / f"c{number}" / digits[1].name
        assert other.read_bytes() != again.read_bytes()
    hiera("mae", digits[0], *options, "-o", tmp_path / "d", "--reconstruction-only")
    reconstruction = pixels(tmp_path / "d" / digits[0].name)
    assert reconstruction.shape == (32, 32, 3)
    left = 6 + 2 * 166  # the third picture, with each pixel enlarged to 5x5
    assert np.array_equal(row_of_three[6:166:5, left : left + 160 : 5], reconstruction)


def test_one_picture_and_one_unit_are_not_several(hiera: Command, tmp_path: Path) -> None:
    options = ["-m", "mae_hiera_nano_32", "--mask-ratio", "0.93", "-f", "table"]
    code, out, err = hiera("mae", SAMPLES / "three.png", *options, "-o", tmp_path / "x.png")
    assert code == 0 and "1 unit visible, 15 masked" in out
    assert f"; the picture is {tmp_path / 'x.png'}\n" in err


def test_mae_of_a_video_is_reproducible(hiera: Command, tmp_path: Path) -> None:
    sample = SAMPLES / "moving_right.mp4"
    options = ["-m", "mae_hiera_nano_8x32", "--mask-ratio", "0.75", "-f", "table"]
    code, out, _ = hiera("mae", sample, *options, "-o", tmp_path / "a")
    movie, sheet = (Path(line.split("-> ")[1]) for line in out.splitlines()[2:])
    assert code == 0 and "4 units visible, 12 masked" in out
    with av.open(str(movie)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert len(frames) == 4 and stream.average_rate == 2  # 8 frames at 4 per second, in pairs
    assert frames[0].shape == (160, 3 * 160 + 12, 3)
    assert pixels(sheet).shape == (3 * (160 + 6 + 20) + 6, 4 * 166 + 6, 3)
    hiera("mae", sample, *options, "-o", tmp_path / "b")
    assert (tmp_path / "b" / str(sheet.relative_to(tmp_path / "a"))).read_bytes() == (
        sheet.read_bytes()
    )


def test_the_frame_rate_of_a_reconstruction_is_that_of_the_input(tmp_path: Path) -> None:
    """Video models take 16 frames, 4 apart at 30 per second, and predict every second one."""
    model = some_model({**VIDEO, "input_size": (16, 64, 64)})
    assert BatchReconstructor(model).frame_rate == 30 / 8
    slower = hiera_core.Reconstructor(model, sampling=hiera_core.Sampling(stride=8, fps=60))
    assert slower.runner("video").frame_rate == 60 / 16
    pipeline = hiera_core.Reconstructor(model)
    (record,) = pipeline(hiera_core.data.sources.expand([str(write_video(tmp_path / "x.mp4"))]))
    assert record.video["views"] == 1
    assert record.result.reconstruction.shape == (3, 8, 64, 64)


@pytest.mark.parametrize("ratio", ["0", "1", "nan", "-0.5", "1.5", "0.99"])
def test_mask_ratios_are_checked_before_weights_load(
    hiera: Command, tmp_path: Path, ratio: str
) -> None:
    arguments = ["mae", SAMPLES / "three.png", "-o", tmp_path / "out", f"--mask-ratio={ratio}"]
    for model in ("mae_hiera_nano_32", "mae_hiera_base_224"):
        code, _, err = hiera(*arguments, "-m", model, "--checkpoint", tmp_path / "none.pth")
        assert code == 2 and err.count("\n") == 1 and "mask ratio" in err, err
    code, _, err = hiera(*arguments)
    assert code == 2 and "mask ratio" in err


def test_bad_models_and_inputs_are_refused(hiera: Command, tmp_path: Path) -> None:
    digit, clip = SAMPLES / "three.png", SAMPLES / "moving_right.mp4"
    cases = [
        ([digit, "-m", "hiera_nano_32"], 2, "use mae_hiera_nano_32"),
        ([digit, "-m", "mae_hiera_nano_23"], 2, "did you mean mae_hiera_nano_32"),
        ([digit, "--checkpoint", SAMPLES.parent / "hiera_nano_32.safetensors"], 3, "no decoder"),
        ([clip, "-m", "mae_hiera_nano_32"], 1, "takes pictures"),
        ([digit, "-m", "mae_hiera_nano_8x32"], 1, "takes video clips"),
        ([digit, "-m", "mae_hiera_nano_32", "--device", "cuda"], 5, "not available"),
        ([tmp_path / "*.png", "-m", "mae_hiera_nano_32"], 2, "nothing matches"),
    ]
    if torch.cuda.is_available():
        cases.pop(5)
    for arguments, expected, message in cases:
        code, _, err = hiera("mae", *arguments, "-o", tmp_path / "out")
        assert code == expected and message in err and "Traceback" not in err, err
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    code, _, err = hiera("mae", digit)
    assert code == 2 and "--output" in err


def test_mae_does_not_replace_its_input(
    hiera: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(SAMPLES / "three.png", "three.png")
    before = Path("three.png").read_bytes()
    options = ["-m", "mae_hiera_nano_32", "-o"]
    code, _, err = hiera("mae", "three.png", *options, ".")
    assert code == 2 and "--overwrite" in err
    code, _, err = hiera("mae", "three.png", *options, ".", "--overwrite")
    assert code == 1 and "would replace the input" in err
    assert Path("three.png").read_bytes() == before and list(Path().iterdir()) == [
        Path("three.png")
    ]
    code, _, err = hiera("mae", "three.png", *options, "three.png")
    assert code == 2 and "is a file" in err


def test_predictions_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    model = some_model(IMAGE)
    torch.nn.init.constant_(model.decoder_norm.weight, torch.inf)
    pipeline = hiera_core.Reconstructor(model)
    (record,) = pipeline(hiera_core.data.sources.expand([str(SAMPLES / "three.png")]))
    assert record.error is not None and "not finite" in record.error.message


def test_only_an_autoencoder_can_reconstruct() -> None:
    classifier = hiera_core.create_model("hiera_nano_32")
    for model, name in (("mae_hiera_nano_32", "str"), (classifier, "Hiera")):
        with pytest.raises(UsageError, match=rf"takes an autoencoder, not a model of type {name};"):
            reconstruct(model, torch.zeros(1, 3, 32, 32))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["a label of many words " * 10_000, "x" * 5000, "字" * 300])
def test_a_long_caption_takes_some_lines(text: str) -> None:
    lines = wrap_text(text, 100)
    assert len(lines) == MAX_LINES and lines[-1].endswith("…")
    drawn = Image.new("RGB", (400, LINE * (MAX_LINES + 1)), "white")
    draw_lines(drawn, (0, 0), lines)
    dark = np.asarray(drawn.convert("L")).min(axis=0) < 128
    assert 60 < np.flatnonzero(dark).max() < 100


@pytest.mark.parametrize("width", [60, 100, 160, 320])
@pytest.mark.parametrize(
    "text", ["one two three four", "0.3 s  91% moving right", "a-word" * 5, ""]
)
def test_captions_are_whole_and_fit(text: str, width: int) -> None:
    lines = wrap_text(text, width)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    pen = ImageDraw.Draw(Image.new("L", (1, 1)))
    assert all(pen.textlength(line, ImageFont.load_default(FONT_SIZE)) <= width for line in lines)


@pytest.mark.parametrize("size", [(32, 32), (3, 5), (200, 1), (3, 400), (64, 48)])
@pytest.mark.parametrize("count", [1, 8])
def test_captions_of_small_pictures_do_not_overlap(size: tuple[int, int], count: int) -> None:
    """A caption of several lines changes no pixel of the pictures and of the other captions."""
    cells = [[np.full((*size, 3), 128, np.uint8)] * count] * 2
    long = "a label of some more words, such as 8x16x16x144"

    def dark_rows(captions: list[list[str]]) -> tuple[int, int]:
        image = np.asarray(captioned_grid(cells, captions=captions).convert("L"))
        return image.shape[0], int((image == 128).sum())

    short = dark_rows([["a"] * count] * 2)
    wrapped = dark_rows([[long] * count] * 2)
    assert wrapped[1] >= short[1] > 0  # all pictures are still whole
    assert (wrapped[0] - short[0]) % (2 * LINE) == 0
    footer = captioned_grid(cells, columns=[long] * count)
    assert footer.height >= short[0] - 4 * LINE
