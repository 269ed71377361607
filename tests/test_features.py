"""Tests of features: the reference's maps in spatial order, files that resume, pictures."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hiera as reference
import numpy as np
import pytest
import torch
from PIL import Image

import hiera_core
from hiera_core.data import sources
from hiera_core.data.clip_reader import read_segments
from hiera_core.errors import InputError, UsageError
from hiera_core.inference import feature_formats
from hiera_core.inference.feature_store import FeatureStore
from hiera_core.inference.features import FeatureExtractor, FeatureSelection
from hiera_core.viz import feature_maps

from .conftest import SMALL, assert_close, draw_weights
from .test_reconstruct import IMAGE, SAMPLES, VIDEO, pixels, some_input, some_model
from .test_video_reader import SMALL_VIDEO, write_video

Command = Callable[..., tuple[int, str, str]]
ALL = FeatureSelection(stages=None, pool=False)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 25 random pictures, in the input size of the bundled model."""
    folder = tmp_path_factory.mktemp("digits")
    random = np.random.default_rng(0)
    for i in range(25):
        noise = random.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{i:02}.png")
    return folder


# The Python API -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, SMALL_VIDEO], ids=["image", "video"])
@torch.no_grad()
def test_intermediates_match_the_reference(config: dict[str, Any]) -> None:
    """Compare maps without a mask, as in a classifier, and with one, as in an autoencoder."""
    theirs = draw_weights(reference.Hiera(**config)).eval()
    ours = hiera_core.Hiera(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, *config["input_size"])
    _, maps = theirs(x, return_intermediates=True)
    last, found = ours.forward_features(x, return_intermediates=True)
    assert len(found) == len(maps) == 4
    for our_map, stage_map in zip(found, maps, strict=True):
        assert_close(our_map, stage_map)
    assert_close(last, maps[-1])
    assert_close(ours.forward_features(x), maps[-1])
    mask = ours.get_random_mask(x, 0.5)
    _, maps = theirs(x, mask=mask, return_intermediates=True)
    _, found = ours.forward_features(x, mask, return_intermediates=True)
    for our_map, stage_map in zip(found, maps, strict=True):
        assert_close(our_map, stage_map)
    _, stage_outputs = ours.encode(x, collect=True)
    ours.reset_classifier(0)
    assert_close(ours.embedding(stage_outputs), ours(x))


@pytest.mark.parametrize("config", [IMAGE, VIDEO], ids=["image", "video"])
@torch.no_grad()
def test_features_of_autoencoders_have_the_shapes_of_the_encoder(config: dict[str, Any]) -> None:
    model, x = some_model(config), some_input(config)
    last, maps = model.forward_features(x, return_intermediates=True)
    grid = model.layout.grid_after(2)
    assert last.shape == (2, *grid, 128) and len(maps) == 4
    mask = model.get_random_mask(x, 0.5)
    masked, _ = model.forward_features(x, mask, return_intermediates=True)
    latent, _ = model.forward_encoder(x, mask=mask)
    assert masked.shape[:2] == latent.shape[:2] and masked.shape[2:-1] == model.layout.unit_after(2)
    _, stage_outputs = model.encode(x, collect=True)
    assert model.embedding(stage_outputs).shape == (2, 128)
    with pytest.raises(UsageError, match="expected"):
        model.forward_features(x[:, :2])


@pytest.mark.parametrize(
    ("config", "masked"), [(IMAGE, False), (VIDEO, True)], ids=["image", "masked video"]
)
def test_features_compile_as_one_graph(config: dict[str, Any], masked: bool) -> None:
    autoencoder, x = some_model(config), some_input(config)
    encoder = {k: v for k, v in config.items() if not k.startswith("decoder")}
    classifier = draw_weights(hiera_core.Hiera(**encoder)).eval()
    windows = classifier.layout.windows
    units = torch.arange(windows).expand(2, -1)[:, : windows // 2] if masked else None
    for model in (autoencoder, classifier):
        compiled = torch.compile(model.forward_features, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            expected = model.forward_features(x, keep_ids=units)
            assert_close(compiled(x, keep_ids=units), expected)


@torch.no_grad()
def test_features_match_the_hidden_states_of_transformers() -> None:
    """HieraBackbone keeps tokens in the order of the windows, so its maps differ from ours."""
    from transformers import HieraBackbone, HieraConfig, HieraModel

    config = HieraConfig(
        embed_dim=32, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], image_size=[64, 64],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    theirs = draw_weights(HieraModel(config)).eval()
    ours = hiera_core.Hiera(embed_dim=32, stages=(1, 1, 1, 1), input_size=(64, 64), num_classes=0)
    state, _ = hiera_core.weights.key_mapping.to_reference(theirs.state_dict())
    ours.load_state_dict(state)
    x = torch.randn(1, 3, 64, 64)
    states = theirs(x, output_hidden_states=True).reshaped_hidden_states[1:]
    _, maps = ours.eval().forward_features(x, return_intermediates=True)
    for our_map, state_map in zip(maps, states, strict=True):
        assert_close(our_map, state_map)
    backbone = HieraBackbone(config).eval()
    backbone.load_state_dict(theirs.state_dict(), strict=False)
    scrambled = backbone(x).feature_maps
    largest_error = 0.0
    for our_map, its_map in zip(maps[:3], scrambled[:3], strict=True):
        if its_map.shape != our_map.shape:  # channels first
            its_map = its_map.movedim(1, -1)
        largest_error = max(largest_error, ((its_map - our_map).norm() / our_map.norm()).item())
    assert largest_error > 0.5, (
        "HieraBackbone is fixed: update docs/coming-from.md and compare its maps here"
    )


@pytest.mark.parametrize("name", ["hiera_nano_32", "mae_hiera_nano_32", "hiera_nano_8x32"])
def test_maps_keep_the_left_half_of_a_picture_left(name: str, tmp_path: Path) -> None:
    """If the left half is black, cells of the same half are alike, and the halves differ."""
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 16:] = 255
    frames = np.stack([image] * 8)
    if "8x" in name:
        file = tmp_path / "x.mp4"
        file.write_bytes(hiera_core.data.video_files.video_writer.encode(frames, 4))
    else:
        file = tmp_path / "x.png"
        Image.fromarray(image).save(file)
    found = hiera_core.features(file, name, stages=None, pool=False, dtype="fp32")
    assert list(found) == ["stage1", "stage2", "stage3"]
    for values in found.values():
        across = values.flatten(0, -3).mean(0)  # x c
        middle = len(across) // 2
        left, right = across[:middle].mean(0), across[middle:].mean(0)
        between = (left - right).norm()
        within = max(
            (across[:middle] - left).norm(dim=1).max(), (across[middle:] - right).norm(dim=1).max()
        )
        assert between > within, "a map in another order mixes the halves"
        # The outermost columns belong to different halves, so they differ, too.
        assert (across[0] - across[-1]).norm() > 0.5 * between


def test_features_returns_tensors_by_name(digits: Path, tmp_path: Path) -> None:
    found = hiera_core.features(SAMPLES / "eight.png", "hiera_nano_32", dtype="fp32")
    assert {n: tuple(v.shape) for n, v in found.items()} == {"embedding": (96,)}
    assert found["embedding"].dtype == torch.float32
    several = hiera_core.features(digits, "hiera_nano_32", stages=(2,), batch_size=4)
    assert len(several) == 25 and several[0]["stage2"].shape == (48,)
    missing = hiera_core.features(tmp_path / "none.png", "hiera_nano_32")
    assert missing == {} and "no such file" in str(missing.error)
    with pytest.raises(InputError, match="no such file"):
        missing["embedding"]
    with pytest.raises(UsageError, match="has 3 stages"):
        FeatureExtractor("hiera_nano_32", selection=FeatureSelection((4,)))
    sampling = hiera_core.Sampling(clips=2)
    with pytest.raises(UsageError, match="several views"):
        FeatureExtractor("hiera_nano_8x32", selection=ALL, sampling=sampling)
    with pytest.raises(UsageError, match="for prediction"):
        hiera_core.Reconstructor(sampling=hiera_core.Sampling(segments=1.0))


def test_views_of_a_video_are_averaged(tmp_path: Path) -> None:
    model = draw_weights(hiera_core.Hiera(**SMALL_VIDEO)).eval()
    clip = write_video(tmp_path / "x.mp4", frames=180)
    single_view = hiera_core.features(clip, model)["embedding"]
    sampling = hiera_core.Sampling(clips=3, crops=2)
    several = FeatureExtractor(model, sampling=sampling)
    (record,) = several(sources.expand([str(clip)]))
    assert record.video["views"] == 6 and not torch.allclose(
        record.result["embedding"], single_view
    )
    runner = several.runner("video")
    _, segments = read_segments(clip, sampling, runner.transform)
    each = [r["embedding"] for r in runner.run(next(segments).views)]
    assert_close(record.result["embedding"], torch.stack(each).mean(0))


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_as", ["safetensors", "npz", "parquet"])
def test_resume_does_not_recompute_finished_shards(
    hiera: Command, digits: Path, tmp_path: Path, save_as: str
) -> None:
    names = [str(p) for p in sorted(digits.iterdir())]
    options = ["-m", "hiera_nano_32", "--dtype", "fp32", "--save-as", save_as, "--shard-size", "10"]
    code, out, err = hiera("features", digits, *options, "-o", tmp_path / "whole")
    complete = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(complete) == 25 and "features are in" in err
    files = sorted((tmp_path / "whole").iterdir())
    assert [f.name for f in files] == [f"image-0000{i}.{save_as}" for i in range(3)]
    # The run was interrupted before the second shard was finished, and there is a new input.
    interrupted = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", interrupted)
    (interrupted / files[1].name).unlink()
    times = {f.name: f.stat().st_mtime_ns for f in interrupted.iterdir()}
    options += ["-o", interrupted]
    code, _, err = hiera("features", digits, *options)
    assert code == 2 and "holds features of an earlier run; --resume continues it" in err
    code, out, _ = hiera("features", *names, SAMPLES / "eight.png", *options, "--resume")
    again = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [r["input"] for r in again] == [*names, str(SAMPLES / "eight.png")]
    assert {f.name: f.stat().st_mtime_ns for f in interrupted.iterdir()}.items() >= times.items()
    found: dict[str, torch.Tensor] = {}
    for record in again:
        values, listed = feature_formats.read(record["file"]["name"])
        assert listed[record["file"]["row"]] == record["input"]
        assert list(values["embedding"].shape[1:]) == record["features"]["embedding"]["shape"]
        found[record["input"]] = values["embedding"][record["file"]["row"]]
    for record in complete:
        values, _ = feature_formats.read(record["file"]["name"])
        assert torch.equal(values["embedding"][record["file"]["row"]], found[record["input"]])
    code, _, err = hiera("features", digits, *options, "--resume", "--stages", "1")
    assert code == 2 and "was made with" in err
    first = interrupted / files[0].name
    first.write_bytes(first.read_bytes()[:50])
    code, _, err = hiera("features", digits, *options, "--resume")
    assert code == 2 and "damaged" in err


def test_only_maps_have_cells(hiera: Command) -> None:
    options = (SAMPLES / "three.png", "-m", "hiera_nano_32", "--stages", "3", "-f", "table")
    assert "4x4x96         a cell is 8x8 pixels" in hiera("features", *options)[1]
    code, out, _ = hiera("features", *options, "--pool", "mean")
    assert code == 0 and "stage3    96\n" in out and "cell" not in out


def test_maps_are_written_to_one_file(hiera: Command, tmp_path: Path) -> None:
    file = tmp_path / "maps.npz"
    options = ["-m", "hiera_nano_32", "--return-intermediates", "-o", file]
    code, out, _ = hiera("features", SAMPLES / "three.png", tmp_path / "none.png", *options)
    ok, failed = (json.loads(line) for line in out.splitlines())
    assert code == 1 and failed["status"] == "error"
    assert ok["features"]["stage2"] == {"shape": [8, 8, 48], "cell": [4, 4]}
    values, names = feature_formats.read(file)
    assert names == [str(SAMPLES / "three.png")]
    assert {n: tuple(v.shape) for n, v in values.items()} == {
        "stage1": (1, 16, 16, 24),
        "stage2": (1, 8, 8, 48),
        "stage3": (1, 4, 4, 96),
    }
    metadata = feature_formats.read_metadata(file)
    assert metadata["shapes"]["stage3"] == [4, 4, 96] and metadata["model"] == "hiera_nano_32"
    code, _, err = hiera("features", SAMPLES / "three.png", *options)
    assert code == 2 and "--overwrite" in err


def test_pictures_and_videos_have_separate_shards(tmp_path: Path) -> None:
    models = {"image": "hiera_nano_32", "video": "hiera_nano_8x32"}
    extractor = FeatureExtractor(
        lambda kind: hiera_core.models.factory.create_encoder(models[kind])
    )
    paths = [str(SAMPLES / n) for n in ("three.png", "moving_right.mp4", "five.png")]
    with FeatureStore(tmp_path / "out") as store:
        for record in extractor(sources.expand(paths)):
            store.add(record)
    values, names = feature_formats.read(tmp_path / "out/image-00000.safetensors")
    assert names == [paths[0], paths[2]] and values["embedding"].shape == (2, 96)
    assert feature_formats.read_metadata(tmp_path / "out/video-00000.safetensors")["indices"] == [1]
    with (
        FeatureStore(tmp_path / "one.npz") as store,
        pytest.raises(InputError, match="name a folder"),
    ):
        for record in extractor(sources.expand(paths)):
            store.add(record)


def test_an_interrupted_run_keeps_finished_records(digits: Path, tmp_path: Path) -> None:
    extractor = FeatureExtractor("hiera_nano_32", batch_size=4)
    with pytest.raises(KeyboardInterrupt), FeatureStore(tmp_path / "out") as store:
        for record in extractor(sources.expand([str(digits)])):
            store.add(record)
            if record.index == 7:
                raise KeyboardInterrupt
    _, names = feature_formats.read(tmp_path / "out/image-00000.safetensors")
    assert len(names) == 8


def test_parquet_needs_a_package(
    hiera: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for options in (["-o", tmp_path / "x.parquet"], ["-o", tmp_path / "x", "--save-as", "parquet"]):
        code, _, err = hiera("features", SAMPLES / "three.png", "-m", "hiera_nano_32", *options)
        assert code == 2 and "hiera-toolkit[parquet]" in err


# The command --------------------------------------------------------------------------------------


def test_without_inputs_the_shapes_of_a_sample_are_shown(hiera: Command) -> None:
    code, out, err = hiera("features")
    assert code == 0 and not err
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["stage1", "16x16x24"], ["stage2", "8x8x48"], ["stage3", "4x4x96"],
    ]  # fmt: skip
    code, out, _ = hiera("features", "-m", "hiera_nano_8x32")
    assert code == 0 and "4x8x8x24" in out
    code, out, _ = hiera("features", "-m", "hiera_tiny_224", "--random-init", "-f", "json")
    (record,) = json.loads(out)
    assert record["features"]["stage1"]["shape"] == [56, 56, 96]


def test_records_hold_the_vectors_if_there_is_no_output_file(hiera: Command) -> None:
    digit = SAMPLES / "three.png"
    code, out, _ = hiera("features", digit, "-m", "hiera_nano_32", "--dtype", "fp32")
    values = json.loads(out)["features"]["embedding"]["values"]
    expected = hiera_core.features(digit, "hiera_nano_32", dtype="fp32")["embedding"]
    assert code == 0 and values == expected.tolist()
    _, out, _ = hiera("features", digit, "-m", "hiera_nano_32", "-f", "csv")
    assert "embedding" in out.splitlines()[0] or "features" in out.splitlines()[0]


def test_weights_of_an_autoencoder_give_features(hiera: Command) -> None:
    """A classifier with the weights of an autoencoder gets no head, and the norm of the encoder."""
    weights = SAMPLES.parent / "mae_hiera_nano_32.safetensors"
    options = ["--checkpoint", weights, "--dtype", "fp32"]
    code, out, _ = hiera("features", SAMPLES / "three.png", "-m", "hiera_nano_32", *options)
    assert code == 0
    values = torch.tensor(json.loads(out)["features"]["embedding"]["values"])
    assert abs(values.mean()) < 1 and values.std() > 0.1


@pytest.mark.parametrize("name", ["hiera_nano_32", "hiera_nano_8x32"])
def test_visualize_is_reproducible(hiera: Command, tmp_path: Path, name: str) -> None:
    source = SAMPLES / ("moving_right.mp4" if "8x" in name else "three.png")
    code, out, _ = hiera("features", source, "-m", name, "--visualize", tmp_path / "a")
    picture = Path(json.loads(out)["picture"])
    assert code == 0 and picture.is_relative_to(tmp_path / "a")
    size = pixels(picture).shape
    if "8x" in name:  # rows: input and three stages; columns: four pairs of frames
        assert size == (4 * (160 + 6 + 20) + 6, 4 * 166 + 6, 3)
    else:
        assert size == (166 + 6 + 20, 4 * 166 + 6, 3)
    hiera("features", source, "-m", name, "--visualize", tmp_path / "b")
    assert (tmp_path / "b" / picture.relative_to(tmp_path / "a")).read_bytes() == (
        picture.read_bytes()
    )


def test_principal_components_as_colours() -> None:
    """Two regions that differ in one direction get two colours; the sign is fixed."""
    values = torch.zeros(6, 8, 5)
    values[:, 4:, 2] = 3.0
    colours = feature_maps.pca_colours(values)
    assert colours.shape == (6, 8, 3)
    assert (colours[:, :4, 0] == 0).all() and (colours[:, 4:, 0] == 255).all()
    assert feature_maps.pca_colours(torch.ones(1, 1, 7)).shape == (1, 1, 3)


def test_bad_options_are_refused(hiera: Command, tmp_path: Path) -> None:
    digit = SAMPLES / "three.png"
    cases = [
        (["--stages", "x"], 2, "give numbers"),
        (["--stages", "1,9"], 2, "has 3 stages"),
        (["--resume"], 2, "needs -o with a folder"),
        (["--resume", "-o", tmp_path / "x.npz"], 2, "needs -o with a folder"),
        (["-o", tmp_path / "no/x.npz"], 2, "no folder"),
    ]
    for options, expected, message in cases:
        code, _, err = hiera("features", digit, "-m", "hiera_nano_32", *options)
        assert code == expected and message in err, err
    code, _, err = hiera("features", SAMPLES / "moving_right.mp4", "-m", "hiera_nano_32")
    assert code == 1 and "takes pictures" in err


def test_attention_is_saved_and_drawn(tmp_path: Path, hiera: Command) -> None:
    """In grid order, for a windowed and a global block, of an image and a video."""
    cases = (
        ("cat.jpg", "hiera_nano_32", 1, [1, 256, 256]),
        ("cat.jpg", "hiera_nano_32", 4, [4, 16, 64]),
        ("moving_right.mp4", "hiera_nano_8x32", 5, [4, 16, 16]),
    )
    for number, (name, model, block, shape) in enumerate(cases):
        file, folder = tmp_path / f"{number}.safetensors", tmp_path / str(number)
        options = ("-m", model, "--attention", block, "-o", file, "--visualize", folder)
        code, out, err = hiera("features", SAMPLES / name, *options, "-f", "jsonl")
        assert code == 0, err
        record = json.loads(out)
        assert record["features"]["attention"]["shape"] == shape
        tensors, _ = feature_formats.read(file)
        assert_close(tensors["attention"].sum(-1), torch.ones(1, *shape[:-1]))
        assert "embedding" in tensors
        with Image.open(record["picture"]) as picture:
            assert picture.width > 160 * (1 + shape[0])
    code, _, err = hiera("features", SAMPLES / "cat.jpg", "-m", "hiera_nano_32", "--attention", 9)
    assert code == 2 and "choose among 1 to 5" in err


def test_features_are_saved_as_plain_tensors(tmp_path: Path) -> None:
    """`torch.load` reads them without our package, by its default of allowed types."""
    found = hiera_core.features(SAMPLES / "three.png", "hiera_nano_32")
    torch.save(found, tmp_path / "x.pt")
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert list(loaded) == ["embedding"]
    assert torch.equal(loaded["embedding"], found["embedding"])


def test_a_head_can_be_trained_on_features(pictures: Path) -> None:
    found = hiera_core.features(pictures / "coffee.png", "hiera_nano_32")["embedding"]
    head = torch.nn.Linear(len(found), 2)
    head(found).sum().backward()
    assert torch.equal(head.weight.grad[0], found)


@pytest.mark.parametrize(
    "model", [("-m", "hiera_nano_32"), ("-m", "hiera_nano_32", "--random-init")]
)
def test_another_size_gives_larger_maps(hiera: Any, model: tuple[str, ...]) -> None:
    image = "hiera_core/zoo/assets/samples/three.png"
    shapes = []
    for size in ((), ("--size", "64"), ("--size", "32x64")):
        code, out, err = hiera("features", image, *model, *size, "--stages", "1", "-f", "json")
        assert code == 0, err
        shapes.append(json.loads(out)[0]["features"]["stage1"]["shape"])
    assert shapes == [[16, 16, 24], [32, 32, 24], [16, 32, 24]]
    code, _, err = hiera("features", image, *model, "--size", "33")
    assert code == 2 and "33" in err


def test_a_path_in_place_of_a_block_is_understood(hiera: Command, tmp_path: Path) -> None:
    """`--attention` takes a number, `--visualize` a folder."""
    (tmp_path / "x y.png").touch()
    for given, message in (
        ("maps", "for block 5, write --attention 5 --visualize maps"),
        (str(tmp_path / "x y.png"), f"for block 5, write --attention 5 '{tmp_path}/x y.png'"),
        ("1.5", "'1.5' is not the number of a block, counted from 1"),
        ("", "'' is not the number of a block, counted from 1"),
        ("0", "blocks are counted from 1"),
    ):
        code, _, err = hiera("features", SAMPLES / "cat.jpg", "--attention", given)
        assert code == 2 and err.strip().endswith(message), err
