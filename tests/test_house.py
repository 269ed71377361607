"""Tests of the layers, of commands that must not import torch, and of the documents."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hiera_core
from hiera_core import zoo

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"

# Top to bottom: a file may import what stands below it, never what stands above or beside it.
FLOORS = [
    "__init__",
    "train",
    "evaluate",
    "convert",
    "benchmark",
    "predictor",
    "extractor",
    "reconstructor",
    "pipeline",
    "streaming",
    "store",
    "arrays",
    "annotate",
    "mirror",
    "classifier",
    "runner",
    "datasets",
    "builtin",
    "inputs",
    "records",
    "panels",
    "movies",
    "factory",
    "labels",
    "preprocess",
    "device",
    "backbone",
    "benchmarking",
    "mae",
    "model",
    "pretrained",
    "weights",
    "positions",
    "hub",
    "plots",
    "files",
    "dialects",
    "pieces",
    "attention",
    "layers",
    "kernels",
    "config",
    "tokens",
    "zoo",
    "errors",
    "version",
]


def _imports(path: Path, package: str) -> set[str]:
    """Return the top-level modules of `package` that a file imports, anywhere in it."""
    found = set()
    inside = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(inside[: len(inside) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        found |= {(n[1] if len(n) > 1 else "__init__") for n in names if n[0] == package}
    return found


def test_imports_point_down() -> None:
    files = list((ROOT / "hiera_core").rglob("*.py"))
    assert len(files) > 20
    for path in files:
        module = path.relative_to(ROOT / "hiera_core").parts[0].removesuffix(".py")
        assert module in FLOORS, f"give {module} its place in FLOORS"
        for imported in _imports(path, "hiera_core") - {module}:
            assert FLOORS.index(imported) > FLOORS.index(module), f"{module} imports {imported}"
        assert not _imports(path, "hiera_cli"), f"{path} imports the command line"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["predict", "--help"],
        ["train", "--help"],
        ["eval", "-h"],
        ["mae", "--help"],
        ["features", "--help"],
        ["convert", "--help"],
        ["bench", "--help"],
        ["models"],
        ["--version"],
    ],
)
def test_light_commands_import_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from hiera_cli.app import run\n"
        f"code = run({arguments!r})\n"
        "heavy = {'torch', 'torchvision', 'av', 'huggingface_hub', 'PIL'} & set(sys.modules)\n"
        "assert code == 0 and not heavy, (code, heavy)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_zoo_needs_no_torch() -> None:
    code = "import sys, hiera_core.zoo; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_resolve_and_are_documented() -> None:
    for name in hiera_core.__all__:
        thing = getattr(hiera_core, name)
        assert name == "__version__" or (thing.__doc__ or "").strip(), name
    assert set(zoo.names()) <= set(dir(hiera_core))
    with pytest.raises(AttributeError):
        hiera_core.no_such_name  # noqa: B018


def test_torch_hub_loads_from_the_repository() -> None:
    import torch

    model = torch.hub.load(str(ROOT), "hiera_tiny_224", source="local", num_classes=3)
    assert model.config["num_classes"] == 3
    import hubconf

    assert all(callable(getattr(hubconf, name)) for name in zoo.names())


def test_the_readme_names_every_model_and_file() -> None:
    readme = README.read_text()
    for name in zoo.names():
        assert name.removeprefix("mae_") in readme, name
    house = readme.split("## The house", 1)[1]
    for path in [*(ROOT / "hiera_core").glob("*.py"), *(ROOT / "hiera_cli").glob("*.py")]:
        assert path.name in house, f"{path.name} is missing in the map of the house"
