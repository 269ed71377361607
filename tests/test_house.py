"""The house: imports point down, the light parts stay light, the documents are true."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
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
    """Modules of `package` (top-level names) that a file imports, anywhere in it."""
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


def test_what_the_readme_prints_is_what_comes_out(
    hiera: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every `$ hiera ...` block of the README, run; elsewhere, if it writes."""
    for name in ("hiera_core", "hiera_cli"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```console\n\$ hiera ([^\n]*)\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    for command, expected in blocks:
        to_terminal = not command.endswith("| cat")
        arguments = command.removesuffix("| cat").split() + ["-f", "table"] * to_terminal
        code, out, err = hiera(*arguments, "--dtype", "fp32")
        assert code == 0
        for line in out.splitlines():
            if line.startswith("{"):  # the last digits differ from machine to machine
                shown = json.loads(expected[expected.index("{") :])["topk"]
                for ours, theirs in zip(json.loads(line)["topk"], shown, strict=True):
                    assert ours["id"] == theirs["id"]
                    assert ours["prob"] == pytest.approx(theirs["prob"], abs=1e-6)
            else:
                assert line in expected
        assert err in ("", *MESSAGES)


MESSAGES = (
    "hiera: --random-init: weights are random, the outputs mean nothing\n",
    "hiera: patches are shown with the true mean and contrast, since the models predict normalised "
    "pixels\n",
)


def test_options_in_the_readme_exist() -> None:
    """Options that the README uses exist."""
    from typer.main import get_command

    from hiera_cli.app import app

    known = {
        option
        for command in get_command(app).commands.values()  # type: ignore[attr-defined]
        for parameter in command.params
        for option in parameter.opts
    }
    for line in README.read_text().splitlines():
        if line.strip().startswith(("hiera ", "$ hiera ")):
            for option in re.findall(r"(?<= )--?[a-z][a-z-]*", line.split(" | ")[0]):
                assert option in known, line
