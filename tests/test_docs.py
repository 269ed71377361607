"""Check README.md and docs/: commands print what is shown, code runs, links lead somewhere.

A page is run from its first block to its last in one folder, so a block may use what an earlier one
wrote:

    ```console   `$ hiera ...` and everything it prints
    ```python    is executed; the blocks of a page share their variables, and `print(x)  # text`
                 must print that text
    ```sh        the commands and options must exist

The line `<!-- not run -->` before a block says that it needs a network or files of the reader.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
import socket
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hiera_core import zoo
from hiera_core.data import datasets
from hiera_core.training.recipe import Recipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TEXTS = [*PAGES, ROOT / "SECURITY.md", ROOT / ".github/CONTRIBUTING.md"]
WITHOUT_OUTPUT = {
    "reliability",
    "architecture",
    "benchmarks",
    "coming-from",
    "index",
    "troubleshooting",
}

FENCE = re.compile(
    r"^(?P<skip><!-- not run -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
GENERATED = re.compile(r"<!-- python -m .*?<!-- end -->", re.S)
INLINE = re.compile(r"`[^`]+`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PROMISE = re.compile(r"\b(never|always|bit[- ]for[- ]bit)\b", re.IGNORECASE)
TEST_FILE = re.compile(r"\]\([^)]*tests/test_\w+\.py[^)]*\)")
SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z`\[*])")

# Lines of `hiera convert` that compare outputs of two libraries.
COMPARISON = re.compile(r"  (proven|verified): .* on \d|  cost: ")
# Lines on standard error that a page need not show.
MESSAGES = re.compile(
    r"hiera: --random-init: weights are random.*"
    r"|hiera: each hidden patch is shown with its true mean brightness.*"
    r"|hiera: \d+ ok, 0 failed.*"
    r"|hiera: features are in .*"
    r"|hiera: \d+/\d+ .*: preparing .*"  # hiera bench, which names the machine too
    r"|.*; hiera \d.*, torch .*, Python .*"
    r"|On a CPU: .*"
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int  # line of the page on which the text begins
    runs: bool


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    content = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(content):
        line = content.count("\n", 0, found.start("text")) + 1
        yield Block(found["language"], found["text"], line, runs=found["skip"] is None)


def prose(page: Path) -> str:
    """Return a page without its fenced blocks and comments."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.sub(r"<!--.*?-->", "", text, flags=re.S)


def page_ids(page: Path) -> str:
    return page.stem


# Blocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_what_a_page_shows_is_what_happens(
    page: Path,
    hiera: Callable[..., tuple[int, str, str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    forked_workers: None,
) -> None:
    for name in ("hiera_core", "hiera_cli"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    go_offline(monkeypatch)
    variables: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page):
        if block.language == "python":
            # Empty lines in front, so that tracebacks show lines of the page.
            code = compile(
                "\n" * (block.line - 1) + block.text, str(page), "exec", dont_inherit=True
            )
            if block.runs:
                exec(code, variables)
                check_prints(block, capsys.readouterr().out)
        elif block.language == "console" and block.text.startswith("$ hiera "):
            check_output(block, hiera)


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at once on an attempt to reach a network."""
    import huggingface_hub.constants

    def refuse(self: socket.socket, address: Any) -> None:
        raise OSError(f"the documentation must not connect to {address}")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def check_prints(block: Block, out: str) -> None:
    shown = re.findall(r"^print\(.*\)  # (.*)$", block.text, re.MULTILINE)
    assert out.splitlines() == shown


def check_output(block: Block, hiera: Callable[..., tuple[int, str, str]]) -> None:
    """Run a console block. What it prints and what the page shows must be the same lines."""
    command, *shown = block.text.splitlines()
    arguments = complete(command.removeprefix("$ hiera "))
    code, out, err = hiera(*arguments)
    messages = [line for line in err.splitlines() if not MESSAGES.fullmatch(line)]
    assert code == 0 or messages, f"line {block.line}: exit code {code}"
    form = measured if arguments[0] == "bench" else stable
    happens = map(form, [*out.splitlines(), *messages])  # a terminal shows both, in one order
    assert sorted(happens) == sorted(map(form, shown)), f"line {block.line}: {command}"


def complete(command: str) -> list[str]:
    """Return the arguments of a command with those that a terminal and fp32 stand for."""
    to_terminal = not command.endswith("| cat")
    arguments = shlex.split(command.removesuffix("| cat"))
    known = options_of(arguments[0])
    if to_terminal and "--format" in known and not {"-f", "--format"} & set(arguments):
        arguments += ["-f", "table"]
    # For `convert`, --dtype decides what is written, so the page has to name it.
    if "--dtype" in known and "--dtype" not in arguments and arguments[0] != "convert":
        arguments += ["--dtype", "fp32"]
    return arguments


def stable(line: str) -> str:
    """Return a line without what differs between machines: last digits, versions of libraries."""
    if line.startswith("{"):
        return json.dumps(rounded(json.loads(line)))
    return measured(line) if COMPARISON.match(line) else line.rstrip()


def rounded(value: Any) -> Any:
    """Return a JSON value with all numbers rounded."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def measured(line: str) -> str:
    """Return a line without its numbers."""
    return " ".join(re.sub(r"\d[\d.e-]*", "#", line).split())


def test_pages_show_output() -> None:
    for page in PAGES:
        shown = [b for b in blocks(page) if b.text.startswith("$ hiera ")]
        assert shown or page.stem in WITHOUT_OUTPUT, page


# Options ------------------------------------------------------------------------------------------


def app_command() -> Any:
    from typer.main import get_command

    from hiera_cli.app import app

    return get_command(app)


def options_of(name: str) -> set[str]:
    """Return the options of a command, and those that may stand before it."""
    root = app_command()
    assert name in root.commands, f"no command {name!r}"
    parameters = [*root.params, *root.commands[name].params]
    known = {option for p in parameters for option in (*p.opts, *p.secondary_opts)}
    return known | {"-h", "--help"}


def commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """Yield the `hiera` commands of a block and their words, also under torchrun and in pipes."""
    for line in block.text.splitlines():
        for piece in re.split(r"\s\|\s", line.removeprefix("$ ").split(" # ")[0]):
            words = piece.split()
            while words and re.match(r"\w+=", words[0]):
                words.pop(0)
            if words[:1] == ["torchrun"] and "hiera_cli" in words:
                words = words[words.index("hiera_cli") :]
            if words[:1] in (["hiera"], ["hiera_cli"]) and len(words) > 1:
                yield words[1], words[2:]


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_options_exist(page: Path) -> None:
    for block in blocks(page):
        for name, words in commands(block) if block.language in ("sh", "console") else ():
            if name.startswith("-"):  # hiera --version
                assert name in options_of("predict")
                continue
            known = options_of(name)
            for word in words:
                if re.match(r"--?[a-z]", word):
                    assert word.partition("=")[0] in known, f"hiera {name} {word}"


def test_options_in_the_text_exist() -> None:
    known = {option for name in app_command().commands for option in options_of(name)}
    for page in PAGES:
        if page.stem != "benchmarks":  # it also has the options of scripts
            for span in INLINE.findall(prose(page)):
                if re.match(r"`--[a-z]", span):
                    option = re.split(r"[ =`]", span[1:])[0]
                    assert option in known, f"{page.name}: {option}"


# What needs an optional package, and the extra that installs it.
EXTRAS = {
    r"hiera (train|eval) .*\bdigits\b|\bevaluate\(\"digits\"|^ +\"digits\",$": "digits",
    r"--to onnx": "onnx",
    r"--against": "bench",
    r"--plot": "plots",
    r"\.parquet|--save-as parquet": "parquet",
    r"--tensorboard": "tensorboard",
}


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_a_page_names_the_extras_it_needs(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = "\n".join(b.text for b in blocks(page) if b.language in ("sh", "console", "python"))
    for pattern, extra in EXTRAS.items():
        if re.search(pattern, code, re.MULTILINE):
            assert re.search(rf"\[[\w,]*\b{extra}\b[\w,]*\]'", text), (page.name, extra)


def test_examples_do_not_write_to_names_of_the_zoo_or_of_data_sets() -> None:
    """Otherwise the next example would find a folder in place of a model or a data set."""
    taken = {*zoo.names(), *datasets.BUILT_IN}
    for page in PAGES:
        for block in blocks(page):
            for name, words in commands(block) if block.language in ("sh", "console") else ():
                written = {after for word, after in itertools.pairwise(words) if word == "-o"}
                if name == "convert":
                    written |= {word for word in words[1:2] if not word.startswith("-")}
                assert not {word.rstrip("/") for word in written} & taken, (page.name, words)


def test_every_key_of_a_recipe_is_described() -> None:
    page = (DOCS / "training.md").read_text(encoding="utf-8")
    for key in recipe_keys(Recipe):
        assert f"`{key}`" in page, key


def recipe_keys(cls: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a recipe."""
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(types[field.name]):
            yield from recipe_keys(types[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


# Text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", TEXTS, ids=page_ids)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(INLINE.sub("", prose(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", TEXTS, ids=page_ids)
def test_files_in_the_text_exist(page: Path) -> None:
    for path in re.findall(r"`((?:tests|docs|hiera_core|hiera_cli)/[\w./-]+)`", prose(page)):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", LINK.sub("", h).replace("`", "")).lower() for h in headings]
    return {text.replace(" ", "-") for text in plain}


def test_the_index_lists_every_page() -> None:
    index = DOCS / "index.md"
    linked = set(LINK.findall(prose(index)))
    for page in DOCS.glob("*.md"):
        assert page == index or page.name in linked, page.name


@pytest.mark.parametrize("page", TEXTS, ids=page_ids)
def test_promises_are_tested(page: Path) -> None:
    """A sentence with `never`, `always` or `bit for bit` links to the test that checks it."""
    for paragraph in re.split(r"\n\s*\n|\n(?=[|#*-])", prose(page)):
        for sentence in SENTENCE_END.split(" ".join(paragraph.split())):
            if PROMISE.search(INLINE.sub("", sentence)):
                assert TEST_FILE.search(sentence), f"{page.name}: {sentence}"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=page_ids)
def test_lines_are_short(page: Path) -> None:
    """Only tables, code and what scripts have written may have longer lines."""
    for line in GENERATED.sub("", FENCE.sub("", page.read_text(encoding="utf-8"))).splitlines():
        assert len(line) <= 100 or line.startswith("|"), f"{page.name}: {line}"


def test_messages_are_those_of_the_code() -> None:
    """The headings of troubleshooting.md are parts of messages."""
    files = [p for package in ("hiera_core", "hiera_cli") for p in (ROOT / package).rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # strings that continue in the next line
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    assert len(headings) >= 20
    for heading in headings:
        assert heading in code, heading
