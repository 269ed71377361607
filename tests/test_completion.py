"""Tests of shell completion: which values are offered, and that no torch is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from hiera_cli import completion
from hiera_core import zoo
from hiera_core.benchmarking import peers
from hiera_core.data import datasets
from hiera_core.device import DTYPES

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def complete(hiera: Command, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Return a function that completes a command line as bash does."""

    def values(line: str) -> list[str]:
        monkeypatch.setenv("_HIERA_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        _, out, err = hiera()
        assert err == ""
        return out.split()

    return values


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("hiera pre", ["predict"]),
        ("hiera predict x.png -m hiera_tiny", ["hiera_tiny_224"]),
        ("hiera predict x.png --model=hiera_tiny", ["hiera_tiny_224"]),
        ("hiera mae x.png -m mae_hiera_nano_3", ["mae_hiera_nano_32"]),
        ("hiera mae x.png -m hiera_tiny", []),
        (
            "hiera features x.png -m hiera_tiny_224.",
            ["hiera_tiny_224.mae_in1k_ft_in1k", "hiera_tiny_224.mae_in1k"],
        ),
        ("hiera eval x/ -m hiera_tiny_224 --checkpoint ", ["mae_in1k_ft_in1k", "mae_in1k"]),
        ("hiera eval di", ["digits"]),
        ("hiera eval ./di", []),  # files
        ("hiera predict x.png -m ./runs", []),
        ("hiera train hiera_huge", ["hiera_huge_224", "hiera_huge_16x224"]),
        ("hiera convert mae_hiera_nano_8", ["mae_hiera_nano_8x32"]),
        ("hiera convert hiera_nano_32 x.onnx --returns maps,em", ["maps,embedding"]),
        ("hiera bench hiera_nano_32 --against ti", ["timm"]),
        ("hiera bench --against timm,", [f"timm,{peer}" for peer in (
            "reference", "transformers", "hiera-optim", "openvino", "onnxruntime", "vit")]),
        ("hiera bench --against vit:b", ["vit:bf16"]),
        ("hiera bench hiera_nano_32 hiera_nano_8", ["hiera_nano_8x32"]),
        ("hiera models mae_hiera_h", ["mae_hiera_huge_224", "mae_hiera_huge_16x224"]),
        ("hiera predict x.png -f js", ["json", "jsonl"]),
        ("hiera predict x.png --device c", ["cpu", "cuda", "cuda:all"]),
        ("hiera predict x.png --dtype f", ["fp32", "fp16"]),
        ("hiera convert a b --to ti", ["timm"]),
    ],
)  # fmt: skip
def test_values_are_completed(
    complete: Callable[[str], list[str]], line: str, values: list[str]
) -> None:
    assert complete(line) == values


def test_a_model_is_offered_to_the_commands_that_take_it(
    complete: Callable[[str], list[str]],
) -> None:
    autoencoders = [name for name, entry in zoo.models().items() if entry.autoencoder]
    assert complete("hiera mae x.png -m ") == autoencoders
    assert set(complete("hiera predict x.png -m ")) == set(zoo.names()) - set(autoencoders)
    assert complete("hiera features x.png -m ") == zoo.names()


def test_the_names_are_those_of_the_library() -> None:
    assert list(completion.PEERS) == list(peers.PEERS)
    assert set(completion.DTYPES) == set(DTYPES)
    assert list(completion.DATA_SETS) == list(datasets.BUILT_IN)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_imports_no_torch(shell: str) -> None:
    line = "hiera bench hiera_nano_32 --against ti"
    code = (
        "import sys; from hiera_cli.app import run; run([]); "
        "sys.exit(bool({'torch', 'av', 'PIL', 'huggingface_hub'} & set(sys.modules)))"
    )
    environment = {
        **os.environ, "_HIERA_COMPLETE": f"complete_{shell}", "COMP_WORDS": line, "COMP_CWORD": "4",
        "_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "timm" in done.stdout, done.stderr
