"""The architecture: light parts stay light, names are unique, and the layers are checked in CI."""

from __future__ import annotations

import collections
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hiera_core
from hiera_core import zoo

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MAX_TOP_LEVEL, MAX_IN_FOLDER = 8, 17  # Python files


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["predict", "--help"],
        ["train", "--help"],
        ["train", "hiera_nano_32", "--print-recipe"],
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


def test_only_charts_need_matplotlib() -> None:
    """Importing all of the package does not import matplotlib."""
    code = (
        "import sys, hiera_core, hiera_cli.app\n"
        "for name in hiera_core.__all__: getattr(hiera_core, name)\n"
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_folders_are_small_and_file_names_are_unique() -> None:
    files = [p for d in ("hiera_core", "hiera_cli") for p in (ROOT / d).rglob("*.py")]
    per_folder = collections.Counter(path.parent for path in files)
    assert per_folder[ROOT / "hiera_core"] <= MAX_TOP_LEVEL
    assert max(per_folder.values()) <= MAX_IN_FOLDER
    # A command and its implementation may have the same name.
    names = [p.name for p in files if p.name != "__init__.py" and p.parent.name != "commands"]
    assert [name for name, count in collections.Counter(names).items() if count > 1] == []


def test_every_package_is_installed_and_has_a_layer() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {
        ".".join(path.relative_to(ROOT).parent.parts)
        for name in ("hiera_core", "hiera_cli")
        for path in (ROOT / name).rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == folders
    layers = " | ".join(project["tool"]["importlinter"]["contracts"][0]["layers"]).split(" | ")
    modules = {
        f"hiera_core.{path.stem}"
        for path in (ROOT / "hiera_core").iterdir()
        if path.name != "__init__.py" and (path.suffix == ".py" or (path / "__init__.py").exists())
    }
    assert set(layers) == {"hiera_cli", *modules}


def test_models_choose_no_kernels() -> None:
    """Only models/cpu.py asks for the compiler, the device or the size of a cache."""
    for name in ("hiera", "mae", "attention", "layers"):
        text = (ROOT / f"hiera_core/models/{name}.py").read_text()
        for word in ("is_compiling", "is_exporting", "mkldnn", "is_cpu", "bfloat16", "BYTES"):
            assert word not in text, f"{name}.py has {word}"


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


def test_the_documents_name_every_model_and_file() -> None:
    readme = README.read_text()
    for name in zoo.names():
        assert name.removeprefix("mae_") in readme, name
    architecture = (ROOT / "docs/architecture.md").read_text()
    for folder in ("hiera_core", "hiera_cli"):
        for path in (ROOT / folder).rglob("*.py"):
            named = path.name == "__init__.py" or path.name in architecture
            assert named, f"{path.name} is missing in docs/architecture.md"
    assert len(readme.splitlines()) <= 250
