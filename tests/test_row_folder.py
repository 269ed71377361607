"""Tests of a folder of rows: forged files are refused, and retries replace the rows that failed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")
import pyarrow.parquet as pq

from hiera_core.atomic import unfinished
from hiera_core.errors import UsageError
from hiera_core.places.places import place_of
from hiera_core.scale import row_folder
from hiera_core.scale.result_rows import RowLayout
from hiera_core.scale.row_folder import RowFolder

from .test_row_runs import MODEL, SAMPLES, folder, read_rows, same

__all__ = ["folder"]  # a fixture
Command = Callable[..., tuple[int, str, str]]
MODERATE = '{"settings": {"views": ' + "[" * 500 + "]" * 500 + "}}"  # json reads it


def forged(index: list[Any], status: list[str] | None = None) -> Any:
    """Return the columns by which rows are known, for these rows."""
    import pyarrow as pa

    states = status or ["ok"] * len(index)
    names = pa.array(["a.png"] * len(index))
    return pa.table({"index": index, "input": names, "status": states})


@pytest.mark.parametrize(
    "index, message",
    [
        ([2**62], "holds row 4611686018427387904, "),
        ([3, 10**11], "holds row 100000000000, "),
        ([10**7], "holds row 10000000, and there are 7 inputs"),
        ([7], "holds row 7, and there are 7 inputs"),
        ([-1], "is damaged"),
        ([None, 3], "is damaged"),
        (["3"], "is damaged"),
        ([0.5], "is damaged"),
    ],
)
@pytest.mark.parametrize("has_manifest", [True, False])
def test_rows_that_no_input_has_are_refused(
    hiera: Command, folder: Path, tmp_path: Path, index: list[Any], message: str, has_manifest: bool
) -> None:
    (tmp_path / "m.txt").write_text("".join(f"{folder}/{n}.png\n" for n in range(7)))
    inputs = ("--manifest", tmp_path / "m.txt") if has_manifest else (folder,)
    (tmp_path / "rows").mkdir()
    table = forged(index).replace_schema_metadata({"hiera": "{}"})
    pq.write_table(table, tmp_path / "rows/part-000000000000-0badcafe.parquet")
    given = ("features", *inputs, *MODEL, "-q", "--rows", tmp_path / "rows", "--resume")
    for options in ((), ("--retry-failed",)):
        code, _, err = hiera(*given, *options)
        (line,) = (line for line in err.splitlines() if "4.png" not in line)
        assert code == 2 and message in line, err


@pytest.mark.parametrize(
    "metadata", ["[" * 200_000, '{"settings": ' * 200_000, "[]", "{", "\xff", MODERATE]
)
def test_forged_metadata_is_damage(tmp_path: Path, metadata: str) -> None:
    rows = RowFolder(place_of(str(tmp_path)), RowLayout())
    path = tmp_path / "part-000000000000-0badcafe.parquet"
    pq.write_table(forged([0]).replace_schema_metadata({"hiera": metadata}), path)
    with pytest.raises(UsageError, match="is damaged, or no file of results"):
        rows.read_done()


def test_a_file_whose_other_columns_are_damaged_is_named(tmp_path: Path) -> None:
    """They are read only when some of its rows are written twice."""
    rows = RowFolder(place_of(str(tmp_path)), RowLayout())
    for name, index in (("part-0", [0]), ("part-1", [0, 1])):
        table = forged(index).append_column("embedding", [[float(n) for n in index]])
        table = table.replace_schema_metadata({"hiera": "{}"})
        pq.write_table(table, tmp_path / f"{name}.parquet", compression="none")
    path = tmp_path / "part-1.parquet"
    column = pq.read_metadata(path).row_group(0).column(3)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"part-1\.parquet is damaged"):
        rows.read_done()


def test_failed_inputs_are_tried_again(hiera: Command, folder: Path, tmp_path: Path) -> None:
    given = ("features", folder, *MODEL, "-q", "--rows")
    rows = tmp_path / "rows"
    (folder / "6.png").write_bytes(b"damaged too")
    assert hiera(*given, rows)[0] == 1
    good = (SAMPLES / "three.png").read_bytes()
    (folder / "4.png").write_bytes(good)
    assert hiera(*given, rows, "--resume")[0] == 1
    assert [row["status"] for row in read_rows(rows)].count("error") == 2
    code, _, err = hiera(*given, rows, "--resume", "--retry-failed", "--clips", 2)
    assert code == 2 and "was made with views" in err  # and no row is removed
    assert len(read_rows(rows)) == 7
    code, _, err = hiera(*given, rows, "--resume", "--retry-failed", "--random-init")
    assert code == 2 and "was made with weights" in err
    assert len(read_rows(rows)) == 7
    code, _, err = hiera(*given, rows, "--resume", "--retry-failed")
    assert code == 1 and "6.png" in err and "hiera: 6 ok, 1 failed" in err, err
    hiera(*given, tmp_path / "whole")
    assert same(read_rows(rows), read_rows(tmp_path / "whole"))
    (folder / "6.png").write_bytes(good)
    assert hiera(*given, rows, "--resume", "--retry-failed")[0] == 0
    files = sorted(rows.glob("part-*"))
    assert hiera(*given, rows, "--resume", "--retry-failed")[0] == 0  # there is nothing left to do
    assert [row["status"] for row in read_rows(rows)] == ["ok"] * 7
    assert sorted(rows.glob("part-*")) == files and len(files) == 3


def test_a_killed_retry_leaves_no_row_twice(hiera: Command, folder: Path, tmp_path: Path) -> None:
    given = ("features", folder, *MODEL, "-q", "--rows")
    assert hiera(*given, tmp_path / "rows")[0] == 1
    (folder / "4.png").write_bytes((SAMPLES / "three.png").read_bytes())
    hiera(*given, tmp_path / "whole")
    whole = read_rows(tmp_path / "whole")
    # The new row of input 4 is written, and the failed one is not removed.
    (part,) = (tmp_path / "whole").glob("part-*")
    late = tmp_path / "rows/part-000000000004-0badcafe-retry3.parquet"
    pq.write_table(pq.read_table(part).slice(4, 1), late)
    assert len(read_rows(tmp_path / "rows")) == 8
    assert hiera(*given, tmp_path / "rows", "--resume")[0] == 0
    assert same(read_rows(tmp_path / "rows"), whole)
    # The next retry has a number of its own, so its rows replace those of this one.
    (folder / "4.png").write_bytes(b"damaged again")
    late.unlink()
    assert hiera(*given, tmp_path / "rows", "--resume")[0] == 1
    (folder / "4.png").write_bytes((SAMPLES / "three.png").read_bytes())
    assert hiera(*given, tmp_path / "rows", "--resume", "--retry-failed")[0] == 0
    assert same(read_rows(tmp_path / "rows"), whole)


@pytest.mark.parametrize("is_signalled", [True, False])
def test_a_retry_that_ends_early_leaves_one_row_for_each_input(
    hiera: Command,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_signalled: bool,
) -> None:
    from hiera_cli.exit_codes import Interrupted

    (folder / "0.png").write_bytes(b"damaged too")
    given = ("features", folder, *MODEL, "-q", "--shard-size", 1, "--rows", tmp_path / "rows")
    assert hiera(*given)[0] == 1
    for name in ("0.png", "4.png"):
        (folder / name).write_bytes((SAMPLES / "three.png").read_bytes())
    original, written = row_folder._write_table, []

    def write_once(table: Any, path: Path) -> None:
        written.append(path)
        if len(written) > 1 and not is_signalled:
            raise OSError(28, "No space left on device")
        if len(written) == 1 and is_signalled:
            unfinished.raise_or_defer(Interrupted(signal.SIGTERM))  # after this write
        original(table, path)

    monkeypatch.setattr(row_folder, "_write_table", write_once)
    code, _, err = hiera(*given, "--resume", "--retry-failed")
    expected = (143, "terminated") if is_signalled else (5, "No space left")
    assert code == expected[0] and expected[1] in err, err
    rows = read_rows(tmp_path / "rows")
    assert [row["index"] for row in rows] == list(range(7))
    assert [row["status"] for row in rows] == ["ok"] * 4 + ["error"] + ["ok"] * 2


def test_rows_that_failed_before_a_retry_stay_until_they_are_replaced(
    folder: Path, tmp_path: Path
) -> None:
    rows = RowFolder(place_of(str(tmp_path / "rows")), RowLayout())
    (tmp_path / "rows").mkdir()
    rows.write(forged([0, 1, 2], status=["ok", "error", "error"]), {"settings": {}})
    rows.begin_retry()
    assert rows.read_done(3).missing(range(3)).tolist() == [1, 2]
    assert [row["index"] for row in read_rows(tmp_path / "rows")] == [0, 1, 2]
    rows.write(forged([2], status=["error"]), {"settings": {}})
    assert rows.read_done(3).missing(range(3)).tolist() == [1]  # nothing is taken for done
    assert [row["index"] for row in read_rows(tmp_path / "rows")] == [0, 1, 2]
    rows.write(forged([1], status=["ok"]), {"settings": {}})
    done = rows.read_done(3)
    assert (done.ok, done.failed, done.some(9, with_failed=False).tolist()) == (2, 1, [0, 1])
    found = read_rows(tmp_path / "rows")
    assert [(row["index"], row["status"]) for row in found] == [(0, "ok"), (1, "ok"), (2, "error")]


def test_a_folder_of_failures_is_tried_again(hiera: Command, tmp_path: Path) -> None:
    given = ("features", tmp_path / "a.png", *MODEL, "-q", "--rows", tmp_path / "rows")
    assert hiera(*given)[0] == 1
    (tmp_path / "a.png").write_bytes((SAMPLES / "eight.png").read_bytes())
    assert hiera(*given, "--resume", "--retry-failed")[0] == 0
    assert [row["status"] for row in read_rows(tmp_path / "rows")] == ["ok"]
