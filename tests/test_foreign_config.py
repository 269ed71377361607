"""Folders of timm and transformers bring their architecture, size, preprocessing and classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

import hiera_core
from hiera_core.data.transforms import ImageTransform, transform_for
from hiera_core.errors import CheckpointError
from hiera_core.weights.foreign_config import read_config

from .conftest import assert_close, draw_weights

Command = Callable[..., tuple[int, str, str]]
MEAN, STD = [0.4, 0.5, 0.6], [0.3, 0.2, 0.25]
CLASSES = ["ant", "bee", "cat", "dog", "elk"]
SIZE = (64, 160)


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an architecture, size, preprocessing and classes of its own."""
    folder = tmp_path_factory.mktemp("transformers")
    config = transformers.HieraConfig(
        embed_dim=16,
        depths=[1, 2, 1, 1],
        num_heads=[2, 4, 8, 16],
        image_size=list(SIZE),
        mlp_ratio=2.0,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: number for number, name in enumerate(CLASSES)},
    )
    model = transformers.HieraForImageClassification(config).eval()
    draw_weights(model)
    model.save_pretrained(folder)
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": 70},
        crop_size={"height": SIZE[0], "width": SIZE[1]},
        resample=2,
        image_mean=MEAN,
        image_std=STD,
    )
    processor.save_pretrained(folder)
    return folder


def test_a_folder_of_transformers_is_read_as_it_says(transformers_folder: Path) -> None:
    ours = hiera_core.create_model(str(transformers_folder)).eval()
    assert ours.config["input_size"] == SIZE
    transform = transform_for(ours)
    expected = ImageTransform(SIZE, 70, tuple(MEAN), tuple(STD), "bilinear")
    assert transform == expected
    assert ours.card["classes"] == CLASSES
    theirs = transformers.HieraForImageClassification.from_pretrained(transformers_folder).eval()
    x = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(ours.forward_logits(x), theirs(x).logits)


def test_all_files_of_the_same_weights_give_the_same_probabilities(
    transformers_folder: Path, tmp_path: Path, pictures: Path, hiera: Command
) -> None:
    """transformers' folder, timm's folder, Lightning's and a compiled DDP model's checkpoint."""
    photo = tmp_path / "photo.png"
    Image.open(pictures / "chelsea.png").save(photo)
    model = hiera_core.create_model(str(transformers_folder))
    state, card = model.state_dict(), model.card

    _write_timm_folder(tmp_path / "timm", model)
    for name, prefix in (("lightning", "model."), ("ddp", "module._orig_mod.")):
        folder = tmp_path / name
        folder.mkdir()
        wrapped = {prefix + key: tensor for key, tensor in state.items()}
        torch.save({"state_dict": wrapped, "epoch": 3}, folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(model.config))
        (folder / "hiera.json").write_text(json.dumps(card))

    folders = [transformers_folder, *(tmp_path / name for name in ("timm", "lightning", "ddp"))]
    results = []
    for folder in folders:
        code, out, err = hiera("predict", photo, "-m", folder, "-f", "jsonl", "--dtype", "fp32")
        assert code == 0, err
        results.append({top["label"]: top["prob"] for top in json.loads(out)["topk"]})
    assert set(results[0]) == set(CLASSES)
    for found in results[1:]:
        assert found == pytest.approx(results[0], abs=1e-5)


def test_weights_alone_take_the_rest_from_the_model(
    transformers_folder: Path, tmp_path: Path, pictures: Path, hiera: Command
) -> None:
    """`-m FOLDER --checkpoint FILE`: size, depth, mean and std are the folder's, and the weights
    are those of a trainer's file, which has nothing else."""
    state = hiera_core.create_model(str(transformers_folder)).state_dict()
    described = tmp_path / "described"  # as cloned without the large files
    described.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (described / name).write_bytes((transformers_folder / name).read_bytes())
    for name, prefix in (("last.ckpt", "model."), ("ddp.pth", "module._orig_mod.")):
        torch.save({"state_dict": {prefix + k: t for k, t in state.items()}}, tmp_path / name)
    choices: list[tuple[Any, ...]] = [("-m", transformers_folder)]
    for folder in (transformers_folder, described):
        choices += [("-m", folder, "--checkpoint", tmp_path / n) for n in ("last.ckpt", "ddp.pth")]
    results = []
    for choice in choices:
        photo = pictures / "chelsea.png"
        code, out, err = hiera("predict", photo, *choice, "-f", "jsonl", "--dtype", "fp32")
        assert code == 0, err
        results.append({top["label"]: top["prob"] for top in json.loads(out)["topk"]})
    assert set(results[0]) == set(CLASSES)
    for found in results[1:]:
        assert found == pytest.approx(results[0], abs=1e-5)
    code, _, err = hiera("predict", photo, "-m", tmp_path / "last.ckpt")
    assert code == 3 and "name its architecture with --model" in err


def _write_timm_folder(folder: Path, model: Any) -> None:
    """Write the weights in the folder that timm's own `save_for_hf` writes."""
    from timm.models import save_for_hf

    config = model.config
    arguments = {
        "img_size": config["input_size"],
        **{
            name: config[name]
            for name in ("embed_dim", "num_heads", "stages", "head_mul", "mlp_ratio")
        },
    }
    theirs = timm.create_model("hiera_base_224", num_classes=len(CLASSES), **arguments)
    names = {"norm.": "head.norm.", "head.projection.": "head.fc."}
    renamed = {}
    for name, tensor in model.state_dict().items():
        for ours, other in names.items():
            if name.startswith(ours):
                name = other + name.removeprefix(ours)
        renamed[name] = tensor
    theirs.load_state_dict(renamed)
    theirs.pretrained_cfg.update(
        mean=tuple(MEAN),
        std=tuple(STD),
        input_size=(3, *config["input_size"]),
        interpolation="bilinear",
        crop_pct=64 / 70,
    )
    folder.mkdir()
    save_for_hf(theirs, folder, {"label_names": CLASSES}, model_args=arguments)


def test_what_transformers_computes_otherwise_is_refused(
    transformers_folder: Path, tmp_path: Path, hiera: Command
) -> None:
    changes = {
        "hidden_act": ("relu", "hidden_act = relu"),
        "layer_norm_eps": (1e-5, "layer_norm_eps = 1e-05"),
        "num_heads": ([2, 4, 4, 16], "num_heads = [2, 4, 4, 16]"),
        "depths": (None, ""),  # then it has the default's depths, which the weights do not fit
        "id2label": ([1], "id2label"),
        "image_size": ("big", "config.json"),
    }
    for name, (value, reason) in changes.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(transformers_folder / "model.safetensors")
        config = json.loads((transformers_folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, name: value}))
        code, _, err = hiera("predict", "x.jpg", "-m", folder)
        assert code == 3 and err.count("\n") == 1 and reason in err, (name, err)


def test_an_embedding_that_fits_two_sizes_is_refused(tmp_path: Path) -> None:
    model = draw_weights(hiera_core.create_model("hiera_tiny_224", input_size=(256, 256)))
    path = tmp_path / "square.pth"
    torch.save(model.state_dict(), path)
    with pytest.raises(hiera_core.errors.CheckpointError, match="256x256 or 128x512"):
        hiera_core.create_model("hiera_tiny_224", checkpoint=path, input_size=(128, 512))
    wide = hiera_core.create_model("hiera_tiny_224", checkpoint=path, input_size=(128, 384))
    assert wide.config["input_size"] == (128, 384)
    same = hiera_core.create_model("hiera_tiny_224", checkpoint=path, input_size=(256, 256))
    assert torch.equal(same.pos_embed, model.pos_embed)
    model.save_pretrained(tmp_path / "folder")  # its config.json says what it was made for
    from_folder = hiera_core.create_model(str(tmp_path / "folder"), input_size=(128, 512))
    assert not torch.equal(from_folder.pos_embed, model.pos_embed)


def test_conversions_carry_the_preprocessing_on(
    transformers_folder: Path, tmp_path: Path, hiera: Command
) -> None:
    code, _, err = hiera("convert", transformers_folder, tmp_path / "hub", "--to", "hub")
    assert code == 0, err
    card = json.loads((tmp_path / "hub" / "hiera.json").read_text())
    assert card["preprocessing"]["mean"] == MEAN and card["classes"] == CLASSES
    assert transform_for(hiera_core.create_model(str(tmp_path / "hub"))) == transform_for(
        hiera_core.create_model(str(transformers_folder))
    )


TIMM = {"architecture": "hiera_tiny_224"}


@pytest.mark.parametrize(
    ("config", "processor"),
    [
        ({"model_type": "hiera", "num_heads": [0, 0, 0, 0]}, {}),
        ({"model_type": "hiera"}, {"image_mean": [0.5], "image_std": [0.5], "rescale_factor": 0}),
        ({**TIMM, "pretrained_cfg": {"input_size": [3, 224, 224], "crop_pct": 1e-320}}, {}),
        ({**TIMM, "label_names": {"5000000": "x"}}, {}),
        ({"model_type": "hiera", "id2label": {"5000000": "x"}}, {}),
        ({**TIMM, "model_args": {"norm_layer": "rmsnorm"}}, {}),
    ],
    ids=["heads", "rescale", "crop_pct", "label_names", "id2label", "norm"],
)
def test_odd_values_are_refused(config: dict[str, Any], processor: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"SOURCE: .*config\.json"):
        read_config(config, processor, "SOURCE")


def test_gaps_between_class_numbers_are_filled() -> None:
    for config in (
        {**TIMM, "label_names": {"1": "a", "3": "b"}},
        {"model_type": "hiera", "id2label": {"1": "a", "3": "b"}},
    ):
        assert read_config(config, None, "x")[1]["classes"] == ["0", "a", "2", "b"]


@pytest.mark.parametrize(
    ("config", "processor", "message"),
    [
        (
            {**TIMM, "pretrained_cfg": {"crop_mode": "squash", "crop_pct": 0.9}},
            {},
            "crop_mode = squash",
        ),
        ({"model_type": "hiera"}, {"do_resize": False}, "do_resize = false"),
        ({"model_type": "hiera"}, {"size": {"height": 64, "width": 96}}, "aspect ratio"),
        ({"model_type": "hiera"}, {"size": {"shortest_edge": 64}}, ""),
        ({**TIMM, "pretrained_cfg": {"crop_mode": "center"}}, {}, ""),
    ],
)
def test_other_preprocessing_is_reported(
    config: dict[str, Any],
    processor: dict[str, Any],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    read_config(config, processor, "x")
    assert message in caplog.text and bool(message) == bool(caplog.text)


# Every class of transformers that holds a Hiera, as it and its users save them.
CLASSES_OF_TRANSFORMERS = {
    "model": transformers.HieraModel,
    "model without pooler": lambda config: transformers.HieraModel(config, add_pooling_layer=False),
    "classifier": transformers.HieraForImageClassification,
    "autoencoder": transformers.HieraForPreTraining,
    "backbone": transformers.HieraBackbone,
}
SPELLINGS = ("as saved", "no architectures", "no type", "no prefix", "prefix", "in a detector")


@pytest.mark.parametrize("kind", CLASSES_OF_TRANSFORMERS)
def test_folders_of_all_classes_of_transformers(
    kind: str, tmp_path: Path, pictures: Path, hiera: Command
) -> None:
    """Their maps and embeddings equal those of transformers' HieraModel with the same weights."""
    config = transformers.HieraConfig(
        embed_dim=16, depths=[1, 2, 1, 1], num_heads=[2, 4, 8, 16], image_size=[64, 64],
        decoder_hidden_size=16, decoder_depth=1, decoder_num_heads=2,
        out_features=["stem", "stage2", "stage4"],
    )  # fmt: skip
    model: Any = draw_weights(CLASSES_OF_TRANSFORMERS[kind](config)).eval()
    model.save_pretrained(tmp_path / "saved")
    state, facts = model.state_dict(), json.loads((tmp_path / "saved/config.json").read_text())
    reference = transformers.HieraModel(config).eval()
    plain = {name.removeprefix("hiera."): tensor for name, tensor in state.items()}
    reference.load_state_dict({"pooler.layernorm.bias": torch.zeros(128), **plain}, strict=False)
    for spelling in SPELLINGS:
        folder = tmp_path / spelling
        folder.mkdir()
        lost = {"no architectures": ("architectures",), "no type": ("architectures", "model_type")}
        described = {k: v for k, v in facts.items() if k not in lost.get(spelling, ())}
        if spelling == "in a detector":
            described = {"model_type": "mask2former", "backbone_config": described}
        (folder / "config.json").write_text(json.dumps(described))
        named = {"no prefix": plain, "prefix": {f"hiera.{k}": v for k, v in plain.items()}}
        named["in a detector"] = {f"model.encoder.{k}": v for k, v in state.items()} | {
            "class_predictor.weight": torch.ones(1)
        }
        save_file(named.get(spelling, state), folder / "model.safetensors")
        code, _, err = hiera(
            "features", pictures / "chelsea.png", "-m", folder, "--return-intermediates",
            "--dtype", "fp32", "-o", folder / "out.npz",
        )  # fmt: skip
        assert code == 0, err
        assert ("hidden_states_norms.* not used" in err) == (kind == "backbone")
        with np.load(folder / "out.npz") as found, torch.no_grad():
            ours: Any = hiera_core.create_model(str(folder)).eval()
            x = ours.transform(pictures / "chelsea.png")
            expected = reference(x, output_hidden_states=True)
            for stage, state_map in enumerate(expected.reshaped_hidden_states[1:], start=1):
                assert_close(torch.from_numpy(found[f"stage{stage}"]), state_map)
            embedding = ours.embedding(ours.encode(x, collect=True)[1])
            if kind != "autoencoder":  # which embeds by its fusion of all stages
                assert_close(embedding, expected.pooler_output)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_that_windows_has_saved(
    transformers_folder: Path, tmp_path: Path, encoding: str
) -> None:
    """Notepad and PowerShell put a byte order mark before it."""
    for path in transformers_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text = (tmp_path / "config.json").read_text("utf-8")
    (tmp_path / "config.json").write_text(text, encoding)
    assert hiera_core.create_model(str(tmp_path)).card["classes"] == CLASSES
