"""Tests of programs: what they take and return, and that they run without this package."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hiera_core
from hiera_core import zoo
from hiera_core.compiling import aot_package
from hiera_core.conversion import graph_layout, plan, program, verify
from hiera_core.conversion.converter import convert
from hiera_core.errors import DeviceError, UsageError
from hiera_core.models.cpu import HAS_ONEDNN
from hiera_core.models.encoder import Encoder
from hiera_core.weights.load import read_checkpoint

from .conftest import SMALL, assert_close, draw_weights

Command = Callable[..., tuple[int, str, str]]
ProgramOf = Callable[[str, str, str], Path]

DECODER: Any = {"q_pool": 2, "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
IMAGE: Any = {**SMALL, "stages": (1, 1, 1, 1)}
VIDEO: Any = {**zoo.get("hiera_base_16x224").config, **IMAGE, "input_size": (8, 64, 64)}
SAM2: Any = {
    "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 2, 1), "global_att_blocks": (3,),
}  # fmt: skip
FAMILIES: dict[str, tuple[type[Encoder], dict[str, Any]]] = {
    "image": (hiera_core.Hiera, IMAGE),
    "headless": (hiera_core.Hiera, {**IMAGE, "num_classes": 0}),
    "video": (hiera_core.Hiera, VIDEO),
    "mae": (hiera_core.MaskedAutoencoderHiera, {**IMAGE, **DECODER, "input_size": (96, 64)}),
    "mae_video": (hiera_core.MaskedAutoencoderHiera, {**VIDEO, **DECODER}),
    "sam2": (hiera_core.HieraDet, {**SAM2, "input_size": (224, 224)}),
    "sam2_padded": (hiera_core.HieraDet, {**SAM2, "input_size": (250, 254)}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder for each family, with drawn weights."""
    root = tmp_path_factory.mktemp("families")
    for seed, (name, (cls, arguments)) in enumerate(FAMILIES.items()):
        model = draw_weights(cls(**arguments), seed)
        model.card = {"model": f"my_{name}", "licence": "MIT", "source": "training"}
        model.save_pretrained(root / name)
    return {name: root / name for name in FAMILIES}


@pytest.fixture(scope="module")
def program_of(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> ProgramOf:
    """Return a function that converts a model to a program, once in this file."""
    root = tmp_path_factory.mktemp("programs")

    def make(name: str, to: str, returns: str) -> Path:
        path = root / f"{name}.{returns}.{to}"
        if not path.exists():
            done = convert(folders[name], path, to, returns=returns.split(","))
            assert done.proof.max_difference is not None and done.proof.max_difference < 1e-4
        return path

    return make


def load(folder: Path) -> Any:
    return FAMILIES[folder.name][0].from_pretrained(folder).eval()


def batch_for(model: Any, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, *model.config["input_size"], generator=generator)


def run_onnx(path: Path, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run an ONNX program with the names that its metadata lists."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = {
        key: json.loads(session.get_modelmeta().custom_metadata_map[key])
        for key in ("inputs", "outputs")
    }
    assert names["inputs"] == [one.name for one in session.get_inputs()]
    assert names["outputs"] == [one.name for one in session.get_outputs()]
    given = {n: x.numpy() for n, x in zip(names["inputs"], inputs, strict=True)}
    found = session.run(None, given)
    return {n: torch.from_numpy(x) for n, x in zip(names["outputs"], found, strict=True)}


def maps_of(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    _, ends = model.encode(x, collect=True)
    found: list[torch.Tensor] = model.stage_maps(ends)
    return found


# What programs return -----------------------------------------------------------------------------


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [*map(slow, ["image", "video", "mae", "sam2", "sam2_padded"])])
@torch.no_grad()
def test_onnx_programs_return_the_maps_and_the_embedding(
    name: str, folders: dict[str, Path], program_of: ProgramOf
) -> None:
    model = load(folders[name])
    path = program_of(name, "onnx", "maps,embedding")
    for count in (1, 3):
        x = batch_for(model, count)
        found = run_onnx(path, x)
        expected = maps_of(model, x)
        assert [*found] == [*(f"stage{i + 1}" for i in range(len(expected))), "embedding"]
        for number, one in enumerate(expected, 1):
            assert_close(found[f"stage{number}"], one, 1e-4)
        _, ends = model.encode(x, collect=True)
        assert_close(found["embedding"], model.embedding(ends), 1e-4)


@torch.no_grad()
def test_several_outputs_are_a_dictionary(folders: dict[str, Path], program_of: ProgramOf) -> None:
    model = load(folders["image"])
    x = batch_for(model)
    path = program_of("image", "pt2", "probabilities,logits,maps")
    found = torch.export.load(path).module()(x)
    assert_close(found["probabilities"], model(x))
    assert_close(found["logits"], model.forward_logits(x))
    assert [*found][2:] == [f"stage{i}" for i in range(1, 5)]


@pytest.mark.parametrize(
    ("name", "default"),
    [("image", "logits"), ("headless", "embedding"), ("mae", "reconstruction"), ("sam2", "maps")],
)
def test_what_a_model_is_for_is_returned_by_default(
    name: str, default: str, folders: dict[str, Path]
) -> None:
    made = plan.make_plan(read_checkpoint(folders[name]))
    assert program.check_outputs(made, ()) == (default,)


@pytest.mark.parametrize(
    ("name", "to"),
    [("mae", "pt2"), slow("mae_video", "pt2"), slow("mae", "onnx"), slow("mae_video", "onnx")],
)
@torch.no_grad()
def test_autoencoders_reconstruct_from_the_units_that_they_are_given(
    name: str, to: str, folders: dict[str, Path], program_of: ProgramOf
) -> None:
    """Any number of units may be visible, and other ones in each input."""
    model = load(folders[name])
    path = program_of(name, to, "reconstruction")
    loaded = None if to == "onnx" else torch.export.load(path).module()
    units = model.layout.windows
    for visible, count in ((1, 3), (units // 2, 2), (units - 1, 1)):
        x = batch_for(model, count)
        keep = torch.stack([torch.randperm(units)[:visible] for _ in range(count)])
        found = run_onnx(path, x, keep) if loaded is None else loaded(x, keep)
        assert [*found] == ["reconstruction", "predictions", "mask"]
        expected = hiera_core.reconstruct(model, x, keep_ids=keep)
        mask = expected.mask.view(count, *model.layout.unit_grid)
        assert torch.equal(found["mask"], mask)
        pixels = hiera_core.transform_for(model).denormalise(found["reconstruction"])
        assert_close(pixels, expected.reconstruction, 1e-4)
        assert_close(found["predictions"], model.decode_all(x, keep_ids=keep), 1e-4)


def test_what_a_model_does_not_have_is_refused(
    folders: dict[str, Path], tmp_path: Path, hiera: Command
) -> None:
    for name, returns, message in (
        ("image", "reconstruction", "my_image has no reconstruction"),
        ("headless", "logits", "my_headless has no logits"),
        ("mae", "probabilities", "my_mae has no probabilities"),
        ("sam2", "logits", "my_sam2 has no logits"),
        ("mae", "reconstruction,maps", "uses a masked input"),
        ("image", "logit", "did you mean logits"),
        ("image", "", "names no output"),
    ):
        code, _, err = hiera(
            "convert", folders[name], tmp_path / "m.pt2", "--to", "pt2", "--returns", returns
        )
        assert code == 2 and message in err, err
    for arguments, message in (
        (["m.pth", "--to", "pth", "--returns", "maps"], "pth stores weights"),
        (["m.pt2", "--to", "pt2", "--batch-size", "2"], "pt2 has no fixed batch size"),
        (["m.pt2", "--to", "aoti", "--batch-size", "0"], "batch size 0"),
        (["m.pt2", "--to", "aoti", "--batch-size", "100000000"], "use at most 16383"),
    ):
        code, _, err = hiera("convert", folders["image"], tmp_path / arguments[0], *arguments[1:])
        assert code == 2 and message in err, err
    assert not [*tmp_path.iterdir()]


def test_sizes_that_are_too_small_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"16x16 is too small; give at least 29x29"):
        convert(folders["sam2"], tmp_path / "m.onnx", "onnx", size=16)
    with pytest.raises(UsageError, match="32x32 has one mask unit"):
        convert(folders["mae"], tmp_path / "m.onnx", "onnx", size=32)


def test_memory_that_runs_out_is_an_error_of_the_device(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(DeviceError, match="memory ran out"):
        convert(folders["image"], tmp_path / "m.pt2", "pt2")
    assert not [*tmp_path.iterdir()]


def test_a_program_that_answers_otherwise_is_removed(
    folders: dict[str, Path], tmp_path: Path, hiera: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of four maps is wrong, which only a comparison by name finds."""
    right = program.Program._encode

    def wrong(self: program.Program, x: torch.Tensor) -> dict[str, torch.Tensor]:
        found = right(self, x)
        if torch.compiler.is_exporting():
            found["stage2"] = found["stage2"] * 1.01
        return found

    monkeypatch.setattr(program.Program, "_encode", wrong)
    code, _, err = hiera(
        "convert", folders["image"], tmp_path / "m.pt2", "--to", "pt2", "--returns", "maps"
    )
    assert code == 3 and "stage2 differs" in err and not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_dimensions_of_onnx_programs_have_names(program_of: ProgramOf) -> None:
    import onnx

    graph = onnx.load(program_of("mae", "onnx", "reconstruction")).graph
    dims = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert dims["image"] == ["batch", 3, 96, 64] and dims["keep"] == ["batch", "visible"]
    assert dims["reconstruction"] == ["batch", 3, 96, 64]
    shapes = [dim for one in graph.value_info for dim in one.type.tensor_type.shape.dim]
    assert not [dim for dim in shapes if re.search(r"\bs\d+\b", dim.dim_param)]


# Graphs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "to", "returns"),
    [
        ("image", "pt2", "probabilities,logits,maps"),
        ("mae", "pt2", "reconstruction"),
        slow("mae_video", "pt2", "reconstruction"),
        slow("sam2_padded", "onnx", "maps,embedding"),
        slow("video", "onnx", "maps,embedding"),
        slow("video", "pt2", "logits,maps"),
        slow("mae", "onnx", "maps,embedding"),
        slow("mae", "onnx", "reconstruction"),
        slow("mae_video", "onnx", "reconstruction"),
        slow("sam2", "onnx", "maps,embedding"),
    ],
)
def test_no_tensor_of_a_graph_has_more_than_8_dimensions(
    name: str, to: str, returns: str, program_of: ProgramOf
) -> None:
    """TensorRT and CUDA runtimes stop there. Constants and views count, too."""
    ranks = RANKS[to](program_of(name, to, returns))
    assert len(ranks) > 50 and max(ranks) <= 8


def ranks_of_pt2(path: Path) -> list[int]:
    values = [node.meta.get("val") for node in torch.export.load(path).graph.nodes]
    flat = itertools.chain.from_iterable(
        value if isinstance(value, list | tuple) else [value] for value in values
    )
    return [value.dim() for value in flat if isinstance(value, torch.Tensor)]


def ranks_of_onnx(path: Path) -> list[int]:
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    shaped = [*graph.value_info, *graph.input, *graph.output]
    ranks = [len(value.type.tensor_type.shape.dim) for value in shaped]
    ranks += [len(tensor.dims) for tensor in graph.initializer]
    attributes = [a for node in graph.node if node.op_type == "Transpose" for a in node.attribute]
    return ranks + [len(attribute.ints) for attribute in attributes]


RANKS = {"pt2": ranks_of_pt2, "onnx": ranks_of_onnx}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_models_prepared_for_export_compute_the_same(name: str, folders: dict[str, Path]) -> None:
    model, prepared = load(folders[name]), load(folders[name])
    graph_layout.prepare_for_export(prepared, tuple(model.config["input_size"]))
    x = batch_for(model)
    for one, other in zip(maps_of(model, x), maps_of(prepared, x), strict=True):
        assert torch.equal(one, other)
    if "mae" in name:
        keep = torch.stack([torch.randperm(model.layout.windows)[:2] for _ in range(2)])
        for one, other in zip(model(x, keep_ids=keep), prepared(x, keep_ids=keep), strict=True):
            assert torch.equal(one, other)


# AOTInductor --------------------------------------------------------------------------------------

RUN_PACKAGE = """
import sys, time
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hiera_core", "hiera_cli", "hiera"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch
x = torch.load(sys.argv[2], weights_only=True)
start = time.perf_counter()
package = torch._inductor.aoti_load_package(sys.argv[1])
found = package(x)
seconds = time.perf_counter() - start
try:
    package(x[:1])
    refusal = ""
except RuntimeError as error:
    refusal = str(error)
torch.save((found, package.get_metadata(), seconds, refusal), sys.argv[2])
assert not [name for name in sys.modules if name.startswith("hiera")]
"""


def run_package(path: Path, x: torch.Tensor) -> Any:
    """Run a package in a process that cannot import this package, in a folder of its own."""
    torch.save(x, path.parent / "x")
    packages = [p for p in sys.path if "site-packages" in p]
    code = f"import site, sys; sys.path += {packages!r}; code = sys.argv.pop(1); exec(code)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, RUN_PACKAGE, path, path.parent / "x"],
        capture_output=True,
        text=True,
        cwd=path.parent,
        env={"PATH": "", "AOTI_RUNTIME_CHECK_INPUTS": "1"},  # and without a compiler
    )
    assert done.returncode == 0, done.stderr
    return torch.load(path.parent / "x", weights_only=True)


@torch.no_grad()
def test_a_package_runs_without_this_package_and_without_a_compiler(
    tmp_path: Path, hiera: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(aot_package.OPTIONS, "aot_inductor.compile_wrapper_opt_level", "O0")
    model = hiera_core.Hiera(**{**SMALL, "stages": (1,), "q_pool": 0, "mask_unit_size": (1, 1)})
    draw_weights(model).eval().save_pretrained(tmp_path / "source")
    code, out, err = hiera(
        "convert", tmp_path / "source", tmp_path / "m.pt2", "--to", "aoti", "--batch-size", "2",
    )  # fmt: skip
    assert code == 0, err
    assert "AOTI_RUNTIME_CHECK_INPUTS=1" in json.loads(out)["notes"][0]
    proof = json.loads(out)["proof"]
    assert proof["max_difference"] < 1e-4 and proof["agree"] == proof["inputs"] == 8
    assert {p.name for p in tmp_path.iterdir()} == {"m.pt2", "source"}
    x = batch_for(model)
    found, metadata, _, refusal = run_package(tmp_path / "m.pt2", x)
    assert_close(found, model.forward_logits(x), 1e-4)
    assert json.loads(metadata["input_shapes"]) == [[2, 3, 64, 64]]
    assert metadata["batch_size"] == "2" and json.loads(metadata["outputs"]) == ["logits"]
    assert refusal, "with AOTI_RUNTIME_CHECK_INPUTS=1, a package refuses another batch size"


@pytest.mark.skipif(not HAS_ONEDNN, reason="this PyTorch has no oneDNN")
@torch.no_grad()
def test_linear_layers_of_a_package_have_packed_weights(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN would otherwise reorder them in each call. And the sum of a block, and the GELU of an
    MLP, are computed in the same pass as the product before them."""
    monkeypatch.setitem(aot_package.OPTIONS, "aot_inductor.compile_wrapper_opt_level", "O0")
    convert(folders["image"], tmp_path / "m.pt2", "aoti")
    with zipfile.ZipFile(tmp_path / "m.pt2") as package:
        (wrapper,) = (name for name in package.namelist() if name.endswith(".wrapper.cpp"))
        code = package.read(wrapper).decode()
    calls = Counter(re.findall(r"aoti_torch_cpu_(\w*(?:linear|mm)\w*)\(", code))
    model = load(folders["image"])
    layers = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert set(calls) == {"_linear_pointwise", "_linear_pointwise_binary"}
    assert sum(calls.values()) == layers and calls["_linear_pointwise_binary"] >= len(model.blocks)
    assert code.count('"gelu"') == len(model.blocks)
    packed = re.findall(r"aoti_torch_cpu__linear_pointwise\w*\(.*?_frozen_param\d+,", code)
    assert len(packed) == layers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["video", "mae", "mae_video", "sam2_padded"])
@torch.no_grad()
def test_packages_of_every_family(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    done = convert(folders[name], tmp_path / "m.pt2", "aoti")
    assert done.proof.max_difference is not None and done.proof.max_difference < 1e-4


def test_a_missing_compiler_is_named_before_the_model_is_exported(
    folders: dict[str, Path], tmp_path: Path, hiera: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import cpp_builder, exc

    def find_none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", find_none)
    code, _, err = hiera("convert", folders["image"], tmp_path / "m.pt2", "--to", "aoti")
    assert code == 2 and "aoti needs a C++ compiler" in err and "g++" in err
    assert not [*tmp_path.iterdir()]


def test_a_compiler_that_fails_leaves_no_file(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import exc

    def fail(*_: object, **__: object) -> None:
        raise exc.CppCompileError(["g++"], "no space")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(DeviceError, match="AOTInductor cannot compile"):
        convert(folders["image"], tmp_path / "m.pt2", "aoti")
    assert not [*tmp_path.iterdir()]


# Full-size models ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hiera_base_224", "hiera_base_16x224", "sam2_hiera_tiny"])
@torch.no_grad()
def test_maps_of_full_size_models(name: str, tmp_path: Path) -> None:
    """onnxruntime returns the maps of this package within 1e-4."""
    model = draw_weights(hiera_core.create_model(name)).eval()
    model.save_pretrained(tmp_path / "source")
    done = convert(tmp_path / "source", tmp_path / "m.onnx", "onnx", returns=["maps"])
    assert done.proof.max_difference is not None and done.proof.max_difference < 1e-4
    assert verify.TOLERANCE["fp32"] == 1e-4


def test_names_of_outputs_are_checked_in_python(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown output 'map'"):
        convert(folders["image"], tmp_path / "m.onnx", "onnx", returns=["map"])
