"""Conversion: every format loads in its own library, nothing unproven or half-written is left."""

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

from .conftest import SMALL, Hub, HubHandler, assert_close, draw_weights, run_process

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
    """A folder of each kind of model: drawn weights, class names, preprocessing."""
    root = tmp_path_factory.mktemp("saved")
    for seed, (kind, (cls, config)) in enumerate(MODELS.items()):
        model = draw_weights(cls(**config), seed)
        model.card = {"model": f"my_{kind}", "licence": "MIT", "source": "training"}
        if kind in ("image", "video"):
            model.card["classes"] = [f"kind {i}" for i in range(10)]
        model.save_pretrained(root / kind)
    return {kind: root / kind for kind in MODELS}


def same_folder(one: Path, other: Path) -> None:
    assert {p.name for p in one.iterdir()} - {"README.md"} == {
        p.name for p in other.iterdir() if p.name != "README.md"
    }
    for name in ("config.json", "hiera.json"):
        assert json.loads((one / name).read_text()) == json.loads((other / name).read_text())
    same_tensors(load_file(one / "model.safetensors"), load_file(other / "model.safetensors"))


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def only(folder: Path, *names: str) -> None:
    """A folder holds these and nothing else, hidden or not."""
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)


# Round trips --------------------------------------------------------------------------------------

WAYS = [(kind, "pth") for kind in MODELS]
WAYS += [("image", "timm"), ("image", "transformers"), ("mae", "transformers")]
WAYS += [("nameless", "timm"), ("nameless", "transformers")]


@pytest.mark.parametrize(("kind", "through"), WAYS)
def test_round_trips_are_exact(
    kind: str, through: str, saved: dict[str, Path], tmp_path: Path, hiera: Command
) -> None:
    """Also config.json, class names and preprocessing come back."""
    for source, dest, to in [(saved[kind], "there", through), (tmp_path / "there", "back", "hub")]:
        code, out, err = hiera("convert", source, tmp_path / dest, "--to", to)
        assert (code, err) == (0, "")
        assert json.loads(out)["proof"]["tensors"] == len(
            load_file(saved[kind] / formats.WEIGHTS_NAME)
        )
    same_folder(saved[kind], tmp_path / "back")


@pytest.mark.parametrize("name", zoo.names())
def test_names_of_every_zoo_model_come_back(name: str) -> None:
    row = zoo.get(name)
    with torch.device("meta"):
        state = hiera_core.create_model(name).state_dict()
    ways: list[key_mapping.Naming] = [
        "reference",
        *(["transformers"] if row.kind == "image" else []),
    ]
    for dialect in ways + (["timm"] if not row.autoencoder else []):  # type: ignore[operator]
        there = key_mapping.from_reference(state, dialect, row.config["stages"])
        back, told = key_mapping.to_reference(there)
        assert told == dialect
        assert back.keys() == state.keys() and all(back[n] is state[n] for n in state)


def test_a_pth_is_what_the_reference_loads(saved: dict[str, Path], tmp_path: Path) -> None:
    import hiera as reference

    converter.convert(str(saved["image"]), tmp_path / "m.pth", "pth")
    content = torch.load(tmp_path / "m.pth", weights_only=True)
    model = reference.Hiera(**SMALL)
    model.load_state_dict(content["model_state"], strict=True)
    sizes = [
        path.stat().st_size for path in (tmp_path / "m.pth", saved["image"] / formats.WEIGHTS_NAME)
    ]
    assert sizes[0] < 1.1 * sizes[1]


# The real libraries -------------------------------------------------------------------------------


@torch.no_grad()
def test_timm_loads_it(saved: dict[str, Path], tmp_path: Path, pictures: Path) -> None:
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
def test_transformers_loads_it(saved: dict[str, Path], tmp_path: Path, pictures: Path) -> None:
    from transformers import AutoImageProcessor, HieraForImageClassification

    converter.convert(str(saved["image"]), tmp_path / "tf", "transformers")
    theirs = HieraForImageClassification.from_pretrained(tmp_path / "tf").eval()
    assert theirs.config.id2label[3] == "kind 3"
    ours = hiera_core.Classifier(hiera_core.Hiera.from_pretrained(saved["image"]), dtype="fp32")
    image = Image.open(pictures / "chelsea.png")
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "tf")(image, return_tensors="pt")
    view = ours.transform.normalise(torch.from_numpy(ours.transform.crop(image)[None]))
    assert (pixels["pixel_values"] - view).abs().max() < 0.05  # its resize rounds otherwise
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


def test_what_has_no_place(saved: dict[str, Path], tmp_path: Path, hiera: Command) -> None:
    for source, to, message in [
        ("video", "transformers", "transformers has no Hiera for video"),
        ("video", "timm", "timm has no Hiera for video"),
        ("mae", "onnx", "is an autoencoder"),
        ("mae", "pt2", "is an autoencoder"),
    ]:
        code, _, err = hiera("convert", saved[source], tmp_path / f"x{ENDING[to]}", "--to", to)
        assert code == 2 and message in err and err.count("\n") == 1
    # Three stages, the last unpooled: transformers would window its first block.
    code, _, err = hiera("convert", "mae_hiera_nano_32", tmp_path / "x", "--to", "transformers")
    assert code == 2 and "attend within other windows" in err
    only(tmp_path)


@torch.no_grad()
def test_an_autoencoder_becomes_timm_s_encoder(
    saved: dict[str, Path], tmp_path: Path, hiera: Command
) -> None:
    import timm

    code, _, err = hiera("convert", saved["mae"], tmp_path / "timm", "--to", "timm")
    assert code == 0 and "the decoder is dropped (24 tensors)" in err
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    mae = hiera_core.MaskedAutoencoderHiera.from_pretrained(saved["mae"]).eval()
    plain = hiera_core.Hiera(**{**SMALL, "num_classes": 0}).eval()
    state = {n.replace("encoder_norm.", "norm."): t for n, t in mae.state_dict().items()}
    plain.load_state_dict({n: state[n] for n in plain.state_dict()})
    x = torch.randn(2, 3, 64, 64)
    assert_close(theirs(x), plain(x))
    for to in ("hub", "transformers"):  # and on, as a model without a classifier
        arguments = ["convert", tmp_path / "timm", tmp_path / to, "--to", to]
        code, out, _ = hiera(*arguments, "--verify", "forward")
        assert code == 0 and json.loads(out)["proof"]["what"] == "features"


# Programs -----------------------------------------------------------------------------------------

FRESH = """
import json, sys, torch
program = torch.export.load(sys.argv[1], extra_files=(extra := {"labels": ""})).module()
batch = torch.load(sys.argv[2])
torch.save([program(batch[:n]) for n in (1, 3, 8)], sys.argv[2])
assert not [name for name in sys.modules if name.startswith("hiera")]
print(json.loads(extra["labels"])[0])
"""


@pytest.mark.parametrize("name", ["hiera_nano_32", "hiera_nano_8x32"])
@torch.no_grad()
def test_programs_of_the_models_in_the_box(name: str, tmp_path: Path, hiera: Command) -> None:
    """Any batch, by onnxruntime, and by torch in a process that cannot import this package."""
    import onnxruntime

    model = hiera_core.create_model(name, pretrained=True).eval()
    batch = torch.randn(8, 3, *model.config["input_size"])
    expected = model.forward_logits(batch)

    code, out, err = hiera("convert", name, tmp_path / "m.onnx", "--to", "onnx")
    assert (code, err) == (0, "")
    found = json.loads(out)["proof"]
    assert found["reader"].startswith("onnxruntime") and found["max_difference"] < 1e-4
    assert found["agree"] == found["inputs"]
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    known = session.get_modelmeta().custom_metadata_map
    assert json.loads(known["labels"]) == model.card["classes"]
    for count in (1, 3, 8):
        (logits,) = session.run(["logits"], {"input": batch[:count].numpy()})
        assert_close(torch.from_numpy(logits), expected[:count], 1e-4)

    code, _, err = hiera("convert", name, tmp_path / "m.pt2", "--to", "pt2")
    assert (code, err) == (0, "")
    torch.save(batch, tmp_path / "batch")
    code_and_files = [FRESH, tmp_path / "m.pt2", tmp_path / "batch"]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", "import site, sys; " + _without_us(), *code_and_files],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == model.card["classes"][0]
    for logits in torch.load(tmp_path / "batch"):
        assert_close(logits, expected[: len(logits)], 1e-5)


def _without_us() -> str:
    """A fresh process that finds what we require but not this package."""
    return (
        f"sys.path += {[p for p in sys.path if 'site-packages' in p]!r}; "
        "code = sys.argv.pop(1); exec(code)"
    )


def test_programs_in_half_precision(tmp_path: Path, hiera: Command) -> None:
    path, arguments = tmp_path / "m.onnx", ["convert", "hiera_nano_32"]
    code, out, _ = hiera(*arguments, path, "--to", "onnx", "--dtype", "fp16")
    record = json.loads(out)
    assert code == 0 and record["dtype"] == "fp16"
    assert 0 < record["proof"]["max_difference"] < 0.02
    assert path.stat().st_size < 1_000_000  # 0.28 M parameters
    code, _, err = hiera(*arguments, tmp_path / "x", "--to", "onnx", "--dtype", "bf16")
    assert code == 2 and "onnx holds no bf16" in err


def test_missing_packages_are_named(
    tmp_path: Path, hiera: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = formats.importlib.util.find_spec
    gone = {"onnx", "onnxscript"}
    monkeypatch.setattr(
        formats.importlib.util, "find_spec", lambda name: None if name in gone else find(name)
    )
    code, _, err = hiera("convert", "hiera_nano_32", tmp_path / "m.onnx", "--to", "onnx")
    assert code == 2 and err.count("\n") == 1
    assert "needs onnx and onnxscript" in err and "hiera-toolkit[onnx]" in err


# Values that change -------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["hub", "pth", "timm", "transformers"])
def test_answers_are_compared_in_the_target_s_library(
    to: str, saved: dict[str, Path], tmp_path: Path, hiera: Command
) -> None:
    arguments = ["convert", saved["image"], tmp_path / "x", "--to", to, "--dtype", "fp16"]
    code, out, err = hiera(*arguments, "--size", "96")
    record = json.loads(out)
    assert (code, err) == (0, "")
    assert record["input_size"] == [96, 96] and record["dtype"] == "fp16"
    found = record["proof"]
    library = {"timm": "timm", "transformers": "transformers"}.get(to, "hiera-transformer")
    assert found["reader"].startswith(library) and found["tensors"] and found["inputs"] == 8
    assert found["max_difference"] < 1e-4 * 100 and "cost" in found
    assert "resampled from 64x64 to 96x96 (absolute-window rule)" in record["notes"][0]


@pytest.mark.parametrize("kind", ["video", "mae", "mae_video"])
def test_forward_on_request(
    kind: str, saved: dict[str, Path], tmp_path: Path, hiera: Command
) -> None:
    arguments = ["convert", saved[kind], tmp_path / "x", "--to", "hub", "--verify", "forward"]
    code, out, err = hiera(*arguments, "-f", "table")
    assert (code, err) == (0, "")
    assert "tensors read back bit for bit" in out and "proven: hiera-transformer" in out
    assert "losses" in out if kind.startswith("mae") else "top-1 the same on 2 of 2" in out


def test_your_own_pictures(
    saved: dict[str, Path], pictures: Path, tmp_path: Path, hiera: Command
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    arguments = ["convert", saved["image"], tmp_path / "x", "--to", "hub", "--dtype", "bf16"]
    code, out, err = hiera(*arguments, "--pictures", pictures, "--pictures", tmp_path / "bad.jpg")
    assert code == 0 and "bad.jpg" in err
    found = json.loads(out)["proof"]
    assert found["samples"] == "4 pictures" and found["cost"]["max_difference"] > 0


def test_weights_beyond_fp16(saved: dict[str, Path], tmp_path: Path, hiera: Command) -> None:
    state = load_file(saved["image"] / formats.WEIGHTS_NAME)
    state["norm.weight"][0] = 1e6
    save_file(state, tmp_path / formats.WEIGHTS_NAME)
    (tmp_path / "config.json").write_bytes((saved["image"] / "config.json").read_bytes())
    code, _, err = hiera("convert", tmp_path, tmp_path / "x", "--to", "hub", "--dtype", "fp16")
    assert code == 3 and "beyond the range of fp16" in err
    only(tmp_path, formats.WEIGHTS_NAME, "config.json")


@torch.no_grad()
def test_native_absolute_window_models(tmp_path: Path, hiera: Command) -> None:
    """timm holds them as they are; elsewhere the embedding is written out for one size."""
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


# Proof --------------------------------------------------------------------------------------------


def test_a_wrong_bit_is_found(
    saved: dict[str, Path], tmp_path: Path, hiera: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(path: Path, state: dict[str, torch.Tensor], extras: Any = None) -> None:
        spoilt = {name: tensor.clone() for name, tensor in state.items()}
        last = list(spoilt)[-1]
        spoilt[last].view(-1)[-1] = torch.nextafter(spoilt[last].view(-1)[-1], torch.tensor(9.0))
        files.write_safetensors(path, spoilt, extras)

    monkeypatch.setattr(write_weights.files, "write_pickle", spoil)
    code, _, err = hiera("convert", saved["image"], tmp_path / "m.pth", "--to", "pth")
    assert code == 3 and "head.projection.bias differs" in err and "it was removed" in err
    only(tmp_path)


def test_groups_hold_every_tensor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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


def test_other_answers_are_found(
    saved: dict[str, Path], tmp_path: Path, hiera: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm's config says other heads: every tensor is right, the model is not."""
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
    only(tmp_path, "source")


def test_without_the_library_we_read_it_ourselves(
    saved: dict[str, Path], tmp_path: Path, hiera: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hiera_core.conversion import read_back

    missing = ("no_such_package", "timm", read_back._load_timm)
    monkeypatch.setitem(read_back.READERS, "timm", missing)
    arguments = ["convert", saved["image"], tmp_path / "x", "--to", "timm", "--verify", "forward"]
    code, out, err = hiera(*arguments)
    assert code == 0 and "timm is not installed" in err
    assert json.loads(out)["proof"]["reader"] == "hiera-toolkit"


# Bad input, full disks ----------------------------------------------------------------------------


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def bad_file(kind: str, saved: Path, path: Path) -> None:
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
        save_file(state, path)  # of no released model, without a config
    elif kind == "extras":
        files.write_pickle(path, state, {"config": {"stages": None}, "card": 3})


BAD = {
    "truncated": "truncated or damaged",
    "foreign": "not a Hiera checkpoint",
    "code": "nothing of it was run",
    "nan": "NaN or infinite weights in norm.bias",
    "unknown": "no config.json and the shapes of no released model",
    "extras": "describes no Hiera",
    "missing": "no file, folder or hub repository",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_sources_leave_nothing(
    kind: str, saved: dict[str, Path], tmp_path: Path, hiera: Command
) -> None:
    bad_file(kind, saved["image"], tmp_path / "bad.pth")
    before = [p.name for p in tmp_path.iterdir()]
    for to in formats.FORMATS:
        code, out, err = hiera(
            "convert", tmp_path / "bad.pth", tmp_path / f"x{ENDING[to]}", "--to", to
        )
        assert (code, out) == (3, "") and BAD[kind] in err and err.count("\n") == 1, err
        only(tmp_path, *before)


def test_destinations(saved: dict[str, Path], tmp_path: Path, hiera: Command) -> None:
    source = str(saved["image"])
    (tmp_path / "file.pth").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for dest, to, more, message in [
        ("file.pth", "pth", [], "exists; --overwrite replaces it"),
        ("folder", "hub", [], "exists; --overwrite replaces it"),
        ("link", "pth", [], "exists; --overwrite replaces it"),
        ("folder", "pth", ["--overwrite"], "exists and is a folder"),
        ("link", "hub", ["--overwrite"], "exists and is a file"),
        ("full", "hub", ["--overwrite"], "holds more than a checkpoint (photo.jpg)"),
        ("x.safetensors", "timm", [], "is named like a file; leave out .safetensors"),
        ("no/such/x.pth", "pth", [], "make it first"),
        ("x.pth", "pt", [], "pt"),
        ("x", "pt2", [], "torch.export wants NAME.pt2"),
    ]:
        code, _, err = hiera("convert", source, tmp_path / dest, "--to", to, *more)
        assert code == 2 and message in err, err
    assert (tmp_path / "file.pth").read_text() == "mine"
    for dest, to in (("file.pth", "pth"), ("folder", "hub"), ("folder", "timm")):
        code, _, err = hiera("convert", source, tmp_path / dest, "--to", to, "--overwrite")
        assert code == 0, err
    assert (
        load.read_checkpoint(tmp_path / "file.pth").state
        and load.read_checkpoint(tmp_path / "folder").naming == "timm"
    )
    only(tmp_path, "file.pth", "folder", "full", "link")


def test_in_place(saved: dict[str, Path], tmp_path: Path) -> None:
    """The source is mapped while its folder is replaced."""
    converter.convert(str(saved["image"]), tmp_path / "m", "hub")
    converter.convert(str(tmp_path / "m"), tmp_path / "m", "timm", overwrite=True)
    converter.convert(str(tmp_path / "m"), tmp_path / "m", "hub", overwrite=True)
    same_folder(saved["image"], tmp_path / "m")


@pytest.mark.parametrize("to", ["hub", "pth", "pt2"])
def test_a_full_disk(to: str, saved: dict[str, Path], tmp_path: Path) -> None:
    """Files may not grow beyond 100 kB: writing fails half way, as on a full disk."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from hiera_cli.app import main; main()"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "convert",
            saved["image"],
            tmp_path / f"x{ENDING[to]}",
            "--to",
            to,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 5, done.stderr
    assert "cannot be written" in done.stderr and done.stderr.count("\n") == 1
    only(tmp_path)


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
def test_illegal_sizes(
    kind: str, size: str, message: str, saved: dict[str, Path], tmp_path: Path, hiera: Command
) -> None:
    code, _, err = hiera("convert", saved[kind], tmp_path / "x", "--to", "hub", "--size", size)
    assert code == 2 and message in err and err.count("\n") == 1
    only(tmp_path)


# The hub ------------------------------------------------------------------------------------------


class Publishing(HubHandler):
    """As much of the hub as publishing needs."""

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
    hub.RequestHandlerClass = Publishing
    yield hub


def test_publishing(publishing_hub: Hub, saved: dict[str, Path], tmp_path: Path) -> None:
    """With the real client; what arrives is what lies here, and DEST stays when the hub fails."""
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


def test_publishing_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no name of a hub repository"):
        publish.check("a/b/c")
    monkeypatch.setattr(publish.download, "is_offline", lambda: True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        publish.check("me/mine")


def test_pixels_of_the_samples_are_real() -> None:
    from hiera_core.conversion import sample_inputs

    model = hiera_core.create_model("hiera_nano_32", pretrained=True)
    transform = hiera_core.Classifier(model).transform
    shown = sample_inputs.gather_samples(transform, 3)
    assert len(shown) == 8
    batch = torch.cat(list(shown.batches()))
    assert batch.shape == (8, 3, 32, 32) and np.ptp(batch.numpy(), axis=(1, 2, 3)).min() > 0.5


def test_signals_are_renamed_only(tmp_path: Path, hiera: Command) -> None:
    one = {name: SMALL[name] for name in ("embed_dim", "stages", "num_classes")}
    shapes = {"q_stride": (2,), "mask_unit_size": (8,), "input_size": (256,), "in_chans": 1}
    patch = {"patch_kernel": (7,), "patch_stride": (4,), "patch_padding": (3,)}
    hiera_core.Hiera(**one, **shapes, **patch).save_pretrained(tmp_path / "one")
    code, _, err = hiera("convert", tmp_path / "one", tmp_path / "x.pth", "--to", "pth")
    assert code == 0, err
    assert hiera_core.create_model(str(tmp_path / "x.pth")).config["input_size"] == (256,)
    code, _, err = hiera("convert", tmp_path / "one", tmp_path / "x.pt2", "--to", "pt2")
    assert code == 2 and "takes signals" in err


def test_large_programs_keep_their_weights_beside(
    tmp_path: Path, hiera: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """protobuf ends at 2 GB."""
    from hiera_core.conversion import export_program

    monkeypatch.setattr(export_program, "PROTOBUF_LIMIT", 0)
    code, out, err = hiera("convert", "hiera_nano_32", tmp_path / "m.onnx", "--to", "onnx")
    assert (code, err) == (0, "")
    assert json.loads(out)["files"] == ["m.onnx", "m.onnx.data"]
    only(tmp_path, "m.onnx", "m.onnx.data")
    (tmp_path / "m.onnx").unlink()
    code, _, err = hiera("convert", "hiera_nano_32", tmp_path / "m.onnx", "--to", "onnx")
    assert code == 2 and "m.onnx.data' exists" in err


def test_safetensors_are_the_official_writers_byte_for_byte(
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
