"""Tests of class names: files that are not text, or never end."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hiera_core.errors import UsageError
from hiera_core.zoo import labels

Command = Callable[..., tuple[int, str, str]]


def test_labels_have_one_name_on_each_line(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("tench\ngreat white shark\nKäse\n", encoding="utf-8")
    assert labels.read_labels(tmp_path / "names.txt") == ["tench", "great white shark", "Käse"]


@pytest.mark.parametrize(
    "kind",
    ["missing", "folder", "pipe", "/dev/full", "/dev/zero", "binary", "nul", "long", "large"],
)
def test_labels_that_cannot_be_read(
    kind: str, tmp_path: Path, hiera: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path: str | Path = tmp_path / "labels"
    if kind == "folder":
        Path(path).mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "binary":
        Path(path).write_bytes(bytes(range(256)))
    elif kind == "nul":
        Path(path).write_bytes(b"a\0b\n")
    elif kind == "large":
        monkeypatch.setattr(labels, "MAX_LABELS_BYTES", 10)
        Path(path).write_text("eleven bytes")
    elif kind != "missing":
        path = "x" * 5000 if kind == "long" else kind
    code, _, err = hiera("predict", "x.jpg", "-m", "hiera_nano_32", "--labels", path)
    assert code == 2 and err.count("\n") == 1 and "cannot be read" in err, err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": true, "b": false}', "'a' is not a class number"),
        ("{0.0: 'a'}", "0.0 is not a class number"),
        ('["a", true]', "True is not a class name"),
        ("['a'] * 10", "it is neither JSON nor a list or dictionary in Python"),
        ("['a', 'b']" + " " * 100 + "# long", "it is not JSON, and is too large"),
    ],
)
def test_literals_that_are_no_names_are_described(
    text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text.endswith("long"):
        monkeypatch.setattr(labels, "MAX_LITERAL_BYTES", 100)
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(UsageError, match=re.escape(f"cannot be read ({reason}")):
        labels.read_labels(tmp_path / "names.txt")


@pytest.mark.parametrize(
    "text",
    [
        "name,id\ncat,0\ndog,1\n",
        "dog;2\ncat;1\n",
        'class\tnumber\n"cat"\t0\n"dog"\t1\n',
        "cat: 0\ndog: 1\n",
    ],
)
def test_numbers_may_follow_the_names(text: str, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text(text)
    assert labels.read_labels(tmp_path / "names.txt") == ["cat", "dog"]


@pytest.mark.parametrize("text", ["type 0\ntype 1\n", "a,5\nb,9\n", "a,0\nb\n"])
def test_numbers_that_do_not_count_the_classes_are_part_of_the_name(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "names.txt").write_text(text)
    assert labels.read_labels(tmp_path / "names.txt") == text.splitlines()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.txt",
            "Käse\n".encode("utf-16")[:-1],
            r"read \(it is not in UTF-16\); save it as UTF-8",
        ),
        ("x.txt", "Käse\n".encode("latin-1"), r"\(it is not in UTF-8\); save it as UTF-8"),
        ("x.txt", bytes(range(256)), r"\(it is not a text file\); give a text file"),
        ("x.pbtxt", b"item {\n  id: 1\n}\n", r"\.pbtxt is not read; write one class name per line"),
    ],
)
def test_other_encodings_and_formats_are_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        labels.read_labels(tmp_path / name)
    with pytest.raises(UsageError, match=message):
        labels.parse_labels(content, name)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfcat\r\ndog\r\n",
        b'["cat", "dog"]',
        b'{"0": "cat", "1": "dog"}',
        b'{"cat": 0, "dog": 1}',
        b"names:\n  0: cat\n  1: dog\n",
        b"index,name\n0,cat\n1,dog\n",
        b"1 cat\n2 dog\n",
        b"n02121808 cat\nn02084071 dog\n",
    ],
)
def test_the_forms_that_the_docs_list_are_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "names.txt").write_bytes(content)
    assert labels.read_labels(tmp_path / "names.txt") == ["cat", "dog"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", "id,wnid,name\n0,n01,cat\n1,n02,dog\n"),
        ("x.csv", "class;index;desc\ncat;0;a cat\ndog;1;a dog\n"),
        ("x.csv", 'Display Name,Class ID,mid\n"cat",1,/m/1\n"dog",2,/m/2\n'),
        ("x.csv", "sep=;\r\nid;name\r\n1;dog\r\n0;cat\r\n"),
        ("x.csv", '#TYPE System.Object\r\n"id","name"\r\n"1","dog"\r\n"0","cat"\r\n'),
        ("x.csv", "name\ncat\ndog\n"),
        ("x.csv", '"class"\n"cat"\n"dog"\n'),
        ("x.txt", "# classes of my model\ncat\ndog\n"),
        ("x.txt", "- cat\n- dog\n"),
        ("x.jsonl", '{"id": 0, "name": "cat"}\n{"id": 1, "name": "dog"}\n'),
        ("x.json", '[{"name": "cat"}, {"name": "dog"}]'),
        # pandas: orient="columns", with and without a column of numbers, "index", "split", "table"
        ("x.json", '{"id": {"0": 1, "1": 0}, "name": {"0": "dog", "1": "cat"}}'),
        ("x.json", '{"name": {"1": "dog", "0": "cat"}}'),
        ("x.json", '{"1": {"name": "dog"}, "0": {"name": "cat"}}'),
        ("x.json", '{"columns": ["id", "name"], "index": [0, 1], '
         '"data": [[1, "dog"], [0, "cat"]]}'),
        ("x.json", '{"schema": {}, "data": [{"index": 0, "label": "cat"}, '
         '{"index": 1, "label": "dog"}]}'),
        ("x.json", '[{"id": 2, "name": "dog"}, {"id": 1, "name": "cat", "supercategory": "pet"}]'),
        ("coco.json", '{"images": [], "categories": [{"id": 1, "name": "cat"}, '
                      '{"id": 2, "name": "dog"}]}'),
        ("config.json", '{"model_type": "hiera", "id2label": {"0": "cat", "1": "dog"}}'),
        ("hiera.json", '{"model": "x", "classes": ["cat", "dog"]}'),
        ("x.json", '{"class_to_idx": {"dog": 1, "cat": 0}}'),
        ("data.yaml", "train: images\nnc: 2\nnames: [cat, dog]\n"),
        ("data.yaml", "nc: 2\nnames:\n  - cat\n  - dog\n"),
        ("data.yml", "names:\n  0: cat\n  1: 'dog'\n"),
        ("x.yaml", "- cat\n- dog\n"),
    ],
)  # fmt: skip
def test_names_are_found_among_other_things(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert labels.read_labels(tmp_path / name) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", "id,name\n0,cat\n5,dog\n"),  # class 5 of how many?
        ("x.json", '[{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}]'),
        ("x.json", '[{"id": 0}, {"id": 1}]'),
        ("x.txt", "{'cat', 'dog'}"),  # a set has no order
        ("x.yaml", "cat"),
        ("x.yaml", "a: [b"),
        ("x.json", '{"names": {"cat": "tom", "dog": "rex"}}'),
    ],
)
def test_names_without_an_order_are_refused(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=re.escape(f"labels {tmp_path / name} cannot be read (")):
        labels.read_labels(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", 'id,name\n0,"cat\n' + "1,dog\n" * 30_000),  # a quote that is never closed
        ("x.yaml", "- a name\n" * 200_000),
        ("x.json", '[{"id": -1, "name": "cat"}, {"id": 0, "name": "dog"}]'),
    ],
)
def test_what_cannot_be_read_is_refused_by_the_name_of_the_file(
    name: str, text: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=re.escape(f"labels {tmp_path / name} cannot be read (")):
        labels.read_labels(tmp_path / name)


def test_lines_of_any_length_and_number_take_little_time(tmp_path: Path) -> None:
    (tmp_path / "comments.txt").write_text("# x\n" * 400_000 + "cat\n")  # took minutes
    (tmp_path / "long.txt").write_text("name," * 200_000 + "id\ncat\n")
    start = time.process_time()
    assert labels.read_labels(tmp_path / "comments.txt") == ["cat"]
    assert labels.read_labels(tmp_path / "long.txt")[1:] == ["cat"]
    assert time.process_time() - start < 20


WORDS = st.text(
    st.characters(categories=["L"], include_characters=" -'"), min_size=2, max_size=12
).filter(lambda word: word == word.strip() and word[0].isalpha() and word[-1].isalpha())


def _write(kind: str, names: list[str], first: int) -> tuple[str, str]:
    """Return the name and the text of a file with these class names."""
    rows = [(str(i), f"n{i:08}", name) for i, name in enumerate(names, start=first)]
    texts = {
        "lines.txt": "\n".join(names),
        "numbers.txt": "\n".join(f"{i} {name}" for i, _, name in rows),
        "wordnet.txt": "\n".join(f"{wnid} {name}" for _, wnid, name in rows),
        "two.csv": "\n".join(["id,name", *(f"{i},{name}" for i, _, name in rows)]),
        "three.csv": "\n".join(["Class ID;wnid;Name", *map(";".join, rows)]),
        "list.json": json.dumps(names),
        "config.json": json.dumps({"id2label": dict(enumerate(names))}),
        "inverse.json": json.dumps({name: i for i, name in enumerate(names)}),
        "objects.json": json.dumps([{"id": int(i), "name": name} for i, _, name in rows]),
        "data.yaml": yaml.safe_dump({"names": dict(enumerate(names))}, allow_unicode=True),
    }
    return kind, texts[kind]


KINDS = ("lines.txt", "numbers.txt", "wordnet.txt", "two.csv", "three.csv", "list.json",
         "config.json", "inverse.json", "objects.json", "data.yaml")  # fmt: skip


@given(
    st.sampled_from(KINDS),
    st.lists(WORDS, min_size=2, max_size=6, unique_by=str.lower),
    st.sampled_from((0, 1)),
    st.sampled_from(("\n", "\r\n")),
    st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_files_of_class_names_by_generation(
    kind: str, names: list[str], first: int, line_end: str, mark: bool
) -> None:
    name, text = _write(kind, names, first)
    content = text.replace("\n", line_end).encode("utf-8-sig" if mark else "utf-8")
    assert labels.parse_labels(content, name) == names


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_names_in_utf_16(tmp_path: Path, encoding: str) -> None:
    """Excel's "Unicode text" and PowerShell's `>` write it; with or without a byte order mark."""
    for text in ("Käse\r\nBrot\r\n", "id\tname\r\n0\tKäse\r\n1\tBrot\r\n", '["Käse",\n"Brot"]'):
        (tmp_path / "names.txt").write_bytes(text.encode(encoding))
        assert labels.read_labels(tmp_path / "names.txt") == ["Käse", "Brot"]
        assert labels.parse_labels(text.encode(encoding), "names.txt") == ["Käse", "Brot"]
