"""Tests of the help: panels, examples, and what an option's line shows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from typer.main import get_command

from hiera_cli import help_text
from hiera_cli.app import COMMANDS, app

from .test_docs import options_of

Command = Callable[..., tuple[int, str, str]]


def option_names() -> list[tuple[str, str]]:
    root: Any = get_command(app)
    pairs = [("", parameter) for parameter in root.params]
    pairs += [(name, p) for name, command in root.commands.items() for p in command.params]
    return [
        (name, max(p.opts, key=len).removeprefix("--"))
        for name, p in pairs
        if p.param_type_name == "option"
    ]


def test_every_option_has_a_panel() -> None:
    shown = {name for names in help_text.PANELS.values() for name in names}
    assert {option for _, option in option_names()} <= shown


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_is_in_panels_with_two_examples(
    hiera: Command, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = hiera(name, "--help")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    panels = re.findall(r"^╭─ (\w+) ─", out, re.MULTILINE)
    assert "Options" not in panels and panels[-1] == "Other"
    assert panels == sorted(panels, key=["Arguments", *help_text.PANELS].index)
    assert name == "models" or {"Output", "Machine"} <= set(panels)
    assert "<bool>" not in out and "<int" not in out
    _, _, examples = out.partition("Examples:")
    assert len([line for line in examples.splitlines() if line.strip()]) == 2
    text = " ".join(out.replace("│", " ").split())
    for _, option in [pair for pair in option_names() if pair[0] == name]:
        assert f"--{option} " in text
    if name == "features":  # brackets are text
        assert "[heads, queries, keys]" in re.sub(r"\s+", " ", text)


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["mae", "photo.jpg"], "Missing option '--output' / '-o'"),
        (["eval"], "Missing argument 'DATA'"),
        (["convert", "hiera_nano_32"], "Missing argument 'DEST'"),
        (["convert", "hiera_nano_32", "x"], "Missing option '--to'"),
    ],
)
def test_what_is_missing_is_shown_by_an_example(
    hiera: Command, arguments: list[str], missing: str
) -> None:
    code, out, err = hiera(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and missing in err
    assert err.endswith(f"; for example: {help_text.EXAMPLES[arguments[0]][0]}\n")


@pytest.mark.parametrize("name", list(help_text.EXAMPLES))
def test_examples_are_commands(name: str) -> None:
    for line in help_text.EXAMPLES[name]:
        program, command, *words = shlex.split(line.split("   ")[0])
        assert program == "hiera" and command == (name or command)
        given = {word for word in words if re.match("--?[a-z]", word)}
        assert given <= options_of(command)
        assert name == "" or len(line) <= 90


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("predict", ["hiera_base_224 for images", "hiera_base_16x224 for videos"]),
        ("mae", ["mae_hiera_base_224 for images", "mae_hiera_base_16x224 for videos"]),
        ("features", ["hiera_base_224 for images", "hiera_nano_32 without inputs"]),
    ],
)
def test_help_names_the_default_models(
    hiera: Command, monkeypatch: pytest.MonkeyPatch, name: str, words: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = " ".join(hiera(name, "-h")[1].replace("│", " ").split())
    assert all(word in text for word in words)


def test_the_sample_run_names_its_model(hiera: Command) -> None:
    for words, model in (([], "hiera_nano_32"), (["-m", "mae_hiera_nano_32"], "mae_hiera_nano_32")):
        code, stdout, stderr = hiera("features", *words)
        assert (code, stderr) == (0, "")
        assert stdout.splitlines()[0] == f"sample picture  (by {model})"
