"""Tests of conversion: formats load in their libraries, and failures leave no files behind."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import hiera_core
from hiera_core import zoo
from hiera_core.conversion import converter, formats, publish, verify, write_weights
from hiera_core.errors import CheckpointError, HubError, UsageError
from hiera_core.weights import download, files, key_mapping, load

from .conftest import SMALL, Hub, HubHandler, RunProcess, assert_close, draw_weights
from .fork_server import ForkServer

Command = Callable[..., tuple[int, str, str]]
AUTOENCODER = {"q_pool": 2, "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
VIDEO = {**zoo.get("hiera_base_16x224").config, **SMALL, "input_size": (8, 64, 64)}
MODELS = {
    "image": (hiera_core.Hiera, SMALL),
    "video": (hiera_core.Hiera, VIDEO),
    "nameless": (hiera_core.Hiera, SMALL),
    "mae": (hiera_core.MaskedAutoencoderHiera, {**SMALL, **AUTOENCODER}),
    "mae_video": (hiera_core.MaskedAutoencoderHiera, {**VIDEO, **AUTOENCODER}),
}
ENDING = {name: target.ending for name, target in formats.FORMATS.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder for each kind of model: drawn weights, class names, preprocessing."""
    root = tmp_path_factory.mktemp("saved")
    for seed, (kind, (cls, config)) in enumerate(MODELS.items()):
        model = draw_weights(cls(**config), seed)
        model.card = {"model": f"my_{kind}", "licence": "MIT", "source": "training"}
        if kind in ("image", "video"):
            model.card["classes"] = [f"kind {i}" for i in range(10)]
        model.save_pretrained(root / kind)
    return {kind: root / kind for kind in MODELS}


def assert_same_folder(one: Path, other: Path) -> None:
    assert {p.name for p in one.iterdir()} - {"README.md"} == {
        p.name for p in other.iterdir() if p.name != "README.md"
    }
    for name in ("config.json", "hiera.json"):
        assert json.loads((one / name).read_text()) == json.loads((other / name).read_text())
    assert_same_tensors(
        load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    )


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def assert_files(folder: Path, *names: str) -> None:
    """Check that a folder holds these files and no others, hidden or not."""
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)


# Round trips --------------------------------------------------------------------------------------

ROUND_TRIPS = [(kind, "pth") for kind in MODELS]
ROUND_TRIPS += [("image", "timm"), ("image", "transformers"), ("mae", "transformers")]
ROUND_TRIPS += [("nameless", "timm"), ("nameless", "transformers")]


@pytest.mark.parametrize(("kind", "target"), ROUND_TRIPS)
def test_round_trips_are_exact(
    kind: str, target: str, saved: dict[str, Path], tmp_path: Path, hiera: Command
) -> None:
    """Tensors, config.json, class names and preprocessing come back unchanged."""
    for source, dest, to in [
        (saved[kind], "converted", target),
        (tmp_path / "converted", "back", "hub"),
    ]:
        code, out, err = hiera("convert", source, tmp_path / dest, "--to", to)
        assert (code, err) == (0, "")
        assert json.loads(out)["proof"]["tensors"] == len(
            load_file(saved[kind] / formats.WEIGHTS_NAME)
        )
    assert_same_folder(saved[kind], tmp_path / "back")


@pytest.mark.parametrize("name", zoo.names())
def test_parameter_names_of_every_zoo_model_come_back(name: str) -> None:
    entry = zoo.get(name)
    with torch.device("meta"):
        state = hiera_core.create_model(name).state_dict()
    namings: list[key_mapping.Naming] = ["reference"]
    if entry.kind == "image":
        namings.append("transformers")
    if entry.family == "hieradet":
        namings.append("sam2")  # timm's names are the reference's
    elif not entry.autoencoder:
        namings.append("timm")
    for naming in namings:
        renamed = key_mapping.from_reference(state, naming, entry.config["stages"])
        back, detected = key_mapping.to_reference(renamed)
        assert detected == naming
        assert back.keys() == state.keys() and all(back[n] is state[n] for n in state)


def test_the_reference_loads_a_converted_pth(saved: dict[str, Path], tmp_path: Path) -> None:
    import hiera as reference

    converter.convert(str(saved["image"]), tmp_path / "m.pth", "pth")
    content = torch.load(tmp_path / "m.pth", weights_only=True)
    model = reference.Hiera(**SMALL)
    model.load_state_dict(content["model_state"], strict=True)
    sizes = [
        path.stat().st_size for path in (tmp_path / "m.pth", saved["image"] / formats.WEIGHTS_NAME)
    ]
    assert sizes[0] < 1.1 * sizes[1]


# The libraries of the formats ---------------------------------------------------------------------


@torch.no_grad()
def test_timm_loads_a_converted_classifier(
    saved: dict[str, Path], tmp_path: Path, pictures: Path
) -> None:
    import timm

    converter.convert(str(saved["image"]), tmp_path / "timm", "timm")
    ours = hiera_core.Hiera.from_pretrained(saved["image"]).eval()
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    by_path = timm.create_model(
        "hiera_base_224",
        checkpoint_path=tmp_path / "timm" / formats.WEIGHTS_NAME,
        num_classes=10,
        **config["model_args"],
    )
    by_folder = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert by_folder.pretrained_cfg["label_names"][3] == "kind 3"
    assert by_folder.pretrained_cfg["crop_pct"] == pytest.approx(224 / 256, abs=0.01)
    x = torch.randn(2, 3, 64, 64)
    for theirs in (by_path, by_folder):
        assert_close(theirs.eval()(x), ours.forward_logits(x))


@torch.no_grad()
def test_transformers_loads_a_converted_classifier(
    saved: dict[str, Path], tmp_path: Path, pictures: Path
) -> None:
    from transformers import AutoImageProcessor, HieraForImageClassification

    converter.convert(str(saved["image"]), tmp_path / "tf", "transformers")
    theirs = HieraForImageClassification.from_pretrained(tmp_path / "tf").eval()
    assert theirs.config.id2label[3] == "kind 3"
    ours = hiera_core.Classifier(hiera_core.Hiera.from_pretrained(saved["image"]), dtype="fp32")
    image = Image.open(pictures / "chelsea.png")
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "tf")(image, return_tensors="pt")
    view = ours.transform.normalise(torch.from_numpy(ours.transform.crop(image)[None]))
    assert (pixels["pixel_values"] - view).abs().max() < 0.05  # its resize rounds differently
    assert_close(theirs(view).logits, ours.model.forward_logits(view))


@torch.no_grad()
def test_transformers_reconstructs_with_the_same_loss(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import HieraForPreTraining

    converter.convert(str(saved["mae"]), tmp_path / "tf", "transformers")
    theirs = HieraForPreTraining.from_pretrained(tmp_path / "tf").eval()
    ours = hiera_core.MaskedAutoencoderHiera.from_pretrained(saved["mae"]).eval()
    x, noise = torch.randn(1, 3, 64, 64), torch.rand(1, 4)
    mask = torch.zeros(1, 4, dtype=torch.bool)
    mask[0, noise.argsort(1)[0, :1]] = True
    assert_close(theirs(x, noise=noise).loss, ours(x, mask=mask)[0])


def test_models_that_a_format_cannot_hold(
    saved: dict[str, Path], tmp_path: Path, hiera: Command
) -> None:
    for source, to, message in [
        ("video", "transformers", "transformers has no Hiera for video"),
        ("video", "timm", "timm has no Hiera for video"),
        ("image", "sam2", "sam2 is for SAM 2's image encoder"),
    ]:
        code, _, err = hiera("convert", saved[source], tmp_path / f"x{ENDING[to]}", "--to", to)
        assert code == 2 and message in err and err.count("\n") == 1
    # The model does not pool before its last stage: transformers would use windows in the first
    # block of that stage.
    code, _, err = hiera("convert", "mae_hiera_nano_32", tmp_path / "x", "--to", "transformers")
    assert code == 2 and "attend within other windows" in err
    assert_files(tmp_path)


@torch.no_grad()
def test_timm_loads_the_encoder_of_an_autoencoder(
    saved: dict[str, Path], tmp_path: Path, hiera: Command
) -> None:
    import timm

    code, _, err = hiera("convert", saved["mae"], tmp_path / "timm", "--to", "timm")
    assert code == 0 and "the decoder is dropped (24 tensors)" in err
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    mae = hiera_core.MaskedAutoencoderHiera.from_pretrained(saved["mae"]).eval()
    ours = hiera_core.Hiera(**{**SMALL, "num_classes": 0}).eval()
    state = {n.replace("encoder_norm.", "norm."): t for n, t in mae.state_dict().items()}
    ours.load_state_dict({n: state[n] for n in ours.state_dict()})
    x = torch.randn(2, 3, 64, 64)
    assert_close(theirs(x), ours(x))
    for to in ("hub", "transformers"):  # convert it again, as a model without a classifier
        arguments = ["convert", tmp_path / "timm", tmp_path / to, "--to", to]
        code, out, _ = hiera(*arguments, "--verify", "forward")
        assert code == 0 and json.loads(out)["proof"]["what"] == "embeddings"


# Exported programs --------------------------------------------------------------------------------

RUN_PROGRAM = """
import json, sys, torch
program = torch.export.load(sys.argv[1], extra_files=(extra := {"labels": ""})).module()
batch = torch.load(sys.argv[2], weights_only=True)
torch.save([program(batch[:n]) for n in (1, 3, 8)], sys.argv[2])
assert not [name for name in sys.modules if name.startswith("hiera")]
print(json.loads(extra["labels"])[0])
"""


@pytest.mark.parametrize("name", ["hiera_nano_32", "hiera_nano_8x32"])
@torch.no_grad()
def test_programs_of_the_bundled_models(name: str, tmp_path: Path, hiera: Command) -> None:
    """Programs take any batch, in onnxruntime and in a torch process without this package."""
    import onnxruntime

    model = hiera_core.create_model(name, pretrained=True).eval()
    kind = model.input_kind()
    batch = torch.randn(8, 3, *model.config["input_size"])
    expected = model.forward_logits(batch)

    code, out, err = hiera("convert", name, tmp_path / "m.onnx", "--to", "onnx")
    assert (code, err) == (0, "")
    proof = json.loads(out)["proof"]
    assert proof["reader"].startswith("onnxruntime") and proof["max_difference"] < 1e-4
    assert proof["agree"] == proof["inputs"]
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, *model.config["input_size"]]
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["labels"]) == model.card["classes"]
    for count in (1, 3, 8):
        (logits,) = session.run(["logits"], {kind: batch[:count].numpy()})
        assert_close(torch.from_numpy(logits), expected[:count], 1e-4)

    code, _, err = hiera("convert", name, tmp_path / "m.pt2", "--to", "pt2")
    assert (code, err) == (0, "")
    torch.save(batch, tmp_path / "batch")
    arguments = [RUN_PROGRAM, tmp_path / "m.pt2", tmp_path / "batch"]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _run_without_this_package(), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == model.card["classes"][0]
    for logits in torch.load(tmp_path / "batch", weights_only=True):
        assert_close(logits, expected[: len(logits)], 1e-5)


def _run_without_this_package() -> str:
    """Return code that runs its first argument with our dependencies, but without this package."""
    return (
        f"import site, sys; sys.path += {[p for p in sys.path if 'site-packages' in p]!r}; "
        "code = sys.argv.pop(1); exec(code)"
    )


def test_onnx_programs_hold_fp16_but_not_bf16(tmp_path: Path, hiera: Command) -> None:
    path, arguments = tmp_path / "m.onnx", ["convert", "hiera_nano_32"]
    code, out, _ = hiera(*arguments, path, "--to", "onnx", "--dtype", "fp16")
    record = json.loads(out)
    assert code == 0 and record["dtype"] == "fp16"
    assert 0 < record["proof"]["max_difference"] < 0.02
    assert path.stat().st_size < 1_000_000  # 0.28 M parameters
    code, _, err = hiera(*arguments, tmp_path / "x", "--to", "onnx", "--dtype", "bf16")
    assert code == 2 and "onnx cannot store bf16 here" in err


def test_missing_packages_are_named(
    tmp_path: Path, hiera: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = formats.importlib.util.find_spec
    missing = {"onnx", "onnxscript"}
    monkeypatch.setattr(
        formats.importlib.util, "find_spec", lambda name: None if name in missing else find(name)
    )
    code, _, err = hiera("convert", "hiera_nano_32", tmp_path / "m.onnx", "--to", "onnx")
    assert code == 2 and err.count("\n") == 1
    assert "needs onnx and onnxscript" in err and "hiera-toolkit[onnx]" in err


# Conversions that change values -------------------------------------------------------------------


@pytest.mark.parametrize("to", ["hub", "pth", "timm", "transformers"])
def test_outputs_are_compared_in_the_target_library(
    to: str, saved: dict[str, Path], tmp_path: Path, hiera: Command
) -> None:
    arguments = ["convert", saved["image"], tmp_path / "x", "--to", to, "--dtype", "fp16"]
    code, out, err = hiera(*arguments, "--size", "96")
    record = json.loads(out)
    assert (code, err) == (0, "")
    assert record["input_size"] == [96, 96] and record["dtype"] == "fp16"
    proof = record["proof"]
    library = {"timm": "timm", "transformers": "transformers"}.get(to, "hiera-transformer")
    assert proof["reader"].startswith(library) and proof["tensors"] and proof["inputs"] == 8
    assert proof["max_difference"] < 1e-4 * 100 and "cost" in proof
    assert "resampled from 64x64 to 96x96 (absolute-window rule)" in record["notes"][0]


@pytest.mark.parametrize("kind", ["video", "mae", "mae_video"])
def test_verify_forward_compares_outputs(
    kind: str, saved: dict[str, Path], tmp_path: Path, hiera: Command
) -> None:
    arguments = ["convert", saved[kind], tmp_path / "x", "--to", "hub", "--verify", "forward"]
    code, out, err = hiera(*arguments, "-f", "table")
    assert (code, err) == (0, "")
    assert "tensors read back bit for bit" in out and "proven: hiera-transformer" in out
    assert "losses" in out if kind.startswith("mae") else "top-1 the same on 2 of 2" in out


def test_outputs_are_compared_on_the_given_pictures(
    saved: dict[str, Path], pictures: Path, tmp_path: Path, hiera: Command
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    arguments = ["convert", saved["image"], tmp_path / "x", "--to", "hub", "--dtype", "bf16"]
    code, out, err = hiera(*arguments, "--pictures", pictures, "--pictures", tmp_path / "bad.jpg")
    assert code == 0 and "bad.jpg" in err
    proof = json.loads(out)["proof"]
    assert proof["samples"] == "4 pictures" and proof["cost"]["max_difference"] > 0


def test_weights_beyond_the_range_of_fp16_are_refused(
    saved: dict[str, Path], tmp_path: Path, hiera: Command
) -> None:
    state = load_file(saved["image"] / formats.WEIGHTS_NAME)
    state["norm.weight"][0] = 1e6
    save_file(state, tmp_path / formats.WEIGHTS_NAME)
    (tmp_path / "config.json").write_bytes((saved["image"] / "config.json").read_bytes())
    code, _, err = hiera("convert", tmp_path, tmp_path / "x", "--to", "hub", "--dtype", "fp16")
    assert code == 3 and "beyond the range of fp16" in err
    assert_files(tmp_path, formats.WEIGHTS_NAME, "config.json")


@torch.no_grad()
def test_native_absolute_window_models_convert(tmp_path: Path, hiera: Command) -> None:
    """timm keeps both parts of the position embedding. Other formats get their sum for one size."""
    import hiera as reference

    config = {**SMALL, "abs_win_pos_embed": True, "global_pos_size": (5, 5)}
    model = draw_weights(hiera_core.Hiera(**config)).eval()
    model.save_pretrained(tmp_path / "native")
    for to in ("timm", "hub", "transformers"):
        dest = tmp_path / to
        code, _, err = hiera(
            "convert", tmp_path / "native", dest, "--to", to, "--verify", "forward"
        )
        assert code == 0, err
        assert ("written as a plain one" in err) == (to != "timm")
    x = torch.randn(1, 3, 64, 64)
    theirs = reference.Hiera.from_pretrained(tmp_path / "hub").eval()
    assert_close(theirs(x), model(x))
    back = hiera_core.create_model(str(tmp_path / "timm")).eval()
    assert torch.equal(back.pos_embed_win, model.pos_embed_win) and back.config == model.config


# Verification -------------------------------------------------------------------------------------


def test_a_wrong_bit_is_detected(
    saved: dict[str, Path], tmp_path: Path, hiera: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_wrong_bit(path: Path, state: dict[str, torch.Tensor], extras: Any = None) -> None:
        changed = {name: tensor.clone() for name, tensor in state.items()}
        last = list(changed.values())[-1].view(-1)
        last[-1] = torch.nextafter(last[-1], torch.tensor(9.0))
        files.write_safetensors(path, changed, extras)

    monkeypatch.setattr(write_weights.files, "write_pickle", write_wrong_bit)
    code, _, err = hiera("convert", saved["image"], tmp_path / "m.pth", "--to", "pth")
    assert code == 3 and "head.projection.bias differs" in err and "it was removed" in err
    assert_files(tmp_path)


def test_bits_are_verified_in_every_group_of_tensors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = {name: torch.randn(50) for name in "abcde"}
    files.write_pickle(tmp_path / "x", state)
    monkeypatch.setattr(verify, "GROUP_BYTES", 400)
    assert verify.verify_bits(tmp_path / "x", state) == 5
    for other in (
        {**state, "c": -state["c"]},
        {**state, "f": state["a"]},
        {**state, "e": state["e"].half()},
    ):
        with pytest.raises(CheckpointError, match="is not what it should be"):
            verify.verify_bits(tmp_path / "x", other)


def test_different_outputs_are_detected(
    saved: dict[str, Path], tmp_path: Path, hiera: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tensors are right, but timm's config lacks `mask_unit_attn`, so the model is wrong."""
    arguments = dict(write_weights.TIMM_ARGUMENTS)
    del arguments["mask_unit_attn"]
    config = {**SMALL, "mask_unit_attn": (False, False, False, False)}
    draw_weights(hiera_core.Hiera(**config)).save_pretrained(tmp_path / "source")
    monkeypatch.setattr(write_weights, "TIMM_ARGUMENTS", arguments)
    dest = tmp_path / "x"
    code, _, err = hiera(
        "convert", tmp_path / "source", dest, "--to", "timm", "--verify", "forward"
    )
    assert code == 3 and "timm" in err and "answers otherwise" in err
    assert_files(tmp_path, "source")


def test_without_the_target_library_hiera_toolkit_verifies(
    saved: dict[str, Path], tmp_path: Path, hiera: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hiera_core.conversion import read_back

    reader = ("no_such_package", "timm", read_back._load_timm)
    monkeypatch.setitem(read_back.READERS, "timm", reader)
    arguments = ["convert", saved["image"], tmp_path / "x", "--to", "timm", "--verify", "forward"]
    code, out, err = hiera(*arguments)
    assert code == 0 and "timm is not installed" in err
    assert json.loads(out)["proof"]["reader"] == "hiera-toolkit"


# Bad input, full disks ----------------------------------------------------------------------------


class Payload:
    """Object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def write_bad_file(kind: str, saved: Path, path: Path) -> None:
    """Write a file that `BAD_SOURCES` lists."""
    state = load_file(saved / formats.WEIGHTS_NAME)
    if kind == "truncated":
        path.write_bytes((saved / formats.WEIGHTS_NAME).read_bytes()[:-1000])
    elif kind == "foreign":
        save_file({"cls_token": torch.zeros(3)}, path)
    elif kind == "code":
        torch.save({"model_state": state, "x": Payload(path.with_name("trap"))}, path)
    elif kind == "nan":
        state["norm.bias"][0] = float("nan")
        save_file(state, path)
    elif kind == "unknown":
        save_file(state, path)  # no config, and not a released model
    elif kind == "extras":
        files.write_pickle(path, state, {"config": {"stages": None}, "card": 3})


BAD_SOURCES = {
    "truncated": "truncated or damaged",
    "foreign": "not a Hiera checkpoint",
    "code": "nothing of it was run",
    "nan": "NaN or infinite weights in norm.bias",
    "unknown": "no config.json and the shapes of no released model",
    "extras": "describes no Hiera",
    "missing": "no file, folder or hub repository",
}


@pytest.mark.parametrize("kind", BAD_SOURCES)
def test_bad_sources_leave_no_files(
    kind: str, saved: dict[str, Path], tmp_path: Path, hiera: Command
) -> None:
    write_bad_file(kind, saved["image"], tmp_path / "bad.pth")
    before = [p.name for p in tmp_path.iterdir()]
    for to in formats.FORMATS:
        code, out, err = hiera(
            "convert", tmp_path / "bad.pth", tmp_path / f"x{ENDING[to]}", "--to", to
        )
        assert (code, out) == (3, "") and BAD_SOURCES[kind] in err and err.count("\n") == 1, err
        assert_files(tmp_path, *before)


def test_destinations_are_checked_before_they_are_replaced(
    saved: dict[str, Path], tmp_path: Path, hiera: Command
) -> None:
    source = str(saved["image"])
    (tmp_path / "file.pth").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").write_text("mine")
    (tmp_path / "link").symlink_to("missing")
    for dest, to, options, message in [
        ("file.pth", "pth", [], "exists; --overwrite replaces it"),
        ("folder", "hub", [], "exists; --overwrite replaces it"),
        ("link", "pth", [], "exists; --overwrite replaces it"),
        ("folder", "pth", ["--overwrite"], "exists and is a folder"),
        ("link", "hub", ["--overwrite"], "exists and is a file"),
        ("full", "hub", ["--overwrite"], "holds more than a checkpoint (photo.jpg)"),
        ("x.safetensors", "timm", [], "is named like a file; leave out .safetensors"),
        ("no/such/x.pth", "pth", [], "make it first"),
        ("x.pth", "pt", [], "pt"),
        ("x", "pt2", [], "PyTorch wants NAME.pt2"),
    ]:
        code, _, err = hiera("convert", source, tmp_path / dest, "--to", to, *options)
        assert code == 2 and message in err, err
    assert (tmp_path / "file.pth").read_text() == "mine"
    for dest, to in (("file.pth", "pth"), ("folder", "hub"), ("folder", "timm")):
        code, _, err = hiera("convert", source, tmp_path / dest, "--to", to, "--overwrite")
        assert code == 0, err
    assert (
        load.read_checkpoint(tmp_path / "file.pth").state
        and load.read_checkpoint(tmp_path / "folder").naming == "timm"
    )
    assert_files(tmp_path, "file.pth", "folder", "full", "link")


def test_a_folder_can_be_converted_in_place(saved: dict[str, Path], tmp_path: Path) -> None:
    """The source stays memory-mapped while its folder is replaced."""
    converter.convert(str(saved["image"]), tmp_path / "m", "hub")
    converter.convert(str(tmp_path / "m"), tmp_path / "m", "timm", overwrite=True)
    converter.convert(str(tmp_path / "m"), tmp_path / "m", "hub", overwrite=True)
    assert_same_folder(saved["image"], tmp_path / "m")


@pytest.mark.parametrize("to", ["hub", "pth", "pt2"])
def test_a_full_disk_leaves_no_files(
    to: str,
    fork_server: ForkServer,
    saved: dict[str, Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """With a limit of 100 kB for each file, writing fails half-way, as on a full disk."""
    dest = tmp_path / f"x{ENDING[to]}"
    process = fork_server.start(
        *(tmp_path_factory.mktemp("streams"), "convert", saved["image"], dest, "--to", to),
        file_limit=100_000,
        HF_HUB_OFFLINE="1",
    )
    _, err = process.communicate()
    assert process.returncode == 5, err
    assert "cannot be written" in err and err.count("\n") == 1
    assert_files(tmp_path)


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("image", "100", "the nearest legal size is 96 or 128"),
        ("image", "64x100", "the nearest legal size is 96 or 128"),
        ("image", "8x64x64", "write 384 or 224x448"),
        ("image", "big", "is no size"),
        ("video", "64", "write 16x256 or 16x224x288"),
        ("video", "7x64", "the nearest legal size is 6 or 8"),
    ],
)
def test_illegal_sizes_are_refused_with_the_nearest(
    kind: str, size: str, message: str, saved: dict[str, Path], tmp_path: Path, hiera: Command
) -> None:
    code, _, err = hiera("convert", saved[kind], tmp_path / "x", "--to", "hub", "--size", size)
    assert code == 2 and message in err and err.count("\n") == 1
    assert_files(tmp_path)


# The hub ------------------------------------------------------------------------------------------


class PublishingHandler(HubHandler):
    """Handler with the part of the hub that uploads need."""

    def do_POST(self) -> None:
        hub, path = self.server, self.path
        hub.log.append(f"POST {path}")
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if hub.gated:
            return self._refuse(403, "GatedRepo")
        if path == "/api/validate-yaml":
            return self._answer_json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            request = json.loads(body)
            repo = f"{request.get('organization', 'me')}/{request['name']}"
            hub.repositories[repo] = {}
            return self._answer_json({"url": f"{hub.url}/{repo}"})
        repo = path.removeprefix("/api/models/").rsplit("/", 2)[0]
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            return self._answer_json({"files": modes})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                hub.repositories[repo][entry["value"]["path"]] = content
        return self._answer_json({"commitUrl": f"{hub.url}/{repo}/commit/c", "commitOid": "c" * 40})

    def _answer_json(self, value: dict[str, Any]) -> None:
        self._send(json.dumps(value).encode(), True, {"Content-Type": "application/json"})


@pytest.fixture
def publishing_hub(hub: Hub) -> Iterator[Hub]:
    """Yield a local hub that accepts uploads."""
    hub.RequestHandlerClass = PublishingHandler
    yield hub


def test_published_files_equal_the_local_files(
    run_process: RunProcess, publishing_hub: Hub, saved: dict[str, Path], tmp_path: Path
) -> None:
    """The real client uploads the files of DEST. They are kept if the upload fails."""
    hub = publishing_hub
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HOME": str(tmp_path / "home")}
    arguments = ["convert", saved["image"], tmp_path / "x", "--to", "hub", "--push-to-hub"]
    done = run_process(*arguments, "me/mine", **env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["url"].endswith("me/mine")
    assert hub.repositories["me/mine"] == {
        p.name: p.read_bytes() for p in (tmp_path / "x").iterdir()
    }
    card = hub.repositories["me/mine"]["README.md"].decode()
    assert "license: mit" in card and "| source | `training` |" in card and "SHA-256" in card

    hub.gated = True
    arguments[2] = tmp_path / "y"
    done = run_process(*arguments, "me/other", **env)
    assert done.returncode == 4 and "could not be published" in done.stderr
    assert (tmp_path / "y" / formats.WEIGHTS_NAME).is_file()


def test_publishing_is_checked_before_the_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no name of a hub repository"):
        publish.check("a/b/c")
    monkeypatch.setattr(publish.download, "is_offline", lambda: True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        publish.check("me/mine")


def test_sample_inputs_are_real_pictures() -> None:
    from hiera_core.conversion import sample_inputs

    model = hiera_core.create_model("hiera_nano_32", pretrained=True)
    transform = hiera_core.Classifier(model).transform
    samples = sample_inputs.gather_samples(transform, 3)
    assert len(samples) == 8
    batch = torch.cat(list(samples.batches()))
    assert batch.shape == (8, 3, 32, 32) and np.ptp(batch.numpy(), axis=(1, 2, 3)).min() > 0.5


def test_models_of_signals_convert_to_pth_but_not_to_pt2(tmp_path: Path, hiera: Command) -> None:
    config = {name: SMALL[name] for name in ("embed_dim", "stages", "num_classes")}
    shapes = {"q_stride": (2,), "mask_unit_size": (8,), "input_size": (256,), "in_chans": 1}
    patch = {"patch_kernel": (7,), "patch_stride": (4,), "patch_padding": (3,)}
    hiera_core.Hiera(**config, **shapes, **patch).save_pretrained(tmp_path / "one")
    code, _, err = hiera("convert", tmp_path / "one", tmp_path / "x.pth", "--to", "pth")
    assert code == 0, err
    assert hiera_core.create_model(str(tmp_path / "x.pth")).config["input_size"] == (256,)
    code, _, err = hiera("convert", tmp_path / "one", tmp_path / "x.pt2", "--to", "pt2")
    assert code == 2 and "takes signals" in err


def test_large_programs_have_a_separate_file_of_weights(
    tmp_path: Path, hiera: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A protobuf file cannot exceed 2 GB."""
    from hiera_core.conversion import export_program

    monkeypatch.setattr(export_program, "PROTOBUF_LIMIT", 0)
    code, out, err = hiera("convert", "hiera_nano_32", tmp_path / "m.onnx", "--to", "onnx")
    assert (code, err) == (0, "")
    assert json.loads(out)["files"] == ["m.onnx", "m.onnx.data"]
    assert_files(tmp_path, "m.onnx", "m.onnx.data")
    (tmp_path / "m.onnx").unlink()
    code, _, err = hiera("convert", "hiera_nano_32", tmp_path / "m.onnx", "--to", "onnx")
    assert code == 2 and "m.onnx.data' exists" in err


def test_safetensors_equal_those_of_the_official_writer(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    state = files.read_tensors(saved["image"] / formats.WEIGHTS_NAME)
    mixed = {**state, "norm.bias": state["norm.bias"].clone(), "x": state["norm.bias"][::2]}
    mixed["half"] = state["norm.weight"].half()
    files.write_safetensors(tmp_path / "ours", mixed)
    plain = {name: tensor.contiguous().clone() for name, tensor in mixed.items()}
    save_file(plain, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    checksum = download.sha256_of(tmp_path / "ours")
    assert hashlib.sha256((tmp_path / "ours").read_bytes()).hexdigest() == checksum


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("to", ["hub", "pth"])
@pytest.mark.parametrize(
    "dest", ["", ".", "..", "/", "/dev/null", "fifo", "x" * 300, "x" * 250, "a\0b", "none/x"]
)
def test_odd_destinations_are_refused(
    hiera: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dest: str,
    to: str,
    overwrite: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    code, out, err = hiera(
        "convert", "hiera_nano_32", dest, "--to", to, *(["--overwrite"] if overwrite else [])
    )
    assert (code, out) == (2, "") and len(err.splitlines()) == 1, err
    assert "unexpected" not in err and [p.name for p in tmp_path.iterdir()] == ["fifo"]


def test_a_difference_of_zero_is_reported() -> None:
    proof = verify.Proof(reader="timm", inputs=3, max_difference=0.0, agree=0, what="logits")
    assert proof.to_json() == {
        "reader": "timm", "inputs": 3, "max_difference": 0.0, "agree": 0, "what": "logits",
    }  # fmt: skip
    assert verify.Proof(tensors=5).to_json() == {"tensors": 5}


def test_a_program_of_a_full_size_model_has_at_most_8_dimensions(
    tmp_path: Path, hiera: Command
) -> None:
    """TensorRT and CUDA runtimes stop there. All tensors of the graph are looked at."""
    import onnx

    source = _random_weights("hiera_tiny_224", tmp_path)
    code, _, err = hiera("convert", source, tmp_path / "m.onnx", "--to", "onnx")
    assert code == 0, err
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "m.onnx"))
    shaped = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    ranks = [len(value.type.tensor_type.shape.dim) for value in shaped]
    ranks += [len(tensor.dims) for tensor in model.graph.initializer]
    permutes = [
        len(attribute.ints)
        for node in model.graph.node
        if node.op_type == "Transpose"
        for attribute in node.attribute
    ]
    assert len(ranks) > 50 and permutes
    assert max(ranks + permutes) <= 8


def _random_weights(name: str, folder: Path) -> Path:
    model = draw_weights(hiera_core.create_model(name))
    torch.save(model.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


@pytest.mark.parametrize(
    "to", ["hub", "timm", "transformers", "pt2", pytest.param("onnx", marks=pytest.mark.slow)]
)
def test_half_characters_in_a_card_are_replaced(to: str, tmp_path: Path) -> None:
    converter.convert("hiera_nano_32", tmp_path / "source", "hub")
    path = tmp_path / "source" / "hiera.json"
    card = json.loads(path.read_text())
    card |= {"model": "\ud800", "licence": "\ud800x", "source": "\ud800"}
    card["classes"] = ["\ud800", *map(str, range(9))]
    path.write_text(json.dumps(card))
    done = converter.convert(tmp_path / "source", tmp_path / ("m.pt2" if to == "pt2" else "m"), to)
    assert done.model == "\N{REPLACEMENT CHARACTER}"


def test_paths_that_are_not_utf8_are_refused(tmp_path: Path, hiera: Command) -> None:
    name = os.fsdecode(b"s\xff")
    converter.convert("hiera_nano_32", tmp_path / "source", "hub")
    (tmp_path / "source").rename(tmp_path / name)
    code, _, err = hiera("convert", tmp_path / name, tmp_path / "m.pth", "--to", "pth")
    assert code == 3 and "is not valid UTF-8; rename it" in err, err
    for to in ("hub", "pth", "onnx"):
        code, _, err = hiera("convert", "hiera_nano_32", tmp_path / f"{name}2", "--to", to)
        assert code == 2 and "is not valid UTF-8" in err, err


def test_a_file_is_not_named_like_a_folder(tmp_path: Path, hiera: Command) -> None:
    code, _, err = hiera("convert", "hiera_nano_32", f"{tmp_path}/m/", "--to", "onnx")
    assert code == 2 and "onnx writes a file" in err, err
    with pytest.raises(UsageError, match="named like a folder"):
        converter.convert("hiera_nano_32", f"{tmp_path}/m/", "pth")
    assert converter.convert("hiera_nano_32", f"{tmp_path}/m/", "hub").output == tmp_path / "m"


def test_the_extension_of_dest_is_its_format(hiera: Command, tmp_path: Path) -> None:
    """Where no other is named, and only where it stands for one."""
    assert [formats.format_of(name) for name in ("x.onnx", "x.pt2", "a/x.PTH", "x", "x.pt")] == [
        "onnx", "pt2", "pth", None, None,
    ]  # fmt: skip
    code, out, err = hiera("convert", "hiera_nano_32", tmp_path / "x.pth", "-f", "json")
    assert code == 0 and json.loads(out)["format"] == "pth", err
    converted = hiera_core.convert("hiera_nano_32", tmp_path / "y.pth")
    assert (converted.format, files.read_tensors(tmp_path / "y.pth").keys()) == (
        "pth",
        files.read_tensors(tmp_path / "x.pth").keys(),
    )
    for name in ("x", "x.pt", "x.safetensors"):
        code, _, err = hiera("convert", "hiera_nano_32", tmp_path / name)
        assert code == 2 and "Missing option '--to'" in err and "onnx, pt2, aoti" in err
        assert ("--to hub writes a folder" in err) == name.endswith(".safetensors")
        with pytest.raises(UsageError, match="does not say its format; give one of hub, pth"):
            hiera_core.convert("hiera_nano_32", tmp_path / name)
    code, _, err = hiera("convert", "hiera_nano_32", tmp_path / "z.pt2", "-b", 2)
    assert code == 2 and "pt2 has no fixed batch size; leave it out, or use aoti" in err
