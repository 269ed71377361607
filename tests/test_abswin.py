"""Tests of timm's absolute-window models: layer scale, and widening without a projection."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import hiera_core
from hiera_core import zoo
from hiera_core.errors import CheckpointError, ConfigError, UsageError
from hiera_core.weights import key_mapping

from .conftest import SMALL, assert_close, draw_weights

Command = Callable[..., tuple[int, str, str]]

# Narrow versions of both models, and the same arguments by timm's names.
NARROW = {
    "hiera_small_abswin_256": {"embed_dim": 16, "stages": (1, 1, 2, 1), "num_classes": 10},
    "hiera_base_abswin_256": {"embed_dim": 16, "stages": (1, 2, 2, 1), "num_classes": 10},
}
SAMPLE = zoo.ASSETS / "samples" / "cat.jpg"


@torch.no_grad()
def draw_scaled_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Draw weights and layer scales that affect the output."""
    draw_weights(model)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.add_(0.5)
    return model.eval()


def build_theirs(name: str, size: int = 64) -> torch.nn.Module:
    import timm

    return draw_scaled_weights(timm.create_model(name, img_size=size, **NARROW[name]))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder of ours for each model, for inputs of 64x64."""
    found = {}
    for name, arguments in NARROW.items():
        model = hiera_core.create_model(name, input_size=(64, 64), **arguments)  # type: ignore[call-overload]
        found[name] = tmp_path_factory.mktemp(name)
        draw_scaled_weights(model).save_pretrained(found[name])
    return found


@pytest.mark.parametrize("name", NARROW)
@torch.no_grad()
def test_both_models_equal_those_of_timm(name: str) -> None:
    for size in (64, 96):
        theirs = build_theirs(name, size)
        ours = hiera_core.create_model(name, input_size=(size, size), **NARROW[name]).eval()  # type: ignore[call-overload]
        state, naming = key_mapping.to_reference(theirs.state_dict())
        assert naming == "timm"
        ours.load_state_dict(state, strict=True)
        x = torch.randn(2, 3, size, size)
        assert_close(ours.forward_logits(x), theirs(x))
        maps = ours.forward_features(x, return_intermediates=True)[1]
        expected = theirs.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
        for ours_of_stage, theirs_of_stage in zip(maps, expected, strict=True):
            assert_close(ours_of_stage, theirs_of_stage)
        theirs.load_state_dict(key_mapping.from_reference(ours.state_dict(), "timm"), strict=True)


def compare_at_call_time(name: str, sizes: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Compare a model that is called at several sizes with timm's models that are built for them.

    No parameter of such a model depends on the size, so timm's takes our weights as they are.
    """
    import timm

    size = sizes[0]
    ours = hiera_core.create_model(name, input_size=(size, size), **arguments).eval()
    draw_scaled_weights(ours)
    state = key_mapping.from_reference(ours.state_dict(), "timm")
    for size in sizes:
        theirs = timm.create_model(name, img_size=size, **arguments).eval()
        theirs.load_state_dict(state, strict=True)
        x = torch.randn(1, 3, size, size)
        assert_close(ours.forward_logits(x), theirs(x))


@pytest.mark.parametrize("name", NARROW)
@torch.no_grad()
def test_sizes_at_call_time_equal_those_of_timm(name: str) -> None:
    compare_at_call_time(name, (64, 96), NARROW[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", NARROW)
@torch.no_grad()
def test_full_models_at_call_time_equal_those_of_timm(name: str) -> None:
    compare_at_call_time(name, (256, 320), {})


@pytest.mark.parametrize("name", NARROW)
def test_gradients_equal_those_of_timm(name: str) -> None:
    theirs = build_theirs(name)
    ours = hiera_core.create_model(name, input_size=(64, 64), **NARROW[name])  # type: ignore[call-overload]
    ours.load_state_dict(key_mapping.to_reference(theirs.state_dict())[0], strict=True)
    x = torch.randn(2, 3, 64, 64)
    ours.eval().forward_logits(x).square().sum().backward()
    theirs(x).square().sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    expected, _ = key_mapping.to_reference(gradients)
    for key, parameter in ours.named_parameters():
        assert_close(parameter.grad, expected[key])


@pytest.mark.parametrize("name", NARROW)
def test_full_size_models_have_the_parameters_of_timm(name: str, tmp_path: Path) -> None:
    """A file without its config.json is recognised by its names and shapes."""
    import timm

    with torch.device("meta"):
        theirs = timm.create_model(name).state_dict()
        ours = hiera_core.create_model(name).state_dict()
    renamed, _ = key_mapping.to_reference(theirs)
    assert {n: t.shape for n, t in renamed.items()} == {n: t.shape for n, t in ours.items()}
    state = {n: torch.zeros(t.shape, dtype=torch.bfloat16) for n, t in theirs.items()}
    save_file(state, tmp_path / "model.pth")
    built = hiera_core.create_model(str(tmp_path / "model.pth"))
    assert built.card["model"] == name and built.config == hiera_core.create_model(name).config
    with pytest.raises(CheckpointError, match=f"use --model {name}"):
        hiera_core.create_model("hiera_base_224", checkpoint=tmp_path / "model.pth")


def test_without_released_weights_the_error_says_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"no weights of .* released; give"):
        hiera_core.create_model("hiera_base_abswin_256", pretrained=True)
    assert zoo.get("hiera_base_abswin_256").default is None
    assert zoo.get("hiera_small_abswin_256").default == "sbb2_e200_in12k_ft_in1k"


def test_licences_say_whether_commercial_use_is_allowed() -> None:
    assert zoo.get("hiera_small_abswin_256").commercial_use
    assert zoo.get("hiera_nano_32").commercial_use
    assert not zoo.get("hiera_base_224").commercial_use


def test_values_of_both_arguments_are_checked() -> None:
    for value in ("1", float("nan"), float("inf"), (1,)):
        with pytest.raises(ConfigError, match="init_values is"):
            hiera_core.Hiera(**{**SMALL, "init_values": value})
    with pytest.raises(ConfigError, match=r"use dim_mul = 2"):
        hiera_core.Hiera(**{**SMALL, "use_expand_proj": False, "dim_mul": 3.0})


def test_config_json_has_these_arguments_only_if_they_are_used() -> None:
    plain = hiera_core.Hiera(**SMALL).config
    assert "init_values" not in plain and "use_expand_proj" not in plain
    model = hiera_core.Hiera(**{**SMALL, "init_values": 0.1, "use_expand_proj": False})
    assert (model.config["init_values"], model.config["use_expand_proj"]) == (0.1, False)


def test_autoencoders_take_both_arguments() -> None:
    config = {**SMALL, "init_values": 0.1, "use_expand_proj": False, "decoder_depth": 1}
    del config["num_classes"]
    model = hiera_core.MaskedAutoencoderHiera(**{**config, "q_pool": 2})
    loss = model(torch.randn(2, 3, 64, 64))[0]
    loss.backward()
    assert loss.isfinite() and model.blocks[0].ls1.gamma.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NARROW)
def test_predict_and_features_take_them(
    name: str, files: dict[str, Path], hiera: Command, tmp_path: Path
) -> None:
    code, out, err = hiera("predict", SAMPLE, "-m", files[name], "-f", "json")
    assert code == 0, err
    assert json.loads(out)[0]["status"] == "ok"
    out_file = tmp_path / "f.safetensors"
    code, _, err = hiera("features", SAMPLE, "-m", files[name], "-o", out_file)
    assert code == 0, err


@pytest.mark.parametrize("name", NARROW)
@torch.no_grad()
def test_timm_loads_a_converted_folder(
    name: str, files: dict[str, Path], hiera: Command, tmp_path: Path
) -> None:
    import timm

    dest = tmp_path / "timm"
    code, out, err = hiera("convert", files[name], dest, "--to", "timm", "--verify", "forward")
    assert code == 0, err
    proof = json.loads(out)["proof"]
    assert proof["reader"].startswith("timm") and proof["max_difference"] < 1e-4
    config = json.loads((dest / "config.json").read_text())
    assert config["architecture"] == name and config["model_args"]["init_values"] == 1e-5
    ours = hiera_core.create_model(str(files[name])).eval()
    theirs = timm.create_model(f"local-dir:{dest}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert_close(theirs(x), ours.forward_logits(x))
    back = hiera_core.create_model(str(dest))
    assert back.config == ours.config
    assert all(torch.equal(back.state_dict()[n], t) for n, t in ours.state_dict().items())


@torch.no_grad()
def test_the_reference_loads_folded_layer_scales(
    files: dict[str, Path], hiera: Command, tmp_path: Path
) -> None:
    import hiera as reference

    source = files["hiera_base_abswin_256"]
    code, out, err = hiera(
        "convert", source, tmp_path / "hub", "--to", "hub", "--verify", "forward"
    )
    assert code == 0, err
    assert any("layer scale" in note for note in json.loads(out)["notes"])
    assert not any("gamma" in n for n in load_file(tmp_path / "hub" / "model.safetensors"))
    x = torch.randn(1, 3, 64, 64)
    theirs = reference.Hiera.from_pretrained(tmp_path / "hub").eval()
    assert_close(theirs(x), hiera_core.create_model(str(source)).eval()(x))


@pytest.mark.parametrize("to", ["hub", "pth", "transformers"])
def test_other_formats_refuse_to_widen_without_a_projection(
    to: str, files: dict[str, Path], hiera: Command, tmp_path: Path
) -> None:
    source = files["hiera_small_abswin_256"]
    code, _, err = hiera("convert", source, tmp_path / "x", "--to", to)
    assert code == 2 and "widens without a projection" in err and "timm, onnx or pt2" in err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_programs_hold_them(
    to: str, files: dict[str, Path], hiera: Command, tmp_path: Path
) -> None:
    source = files["hiera_small_abswin_256"]
    code, out, err = hiera("convert", source, tmp_path / f"m.{to}", "--to", to)
    assert code == 0, err
    assert json.loads(out)["proof"]["max_difference"] < 1e-4


def test_training_starts_from_them(files: dict[str, Path], hiera: Command, tmp_path: Path) -> None:
    for number in range(8):
        folder = tmp_path / "data" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (number * 30, 0, 0)).save(folder / f"{number}.png")
    source = files["hiera_small_abswin_256"]
    config = ["embed_dim=16", "stages=[1,1,2,1]", "input_size=[64,64]", "num_classes=2"]
    settings = ["batch_size=4", "schedule.epochs=1", "schedule.warmup_epochs=0"]
    settings += [f"model.config.{argument}" for argument in config]
    command = ["train", "hiera_small_abswin_256", tmp_path / "data", "--init-from", source]
    options = [text for setting in settings for text in ("--set", setting)]
    code, _, err = hiera(*command, "-o", tmp_path / "run", *options)
    assert code == 0, err
    trained = hiera_core.create_model(str(tmp_path / "run"))
    assert trained.config["init_values"] == 1e-5 and not trained.config["use_expand_proj"]
