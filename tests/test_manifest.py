"""Tests of manifests: any part of any format, and a plan that holds no rows in memory."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from csv import DictReader
from pathlib import Path

import pytest

from hiera_core.data.division import text_rows
from hiera_core.data.division.manifest import Manifest
from hiera_core.data.division.shards import Shard
from hiera_core.errors import UsageError

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402
from pyarrow import csv  # noqa: E402

NAMES = [f"folder/{n}.jpg" for n in range(97)]
NAMES[5], NAMES[60] = 'a "quoted", name.jpg', "two\nlines.jpg"


def write(path: Path, names: list[str], rows_per_group: int = 10) -> Path:
    table = pa.table({"n": pa.array(range(len(names))), "path": names, "key": names[::-1]})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows_per_group)
    else:
        csv.write_csv(table, path)
    return path


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
def test_parts_of_a_table_are_its_rows(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_rows, "BLOCK_BYTES", 64)
    manifest = Manifest(write(tmp_path / f"m{ending}", NAMES), id_column="key")
    assert len(manifest) == 97
    for count in (1, 3, 10, 200):
        parts = [manifest.read(Shard(i, count).rows(97)) for i in range(count)]
        found = [source for part in parts for source in part]
        assert [s.name for s in found] == NAMES
        assert [s.id for s in found] == NAMES[::-1]
        assert [s.position for s in found] == list(range(97))


def test_numbers_stay_numbers_and_files_are_one_table(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", NAMES[:50])
    write(tmp_path / "b.parquet", NAMES[50:])
    manifest = Manifest(tmp_path, id_column="n")
    assert [s.name for s in manifest.read(range(48, 53))] == NAMES[48:53]
    assert [s.id for s in manifest.read(range(48, 53))] == [48, 49, 0, 1, 2]


def test_a_list_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfa.jpg\r\n\nhttp://host/b.jpg\nc\xff.jpg")
    found = list(Manifest(path).read(range(4)))
    assert [s.name for s in found] == ["a.jpg", "http://host/b.jpg", "c\udcff.jpg"]
    assert [s.position for s in found] == [0, 2, 3] and found[1].url == "http://host/b.jpg"


@pytest.mark.parametrize("first", ["sep=;\r\n", "#TYPE System.Object\r\n", "\ufeffsep=;\r\n"])
def test_a_first_line_that_is_no_header(first: str, tmp_path: Path) -> None:
    """Excel writes one, and so does PowerShell."""
    (tmp_path / "m.csv").write_text(f'{first}"path";"n"\r\n"a.jpg";"1"\r\n"b.jpg";"2"\r\n')
    manifest = Manifest(tmp_path / "m.csv", id_column="n")
    assert [(s.name, s.id) for s in manifest.read(range(2))] == [("a.jpg", "1"), ("b.jpg", "2")]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_tables_in_utf_16(encoding: str, tmp_path: Path) -> None:
    text = write(tmp_path / "m.csv", NAMES).read_text("utf-8")
    (tmp_path / "m.csv").write_bytes(text.encode(encoding))
    manifest = Manifest(tmp_path / "m.csv", id_column="key")
    found = [source for start in (0, 40) for source in manifest.read(range(start, 40 + start))]
    assert [source.name for source in found] == NAMES[:80]
    (tmp_path / "list.txt").write_bytes("ä.jpg\r\nb.jpg\r\n".encode(encoding))
    found = list(Manifest(tmp_path / "list.txt").read(range(2)))
    assert [source.name for source in found] == ["ä.jpg", "b.jpg"]
    (tmp_path / "m.csv").write_bytes(text.encode("utf-16")[:-1])
    with pytest.raises(UsageError, match="is not in UTF-16 as it begins; save it as UTF-8"):
        Manifest(tmp_path / "m.csv")


def test_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rows, "BLOCK_BYTES", 64)
    rows = [{"path": name, "id": n} for n, name in enumerate(NAMES)]
    lines = [json.dumps(row) for row in rows]
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "m.jsonl").write_text("\n".join([*lines, "", '{"id": 5}']), encoding)
        manifest = Manifest(tmp_path / "m.jsonl")
        assert len(manifest) == 99 and manifest.columns == ("path", "id")
        for count in (1, 3, 10):
            parts = [manifest.read(Shard(i, count).rows(99)) for i in range(count)]
            found = [source for part in parts for source in part]
            assert [s.name for s in found[:-1]] == NAMES
            assert [s.id for s in found] == [*range(97), 5]
            assert found[-1].error is not None and "no path" in found[-1].error.message
    (tmp_path / "half.jsonl").write_text(r'{"path": "\ud800.png", "id": "\udfff"}')  # no characters
    (source,) = Manifest(tmp_path / "half.jsonl").read(range(1))
    assert (source.name, source.id) == ("\ufffd.png", "\ufffd")
    for text, message in (
        ("", "has no rows"),
        ('{"path": "a"}\n{"pa', "line 2 is not valid JSON"),
        ('["a.png"]', "line 1 is no object"),
        ('{"n": 1}', "no column is named as one of paths"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(UsageError, match=message):
            list(Manifest(tmp_path / "bad.jsonl").read(range(2)))


def test_a_row_without_a_path_is_an_error_of_its_own(tmp_path: Path) -> None:
    table = pa.table({"url": ["http://h/a.jpg", None], "id": [7, 8]})
    pq.write_table(table, tmp_path / "m.parquet")
    first, second = Manifest(tmp_path / "m.parquet").read(range(2))
    assert first.url == "http://h/a.jpg" and first.error is None
    assert second.id == 8 and second.error is not None and "no path" in second.error.message


def test_mistakes_are_named(tmp_path: Path) -> None:
    table = write(tmp_path / "m.csv", NAMES)
    for arguments, message in (
        ((tmp_path / "missing.csv",), "no such file"),
        ((tmp_path / "missing.parquet",), "no such file"),
        ((tmp_path / "m.xlsx",), "of no known format"),
        ((tmp_path,), "holds no .parquet files"),
        ((table, "pth"), "did you mean path"),
        ((table, None, "identity"), "has no column 'identity'"),
    ):
        with pytest.raises(UsageError, match=message):
            Manifest(*arguments)
    (tmp_path / "two.csv").write_text("path,url\na,b\n")
    with pytest.raises(UsageError, match="several columns may hold paths"):
        Manifest(tmp_path / "two.csv")
    (tmp_path / "none.csv").write_text("x,y\na,b\n")
    with pytest.raises(UsageError, match=r"no column is named as one of paths \(x, y\)"):
        Manifest(tmp_path / "none.csv")
    (tmp_path / "old.csv").write_bytes(b"path,n\ra.jpg,1\r")
    with pytest.raises(UsageError, match=r"header cannot be parsed .* end its lines with LF"):
        Manifest(tmp_path / "old.csv")
    with pytest.raises(UsageError, match=r"is in JSON; name it as an input: @.*m\.json"):
        Manifest(tmp_path / "m.json")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UsageError, match="is damaged"):
        Manifest(tmp_path / "damaged.parquet")
    (tmp_path / "short.csv").write_text("n,path\n1,a.jpg\n2\n")
    with pytest.raises(UsageError, match="has 1 cells"):
        list(Manifest(tmp_path / "short.csv").read(range(2)))
    manifest = Manifest(table)
    table.write_text("n,path,key\n1,a.jpg,b\n")
    with pytest.raises(UsageError, match="shorter"):
        list(manifest.read(range(3)))


PLAN = """
import re, resource, sys, time
from pathlib import Path
from hiera_core.data.division.manifest import Manifest
from hiera_core.data.division.shards import Shard
start = time.process_time()
manifest = Manifest(Path(sys.argv[1]))
count = int(sys.argv[2])
plan = [Shard(i, count).rows(len(manifest)) for i in range(count)]
assert sum(map(len, plan)) == len(manifest)
for rows in (plan[0], plan[count // 2], plan[-1]):
    middle = rows[len(rows) // 2]
    (source,) = manifest.read(range(middle, middle + 1))
    assert source.name == f"s3://bucket/pictures/{middle:012}.jpg", (source.name, middle)
seconds, status = time.process_time() - start, Path("/proc/self/status")
if status.exists():  # ru_maxrss also counts what the parent process had
    memory = re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]
else:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(manifest), seconds, memory)
"""


def plan(path: Path, shards: int) -> tuple[int, float, int]:
    """Return the number of rows, seconds of CPU time and peak memory in KiB of planning."""
    done = subprocess.run(
        [sys.executable, "-c", PLAN, path, str(shards)], capture_output=True, text=True, check=True
    )
    rows, seconds, memory = done.stdout.split()
    return int(rows), float(seconds), int(memory)


def write_large(path: Path, rows: int, block: int = 1_000_000) -> None:
    """Write a manifest of generated names, a block at a time."""
    import pyarrow.compute as pc

    writer = None
    with path.open("wb") as text:
        for begin in range(0, rows, block):
            numbers = pa.array(range(begin, min(rows, begin + block)))
            digits = pc.utf8_lpad(numbers.cast(pa.string()), 12, "0")
            names = pc.binary_join_element_wise("s3://bucket/pictures/", digits, ".jpg", "")
            if path.suffix == ".parquet":
                table = pa.table({"path": names, "id": numbers})
                writer = writer or pq.ParquetWriter(text, table.schema)
                writer.write_table(table)
            else:
                text.write("\n".join(names.to_pylist()).encode() + b"\n")
        if writer is not None:
            writer.close()


@pytest.mark.parametrize("ending", [".parquet", ".txt"])
def test_the_memory_of_a_plan_does_not_grow(ending: str, tmp_path: Path) -> None:
    write_large(tmp_path / f"small{ending}", 1000)
    write_large(tmp_path / f"large{ending}", 500_000, 100_000)
    small, large = plan(tmp_path / f"small{ending}", 16), plan(tmp_path / f"large{ending}", 16)
    assert (small[0], large[0]) == (1000, 500_000)
    assert large[2] - small[2] < 64 * 1024, "KiB"


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".parquet", ".txt"])
def test_a_hundred_million_rows(ending: str, tmp_path: Path) -> None:
    write_large(tmp_path / f"m{ending}", 100_000_000)
    rows, seconds, memory = plan(tmp_path / f"m{ending}", 16)
    print(f"{rows} rows of {ending}: {seconds:.1f} s of CPU time, {memory / 1024:.0f} MiB")
    assert rows == 100_000_000 and memory < 1 << 20


@pytest.mark.parametrize("block", [7, 1 << 20])
@pytest.mark.parametrize(
    "text, count",
    [
        ('path,n\na".png,1\nb.png,2\nc".png,3\nd.png,4\n', None),
        ('path,n\nb.png,"1\nc.png,2\n', None),
        ('path,n\na;"b.png,1\nc.png,2\nd;"e.png,3\n', None),
        ('path,n\n5" disk".png,1\nb.png,"2"\n', 2),
        ('path,n\n"a ""b""\nc.png",1\n"b.png",2\n', 2),
    ],
    ids=["within cells", "not closed", "behind another separator", "harmless", "doubled"],
)
def test_quotes_never_hide_rows(
    text: str, count: int | None, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_rows, "BLOCK_BYTES", block)
    path = tmp_path / "m.csv"
    path.write_text(text)
    if count is None:
        with pytest.raises(UsageError, match="a quote that is not closed, or is within a cell"):
            Manifest(path)
        return
    found = [source.name for source in Manifest(path).read(range(count))]
    assert found == [row["path"] for row in DictReader(io.StringIO(text, newline=""))]
