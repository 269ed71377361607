"""Tests of how rows of `hiera bench` appear: each when it is final."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hiera_cli import bench_rows
from hiera_cli.bench_rows import LiveProgress, ShownRows, summary
from hiera_cli.output_formats import Format
from hiera_core.benchmarking import machine, runner
from hiera_core.errors import DeviceError

from .test_benchmarking import make_result

Hiera = Callable[..., tuple[int, str, str]]
HEADER = machine.Header("cpu", "a machine", 2, "fp32")


class Output:
    """What has been printed so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys, self._text = capsys, ""

    def getvalue(self) -> str:
        self._text += self._capsys.readouterr().out
        return self._text


@pytest.fixture
def out(capsys: pytest.CaptureFixture[str]) -> Output:
    return Output(capsys)


@pytest.mark.parametrize("format", [Format.jsonl, Format.csv, Format.table])
def test_rows_are_printed_when_they_come(format: Format, out: Output) -> None:
    """What is printed of each row is there before the next one is measured, and only once."""
    names = ["hiera_nano_32", "hiera_base_plus_224"]
    shown = ShownRows(HEADER, format, names)
    lengths = []
    for name in names:
        shown.add([replace(make_result(), model=name)])
        lengths.append(len(out.getvalue().splitlines()))
    shown.end()
    lines = out.getvalue().splitlines()
    assert len(lines) == lengths[-1] == lengths[0] + 1
    for name in names:
        assert sum(name in line for line in lines) == 1
    if format is Format.table:
        assert len({line.index("fused") for line in lines[1:]}) == 1, "columns are not aligned"
        assert [line.split()[0] for line in lines] == ["model", *names]


def test_a_table_has_a_new_header_if_its_columns_change(out: Output) -> None:
    shown = ShownRows(HEADER, Format.table, ["hiera_nano_32"])
    shown.add([make_result()])
    shown.add([replace(make_result(), speedup=1.5)])
    assert [line.split()[0] for line in out.getvalue().splitlines()] == [
        "model", "hiera_nano_32", "model", "hiera_nano_32",
    ]  # fmt: skip


def test_json_and_tables_of_a_terminal_come_at_the_end(
    out: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = ShownRows(HEADER, Format.json, ["hiera_nano_32"])
    shown.add([make_result()])
    assert out.getvalue() == ""
    shown.end()
    assert len(json.loads(out.getvalue())["rows"]) == 1
    monkeypatch.setenv("COLUMNS", "80")
    shown = ShownRows(HEADER, Format.table, ["hiera_nano_32"])
    before = out.getvalue()
    shown.add([make_result()])
    assert out.getvalue() == before
    shown.end()
    assert "hiera_nano_32" in out.getvalue().removeprefix(before)


def test_progress_on_a_terminal_shows_the_rows_so_far() -> None:
    from rich.console import Console

    stream = io.StringIO()
    with Console(file=stream, force_terminal=True, width=100).status("") as status:
        progress = LiveProgress(status)
        progress("measuring [b]")
        progress.add([make_result(), replace(make_result(), samples_s=[], error="no [memory]")])
    assert "hiera_nano_32 fused, batch 8: 80 images/s" in stream.getvalue()
    assert "no [memory]" in stream.getvalue()


def test_a_summary_names_what_is_missing() -> None:
    row = replace(make_result(), samples_s=[], implementation="vit", attention=None)
    assert summary(replace(row, unavailable="no ViT")) == "hiera_nano_32 vit, batch 8: no ViT"


@pytest.mark.parametrize("format", ["csv", "table", "jsonl"])
def test_a_model_that_fails_later_leaves_the_rows_before_it(
    hiera: Hiera, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """Several batch sizes; the second fails."""

    def measure(jobs: Any, *_: Any) -> Any:
        if jobs[0].batch == 2:
            raise DeviceError("hiera_nano_32: it crashed")
        return [replace(make_result(), batch=jobs[0].batch)]

    monkeypatch.setattr(runner, "measure", measure)
    printed: list[str] = []
    real = bench_rows.print_text
    monkeypatch.setattr(bench_rows, "print_text", lambda text: printed.append(text) or real(text))
    code, out, _ = hiera("bench", "hiera_nano_32", "-b", "1,2,4", "-f", format, "-q")
    assert code == 1 and len(printed) == 3, "a row was not printed when it came"
    assert "it crashed" in printed[1] and "".join(printed) == out
