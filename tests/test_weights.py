"""Tests of checkpoints: sources, key mappings, missing keys, damaged files, code in pickles."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hiera as reference
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import hiera_core
from hiera_core.atomic import replacing
from hiera_core.errors import CheckpointError, HubError, OutputError, UsageError
from hiera_core.weights import files, key_mapping, load

from .conftest import SMALL, Hub, RunProcess, assert_close, draw_weights

Command = Callable[..., tuple[int, str, str]]
TINY = {"embed_dim": 96, "stages": (1, 2, 7, 2)}


@pytest.fixture(scope="module")
def tiny_pth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of hiera_tiny_224 in the format that the reference's authors publish."""
    path = tmp_path_factory.mktemp("tiny") / "hiera_tiny_224.pth"
    torch.save({"model_state": draw_weights(reference.hiera_tiny_224()).state_dict()}, path)
    return path


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of a model's weights."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# Folders ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_folders_load_in_the_reference_and_back(tmp_path: Path) -> None:
    x = torch.randn(1, 3, 64, 64)
    ours = draw_weights(hiera_core.Hiera(**SMALL)).eval()
    ours.save_pretrained(tmp_path / "ours", config=ours.config)
    assert_close(ours(x), reference.Hiera.from_pretrained(tmp_path / "ours").eval()(x))

    theirs = draw_weights(reference.Hiera(**SMALL), seed=1).eval()
    theirs.save_pretrained(tmp_path / "theirs", config=theirs.config)
    back = hiera_core.Hiera.from_pretrained(tmp_path / "theirs").eval()
    assert_close(back(x), theirs(x))
    assert back.config == {**ours.config}


@torch.no_grad()
def test_autoencoder_folders_load_in_the_reference(tmp_path: Path) -> None:
    x = torch.randn(1, 3, 64, 64)
    config = {**SMALL, "q_pool": 2, "decoder_embed_dim": 32, "decoder_num_heads": 2}
    ours = draw_weights(hiera_core.MaskedAutoencoderHiera(**config, decoder_depth=1))
    ours.save_pretrained(tmp_path)
    theirs = reference.MaskedAutoencoderHiera.from_pretrained(tmp_path)
    mask = torch.tensor([[True, False, False, True]])
    for value, expected in zip(ours(x, mask=mask), theirs(x, mask=mask), strict=True):
        assert_close(value.float(), expected.float())
    again = hiera_core.MaskedAutoencoderHiera.from_pretrained(tmp_path)
    assert again.config == ours.config


def test_config_json_holds_constructor_arguments_only(tmp_path: Path) -> None:
    model = hiera_core.Hiera(**SMALL)
    model.card = {"model": "mine", "classes": list("abcdefghij")}
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config) == set(reference.Hiera(**SMALL).config)
    built = hiera_core.create_model(str(tmp_path))
    assert built.card["classes"] == list("abcdefghij") and built.card["model"] == "mine"


def test_missing_keys_are_refused_if_strict(small_folder: Path, tmp_path: Path) -> None:
    state = files.read_tensors(small_folder / "model.safetensors")
    del state["blocks.2.mlp.fc1.weight"]
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((small_folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"blocks\.2\.mlp\.fc1\.weight is missing"):
        hiera_core.Hiera.from_pretrained(tmp_path)
    loose = hiera_core.Hiera.from_pretrained(tmp_path, strict=False)
    assert torch.equal(loose.blocks[1].norm1.weight, state["blocks.1.norm1.weight"])


def test_a_full_disk_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(replacing.os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        hiera_core.Hiera(**SMALL).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_share_memory_are_written_separately(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    state = {"a": base, "tied": base, "slice": base[3:7], "even": base[::2], "other": base + 1}
    files.write_safetensors(tmp_path / "a.safetensors", state)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_equal_weights_give_equal_files(tmp_path: Path) -> None:
    state, extras = {"a": torch.ones(3)}, {"classes": ["Käse", "b"]}
    for i in range(8):  # safetensors writes its metadata in random order
        files.write_safetensors(tmp_path / f"{i}", state, extras)
    first, *others = [(tmp_path / f"{i}").read_bytes() for i in range(8)]
    assert all(other == first for other in others)
    assert torch.equal(load_file(tmp_path / "0")["a"], state["a"])


# Names and heads --------------------------------------------------------------------------------


def test_zoo_functions_list_the_checkpoints_of_the_reference() -> None:
    for name in ("hiera_base_224", "mae_hiera_large_16x224"):
        ours, theirs = getattr(hiera_core, name), getattr(reference, name)
        assert ours.checkpoints == theirs.checkpoints
        assert ours.default == theirs.default


def test_create_model_from_a_file_and_with_other_classes(
    tiny_pth: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = files.read_tensors(tiny_pth)
    model = hiera_core.create_model("hiera_tiny_224", checkpoint=tiny_pth)
    assert torch.equal(model.head.projection.weight, state["head.projection.weight"])
    inferred = hiera_core.create_model(str(tiny_pth))  # from the shapes of the weights
    assert inferred.card["model"] == "hiera_tiny_224"
    with caplog.at_level(logging.WARNING, "hiera"):
        ten = hiera_core.create_model("hiera_tiny_224", checkpoint=tiny_pth, num_classes=10)
    assert "head (2) not used" in caplog.text and "newly initialised" in caplog.text
    assert ten.head.projection.weight.shape == (10, 768)
    assert ten.head.projection.weight.abs().max() < 1e-3, "scaled initialisation"
    assert torch.equal(ten.blocks[3].attn.qkv.weight, state["blocks.3.attn.qkv.weight"])


def test_a_model_without_classes_has_no_head(tiny_pth: Path) -> None:
    model = hiera_core.create_model("hiera_tiny_224", checkpoint=tiny_pth, num_classes=0)
    assert isinstance(model.head, torch.nn.Identity)


@pytest.mark.parametrize("channels", [1, 4])
def test_patch_embedding_adapts_to_channels(tiny_pth: Path, channels: int) -> None:
    """The weights are adapted as in timm."""
    import timm.models

    weight = files.read_tensors(tiny_pth)["patch_embed.proj.weight"]
    expected = timm.models.adapt_input_conv(channels, weight.clone())
    model = hiera_core.create_model("hiera_tiny_224", checkpoint=tiny_pth, in_chans=channels)
    assert_close(model.patch_embed.proj.weight, expected)


def test_a_classifier_loads_the_weights_of_an_autoencoder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {**SMALL, "q_pool": 2, "decoder_embed_dim": 32, "decoder_num_heads": 2}
    mae = draw_weights(hiera_core.MaskedAutoencoderHiera(**config, decoder_depth=1))
    mae.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "hiera"):
        model = hiera_core.Hiera.from_pretrained(tmp_path)
    assert "decoder_blocks" in caplog.text and "norm (2)" in caplog.text
    assert model.config["q_pool"] == 3
    assert torch.equal(model.blocks[4].mlp.fc2.bias, mae.blocks[4].mlp.fc2.bias)
    assert (model.norm.bias == 0.02).all(), "the initial value, as in the reference"


def test_the_error_about_a_wrong_model_names_the_right_one(tiny_pth: Path, hiera: Command) -> None:
    code, _, err = hiera("predict", "x.jpg", "-m", "hiera_base_224", "--checkpoint", tiny_pth)
    assert code == 3 and err.count("\n") == 1
    assert "use --model hiera_tiny_224" in err and "is expected" in err


def test_unknown_checkpoints_and_models_have_suggestions(hiera: Command) -> None:
    code, _, err = hiera("predict", "x.jpg", "-m", "hiera_base_224.mae_in1k_ft")
    assert code == 2 and "did you mean" in err and "mae_in1k_ft_in1k" in err
    with pytest.raises(UsageError, match="hiera_base_224"):
        hiera_core.create_model("hiera_bas_224")


# Key mappings -----------------------------------------------------------------------------------


@torch.no_grad()
def test_weights_of_timm_load(tmp_path: Path) -> None:
    import timm

    theirs = draw_weights(timm.create_model("hiera_tiny_224")).eval()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = hiera_core.create_model(str(tmp_path)).eval()
    x = torch.randn(1, 3, 224, 224)
    assert_close(ours.forward_logits(x), theirs(x))


@pytest.mark.parametrize("autoencoder", [False, True])
@torch.no_grad()
def test_weights_of_transformers_load(tmp_path: Path, autoencoder: bool) -> None:
    from transformers import HieraConfig, HieraForImageClassification, HieraForPreTraining

    config = HieraConfig(
        embed_dim=96,
        depths=[1, 2, 7, 2],
        num_heads=[1, 2, 4, 8],
        num_labels=10,
        id2label={i: f"kind {i}" for i in range(10)},
        num_query_pool=2 if autoencoder else 3,
        decoder_hidden_size=512,
        decoder_depth=8,
        decoder_num_heads=16,
        normalize_pixel_loss=True,
    )
    cls = HieraForPreTraining if autoencoder else HieraForImageClassification
    theirs = draw_weights(cls(config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = hiera_core.create_model(str(tmp_path)).eval()
    x = torch.randn(1, 3, 224, 224)
    if not autoencoder:
        assert_close(ours.forward_logits(x), theirs(x).logits)
        assert ours.card["classes"][3] == "kind 3"
        return
    noise = torch.rand(1, 49)
    mask = torch.zeros(1, 49, dtype=torch.bool)
    mask[0, noise.argsort(1)[0, :19]] = True  # the units with the smallest noise are visible
    assert_close(ours(x, mask=mask)[0], theirs(x, noise=noise).loss)


def test_names_of_other_architectures_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"not a Hiera checkpoint .*cls_token"):
        key_mapping.to_reference({"cls_token": 1, "layers.0.weight": 2})


# Damaged files ----------------------------------------------------------------------------------


class Payload:
    """Object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_never_runs(tmp_path: Path, hiera: Command, zipped: bool) -> None:
    trap, path = tmp_path / "trap", tmp_path / "evil.pth"
    content = {"model_state": {"a": torch.zeros(1)}, "x": Payload(trap)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    code, _, err = hiera("predict", "x.jpg", "-m", "hiera_tiny_224", "--checkpoint", path)
    assert code == 3 and "nothing of it was run" in err and err.count("\n") == 1
    assert not trap.exists()


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_truncated_files_are_refused(
    tmp_path: Path, hiera: Command, ending: str, fraction: float
) -> None:
    whole, path = tmp_path / f"whole{ending}", tmp_path / f"cut{ending}"
    state = state_of(hiera_core.Hiera(**SMALL))
    save_file(state, whole) if ending == ".safetensors" else torch.save(state, whole)
    path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * fraction)])
    code, _, err = hiera("predict", "x.jpg", "--checkpoint", path)
    assert code == 3 and err.count("\n") == 1 and "truncated or damaged" in err


BAD_CONTENT = {
    "list": "holds a list",
    "scalar": "'epoch' is a int",
    "key": "the key 3 is no name",
    "sparse": "weights.pth",  # torch may refuse it first
    "float8": "norm.weight is float8_e4m3fn",
    "integers": "norm.weight is int64",
    "nan": "blocks.0.norm1.weight",
    "header": "truncated or damaged",
    "text": "begins with b'<html>",
    "program": "is an ONNX program, not a checkpoint; give the checkpoint that it was made from",
    "pointer": "git lfs pull",
}


@pytest.mark.parametrize("content", BAD_CONTENT)
def test_bad_content_is_refused(tmp_path: Path, hiera: Command, content: str) -> None:
    state: Any = state_of(hiera_core.Hiera(**SMALL))
    path = tmp_path / "weights.pth"
    if content == "list":
        torch.save([torch.zeros(3)], path)
    elif content == "scalar":
        torch.save({**state, "epoch": 3}, path)
    elif content == "key":
        torch.save({**state, 3: torch.zeros(1)}, path)
    elif content in ("float8", "integers"):
        dtype = torch.float8_e4m3fn if content == "float8" else torch.int64
        torch.save({**state, "norm.weight": torch.ones(128).to(dtype)}, path)
    elif content == "program":
        path = tmp_path / "model.onnx"
        path.write_bytes(b"\x08\n\x12\x07pytorch")
    elif content == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    elif content == "sparse":
        torch.save({**state, "x": torch.eye(3).to_sparse()}, path)
    elif content == "nan":
        state["blocks.0.norm1.weight"][3] = float("nan")
        torch.save(state, path)
    elif content == "header":
        path.write_bytes(struct.pack("<Q", 1000) + b"{not json" + b" " * 1000)
    else:
        path.write_text("<html>404 not found</html>")
    code, _, err = hiera("predict", "x.jpg", "--checkpoint", path)
    assert code == 3 and err.count("\n") == 1
    assert BAD_CONTENT[content] in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "unknown argument 'surprise'"),
        ({"stages": None}, "describes no Hiera"),
        ({"norm_layer": "NoNorm"}, "NoNorm"),
        ({"q_pool": 9}, "q_pool 9"),
        ({"id2label": ["a", "b"]}, "id2label"),
        ({"id2label": {"x": "a"}}, "id2label"),
        ({"preprocessing": {"interpolation": "magic"}}, "preprocessing"),
        ({"preprocessing": {"resize": "big"}}, "preprocessing"),
        ({"preprocessing": [1]}, "preprocessing"),
        ({"classes": 5}, "classes"),
        ({"classes": [1, 2]}, "classes"),
    ],
)
def test_bad_configurations_are_refused(
    small_folder: Path, tmp_path: Path, hiera: Command, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "model.safetensors").symlink_to(small_folder / "model.safetensors")
    config = json.loads((small_folder / "config.json").read_text())
    if {"preprocessing", "classes"} & set(change):
        files.write_json(tmp_path / "hiera.json", change)
        change = {}
    files.write_json(tmp_path / "config.json", {**config, **change})
    code, _, err = hiera("predict", "x.jpg", "-m", tmp_path)
    assert code == 3 and message in err and err.count("\n") == 1, err


def test_weights_without_a_classifier_are_refused(tmp_path: Path, hiera: Command) -> None:
    """The predictions of a random head would mean nothing."""
    state = state_of(hiera_core.mae_hiera_tiny_224())
    torch.save({"model_state": state}, tmp_path / "mae.pth")
    for arguments in (["-m", "hiera_tiny_224", "--checkpoint", tmp_path / "mae.pth"],):
        code, _, err = hiera("predict", "x.jpg", *arguments)
        assert code == 3 and "has no classifier" in err and err.count("\n") == 1
    code, _, err = hiera("predict", "x.jpg", "-m", "mae_hiera_tiny_224")
    assert code == 2 and "use hiera_tiny_224" in err, "before anything is downloaded"


def test_a_file_may_be_named_like_a_model(tiny_pth: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_pth.parent)
    model = hiera_core.create_model("hiera_tiny_224.pth")  # not the checkpoint "pth" of the model
    assert model.card["source"] == "hiera_tiny_224.pth"


def test_from_pretrained_takes_the_arguments_of_the_hub_mixin(small_folder: Path) -> None:
    model = hiera_core.Hiera.from_pretrained(
        pretrained_model_name_or_path=small_folder, map_location="meta"
    )
    assert model.pos_embed.is_meta


def test_missing_files_are_named(hiera: Command) -> None:
    code, _, err = hiera("predict", "x.jpg", "--checkpoint", "no/such/file.pth")
    assert code == 3 and "no/such/file.pth" in err
    code, _, err = hiera("predict", "x.jpg", "-m", "hiera_tiny_224", "--checkpoint", "gone.pth")
    assert code == 3 and "gone.pth" in err


def test_weights_are_mapped_not_copied(small_folder: Path) -> None:
    """Loading skips the random initialisation and makes no copy."""
    checkpoint = load.read_checkpoint(small_folder)
    model = hiera_core.models.factory.from_checkpoint(checkpoint)
    name = "blocks.0.mlp.fc1.weight"
    assert model.get_parameter(name).data_ptr() == checkpoint.state[name].data_ptr()


# The hub ----------------------------------------------------------------------------------------


def test_downloads_from_the_hub_are_cached_and_failures_have_remedies(
    run_process: RunProcess, hub: Hub, small_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    """The real client downloads from a local server."""
    contents = {p.name: p.read_bytes() for p in small_folder.iterdir()}
    hub.repositories["someone/small"] = contents
    picture = pictures / "coffee.png"
    home = {"HF_HOME": str(tmp_path / "hf"), "TORCH_HOME": str(tmp_path / "torch")}

    def predict(model: str, **more: str) -> tuple[int, str, list[str]]:
        environment = {"HF_ENDPOINT": hub.url, **home, **more}
        done = run_process("predict", picture, "-m", model, "-q", **environment)
        lines = [x for x in done.stderr.splitlines() if x.startswith("hiera:")]
        return done.returncode, done.stdout, lines

    code, first, lines = predict("someone/small")
    assert code == 0, lines
    assert json.loads(first)["topk"]
    downloads = [line for line in hub.log if line.startswith("GET") and "safetensors" in line]
    assert len(downloads) == 1

    code, again, _ = predict("someone/small")
    assert (code, again) == (0, first), "from the cache"
    assert [x for x in hub.log if x.startswith("GET") and "safetensors" in x] == downloads

    before = len(hub.log)
    code, offline, _ = predict("someone/small", HF_HUB_OFFLINE="1")
    assert (code, offline) == (0, first) and len(hub.log) == before

    for model, more, message in [
        ("someone/else", {}, "no such repository"),
        ("someone/else", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ("someone/else", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "does not answer"),
    ]:
        code, _, lines = predict(model, **more)
        assert code == 4 and len(lines) == 1, lines
        assert message in lines[0]
        for remedy in ("--checkpoint", "cache", "HF_ENDPOINT"):
            assert remedy in lines[0]

    hub.repositories["someone/old"] = old = {**contents}
    state = load.read_checkpoint(small_folder).state
    torch.save(state, tmp_path / "old.bin")
    old["pytorch_model.bin"] = (tmp_path / "old.bin").read_bytes()
    del old["model.safetensors"]
    code, from_bin, lines = predict("someone/old")
    assert code == 0, lines
    # On some processors, rounding depends on how a file aligns the weights in memory.
    for found, expected in zip(*(json.loads(x)["topk"] for x in (from_bin, first)), strict=True):
        assert found == expected | {"prob": pytest.approx(expected["prob"], abs=1e-6)}
    code, offline, lines = predict("someone/old", HF_HUB_OFFLINE="1")
    assert (code, offline) == (0, from_bin), lines
    code, _, lines = predict("some--one/else")
    assert code == 4 and "no name of a hub repository" in lines[0]

    hub.gated = True
    code, _, lines = predict("someone/small", HF_HOME=str(tmp_path / "empty"))
    assert code == 4 and "gated" in lines[0] and "HF_TOKEN" in lines[0]


def test_a_damaged_download_leaves_no_file(
    hub: Hub, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of a blob is its SHA-256. A blob with other content is deleted."""
    from hiera_core.weights import download as client

    blob = tmp_path / ("0" * 64)
    blob.write_bytes(b"other bytes")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    with pytest.raises(HubError, match="arrived damaged"):
        client._verify_blob(link, "someone/small")
    assert not blob.exists() and not link.exists()


def test_downloads_from_a_url_resume_and_are_cached(
    hub: Hub, tiny_pth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the hub, the .pth file comes from HIERA_WEIGHTS_URL, to the cache of torch.hub."""
    from huggingface_hub import constants

    content = tiny_pth.read_bytes()
    hub.plain["/hiera_tiny_224.pth"] = content
    monkeypatch.setenv("HIERA_WEIGHTS_URL", hub.url)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    hub.cut = 1 << 20
    with pytest.raises(HubError, match="broke off"):
        hiera_core.hiera_tiny_224(pretrained=True)
    partial = tmp_path / "checkpoints" / "hiera_tiny_224.pth.partial"
    assert partial.stat().st_size == 1 << 20 and not partial.with_suffix("").exists()
    hub.cut = None
    model = hiera_core.hiera_tiny_224(pretrained=True)
    assert (tmp_path / "checkpoints" / "hiera_tiny_224.pth").read_bytes() == content
    hub.plain.clear()
    again = hiera_core.hiera_tiny_224(pretrained=True)
    assert torch.equal(model.pos_embed, again.pos_embed)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        hiera_core.hiera_small_224(pretrained=True)


def test_urls_have_separate_files_and_stale_parts_are_deleted(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two URLs may end alike, and a .partial file may be longer than the download."""
    from hiera_core.weights import download as client

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    hub.plain = {"/one/model.pth": b"first", "/two/model.pth": b"second"}
    first, second = (client.from_url(f"{hub.url}/{n}/model.pth").weights for n in ("one", "two"))
    assert (first.read_bytes(), second.read_bytes()) == (b"first", b"second")
    for stale in (b"firs", b"first", b"much longer"):  # a prefix, the whole file, other content
        first.unlink()
        first.with_name(first.name + ".partial").write_bytes(stale)
        again = client.from_url(f"{hub.url}/one/model.pth").weights
        assert again.read_bytes() == b"first", stale
    first.unlink()
    with pytest.raises(HubError, match="other bytes"):
        client.from_url(f"{hub.url}/one/model.pth", sha256="0" * 64)
    assert not first.exists()
    for url in (f"{hub.url}/gone.pth", "http://127.0.0.1:9/x.pth", "http://bad host/x.pth"):
        with pytest.raises(HubError, match="could not be fetched"):
            client.from_url(url)
    with pytest.raises(HubError, match="could not be fetched"):
        load.read_checkpoint("HTTP://127.0.0.1:9/x.pth")


def test_a_path_with_a_typing_error_is_not_only_taken_for_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="the folder 'runs' has no 'flowrs'; give a local file"):
        load.read_checkpoint("runs/flowrs")
    with pytest.raises(HubError) as error:
        load.read_checkpoint("owner/flowrs")
    assert "folder" not in error.value.hint
