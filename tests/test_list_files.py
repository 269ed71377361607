"""Lists are read in any spelling that spreadsheets, pandas, Kaggle and shells write."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hiera_core
from hiera_core.data import datasets
from hiera_core.data.list_files import as_class_number, read_list
from hiera_core.data.lists import json_rows
from hiera_core.data.sources import check_inputs, expand, from_name, names_one
from hiera_core.errors import UsageError
from hiera_core.zoo import labels

FILES = ("a b/0.png", "a b/1.png", "dog/2.JPG", "dog/it's 3, really.png", "x;y/4.png")
SAMPLES = Path(hiera_core.__file__).parent / "zoo" / "assets" / "samples"
LABELS = ("cat", "a dog", "bird, small", "10", "3.0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lists")
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


@st.composite
def spellings(draw: st.DrawFn) -> tuple[bytes, list[tuple[str, str]]]:
    """Draw a CSV file, and the files and labels that it holds."""
    pairs = draw(
        st.lists(st.tuples(st.sampled_from(FILES), st.sampled_from(LABELS)), min_size=2, max_size=6)
    )
    path_word = draw(st.sampled_from(("path", "image_id", "Filename", "img", "which one")))
    label_word = draw(st.sampled_from(("label", "class", "Target", "category_id")))
    columns = {path_word: [path for path, _ in pairs], label_word: [label for _, label in pairs]}
    order = draw(st.permutations([path_word, label_word]))
    if draw(st.booleans()):
        columns["Unnamed: 0"] = [str(i) for i in range(len(pairs))]
        order = ["Unnamed: 0", *order]
    if draw(st.booleans()):
        columns["width"] = [str(draw(st.integers(1, 999))) for _ in pairs]
        order = [*order, "width"]
    text = io.StringIO(newline="")
    writer = csv.writer(
        text,
        delimiter=draw(st.sampled_from((",", ";", "\t", "|"))),
        lineterminator=draw(st.sampled_from(("\n", "\r\n"))),
        quoting=draw(st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))),
    )
    writer.writerow(
        ["" if name == "Unnamed: 0" and draw(st.booleans()) else name for name in order]
    )
    writer.writerows(zip(*(columns[name] for name in order), strict=True))
    encoding = draw(st.sampled_from(("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be")))
    return text.getvalue().encode(encoding), pairs


@given(spellings())
@settings(deadline=None, max_examples=300)
def test_tables_in_any_spelling(
    folder: Path, spelling: tuple[bytes, list[tuple[str, str]]]
) -> None:
    content, expected = spelling
    path = folder / "list.csv"
    path.write_bytes(content)
    listed = read_list(path)
    assert [(str(f.path.relative_to(folder)), f.label) for f in listed] == expected


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("0,0.png,cat\n1,1.png,dog\n2,2.png,cat\n", ["cat", "dog", "cat"]),  # an index, no header
        ("cat,0.png\ndog,1.png\n", ["cat", "dog"]),
        ("0.png,3.0\n1.png,0.0\n", ["3.0", "0.0"]),
        ("image_id,label\n0,3\n1,1\n", ["3", "1"]),  # Kaggle's names have no extension
        ("id,breed\n0,pug\n1,collie\n", ["pug", "collie"]),
        ("train/0.png cat\ntrain/1.png dog\n", ["cat", "dog"]),
        ("0.png\tbig cat\n1.png\tdog\n", ["big cat", "dog"]),
        (".\\0.png,cat\n.\\1.png,dog\n", ["cat", "dog"]),
        ("train\\0.png,cat\ntrain\\1.png,dog\n", ["cat", "dog"]),
    ],
)
def test_lists_of_the_wild(tmp_path: Path, text: str, labels: list[str]) -> None:
    (tmp_path / "train").mkdir()
    for i in range(3):
        (tmp_path / f"train/{i}.png").touch()
        if "train" not in text and "id," not in text and "image_id" not in text:
            (tmp_path / f"{i}.png").touch()
    for ending in (".csv", ".txt"):
        path = tmp_path / f"list{ending}"
        path.write_text(text)
        listed = read_list(path)
        assert [file.label for file in listed] == labels
        assert all(file.path.is_file() for file in listed), listed


def test_doubtful_lines_are_quoted(folder: Path) -> None:
    path = folder / "doubt.csv"
    path.write_text("a b/0.png,cat\na b/1.png,\n")
    with pytest.raises(UsageError, match=r"line 2 \('a b/1.png', ''\) has no label"):
        read_list(path)
    path.write_bytes(b"\x89PNG\r\n\0\0\0")
    with pytest.raises(UsageError, match="not a text file"):
        read_list(path)
    path.write_bytes("a,b\n".encode("utf-16")[:-1])
    with pytest.raises(UsageError, match="not a text file"):
        read_list(path)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("filename,x,y,label\na.jpg,10,20,cat\nb.jpg,30,40,dog\n", ["cat", "dog"]),
        ("file,target,class\na.jpg,10,cat\nb.jpg,30,dog\n", ["cat", "dog"]),
        ("file,y\na.jpg,cat\nb.jpg,dog\n", ["cat", "dog"]),
        ("mask,image,label\nm.png,a.jpg,cat\nn.png,b.jpg,dog\n", ["cat", "dog"]),
        ("image,thumbnail,label\na.jpg,m.png,cat\nb.jpg,n.png,dog\n", ["cat", "dog"]),
        ("a.jpg,cat,\nb.jpg,dog,\n", ["cat", "dog"]),
    ],
)
def test_headers_decide_between_columns(tmp_path: Path, text: str, labels: list[str]) -> None:
    (tmp_path / "list.csv").write_text(text)
    listed = read_list(tmp_path / "list.csv")
    assert [(f.path.name, f.label) for f in listed] == list(
        zip(("a.jpg", "b.jpg"), labels, strict=True)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,caption,tag\na.jpg,hello,cat\n", "'caption' and 'tag' .* labels: line 2 .*'hello'"),
        ("file,x,y\na.jpg,1,2\n", "'x' and 'y' may both hold the labels"),
        ("a.jpg,cat,3\nb.jpg,dog,4\n", "number 2 and number 3 .* labels: line 1 "),
        ("mask,cut,label\na.png,a.jpg,cat\n", "'mask' and 'cut' may both hold the files: line 2"),
        ("a.jpg,cat\nsub, dir.jpg,dog\n", "number 1 and number 2 may both hold the files"),
    ],
)
def test_nothing_is_guessed_between_columns(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UsageError, match=rf"list\.csv: columns {message}"):
        read_list(tmp_path / "list.csv")
    if "labels" in message:
        assert read_list(tmp_path / "list.csv", labelled=False)[0].path.name == "a.jpg"


@pytest.mark.parametrize(
    "first", ["a.jpg," + "x" * 200_000, 'a.jpg,"' + "x\n" * 100_000, "a.jpg" + ",x" * 2000]
)
def test_endless_lines_are_refused(tmp_path: Path, first: str) -> None:
    (tmp_path / "list.csv").write_text(first + "\nb.jpg,y\n")
    with pytest.raises(UsageError, match=r"list\.csv: line \d+ (cannot be read|has 2001 cells)"):
        read_list(tmp_path / "list.csv")


def test_lists_may_begin_with_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("\n" * 100_000 + "a.jpg;cat\nb.jpg;dog\n")
    assert [file.label for file in read_list(tmp_path / "list.csv")] == ["cat", "dog"]


def test_class_numbers_are_bounded(tmp_path: Path) -> None:
    """A model has a weight for each class, and memory for a billion of them is not there."""
    (tmp_path / "list.csv").write_text("a.jpg,99999\nb.jpg,1\n")
    assert datasets.open_dataset(tmp_path / "list.csv").num_classes == 100_000
    (tmp_path / "list.csv").write_text("a.jpg,100000\nb.jpg,1\n")
    with pytest.raises(UsageError, match="100000 is no class number"):
        datasets.open_dataset(tmp_path / "list.csv")


def test_class_numbers() -> None:
    texts = ["3", "3.0", "003", "3.5", "-1", "²", "٣", "1e3", "9" * 30, "", "three"]
    assert [as_class_number(text) for text in texts] == [3, 3, 3, *[None] * 8]


def test_wordnet_folders_are_classes_of_imagenet() -> None:
    """A part of ImageNet, such as Imagenette, has fewer classes than the model."""
    classes = labels.class_names("imagenet1k")
    samples = datasets.MediaDataset(
        [None, None, None],  # type: ignore[list-item]
        np.array([0, 1, 1]),
        ["n01440764", "n02102040"],
    )
    found = datasets.remap_labels(samples, classes, 1000)
    assert found.labels is not None and found.labels.tolist() == [0, 217, 217]
    assert classes[217] == "English springer"
    unknown = datasets.MediaDataset(samples.sources, samples.labels, ["n01440764", "n99999999"])
    with pytest.raises(UsageError, match="knows no class 'n99999999'"):
        datasets.remap_labels(unknown, classes, 1000)


NAMES = ["cat", "dog, small", "it's a bird"]


@pytest.mark.parametrize(
    "text",
    [
        "cat\ndog, small\nit's a bird\n",
        "\ufeffcat\r\ndog, small\r\n\r\nit's a bird",
        "0 cat\n1 dog, small\n2 it's a bird\n",
        "1: cat\n2: dog, small\n3: it's a bird",
        "2\tit's a bird\n0\tcat\n1\tdog, small\n",
        'id,name\n0,cat\n1,"dog, small"\n2,it\'s a bird\n',
        "n00000001 cat\nn00000002 dog, small\nn00000003 it's a bird\n",
        '["cat", "dog, small", "it\'s a bird"]',
        '{"0": "cat", "2": "it\'s a bird", "1": "dog, small"}',
        '{"0": ["n1", "cat"], "1": ["n2", "dog, small"], "2": ["n3", "it\'s a bird"]}',
        '{"dog, small": 1, "cat": 0, "it\'s a bird": 2}',
        "{0: 'cat',\n 1: 'dog, small',\n 2: \"it's a bird\"}",
    ],
)
def test_files_of_class_names_in_any_spelling(tmp_path: Path, text: str) -> None:
    path = tmp_path / "names.txt"
    path.write_text(text, encoding="utf-8")
    assert labels.read_labels(path) == NAMES


@pytest.mark.parametrize(
    "text", ['{"0": "a", "2": "b"}', "[" * 20000, "{}", "", "[1, 2]", "{0: f()}"]
)
def test_files_of_class_names_that_cannot_be_understood(tmp_path: Path, text: str) -> None:
    path = tmp_path / "names.txt"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"names\.txt"):
        labels.read_labels(path)


def test_names_that_are_plain_numbers_stay(tmp_path: Path) -> None:
    (tmp_path / "years.txt").write_text("1999\n2003\n")
    assert labels.read_labels(tmp_path / "years.txt") == ["1999", "2003"]
    (tmp_path / "sizes.txt").write_text("10 mm\n20 mm\n")
    assert labels.read_labels(tmp_path / "sizes.txt") == ["10 mm", "20 mm"]


def test_lists_of_excel_and_of_json(folder: Path) -> None:
    path = folder / "excel.csv"
    path.write_text("sep=;\r\npath;label\r\na b/0.png;cat\r\ndog/2.JPG;dog\r\n")
    assert [file.label for file in read_list(path)] == ["cat", "dog"]
    path = folder / "list.jsonl"
    path.write_text('{"path": "a b/0.png", "label": "cat"}\n\n{"label": 3, "path": "dog/2.JPG"}\n')
    assert [file.label for file in read_list(path)] == ["cat", "3"]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("a.jpg golden retriever\nb.jpg dog\n", ["golden retriever", "dog"]),
        ("my cat.jpg cat\nb.jpg big dog\n", ["cat", "big dog"]),
        ("my cat.jpg,cat\nb.jpg,big dog\n", ["cat", "big dog"]),
        ("path,label\nmy cat.jpg,cat\nb.jpg,dog\n", ["cat", "dog"]),
        ("a.jpg cat, small\nb.jpg dog, big\n", ["cat, small", "dog, big"]),
        ("A.JPG  3\nb.jpg  4\n", ["3", "4"]),
    ],
)
def test_no_line_is_lost_to_spaces(tmp_path: Path, text: str, labels: list[str]) -> None:
    """A label with a space made the first line look like a header."""
    (tmp_path / "list.txt").write_text(text)
    listed = read_list(tmp_path / "list.txt")
    assert [file.label for file in listed] == labels
    assert all(file.path.suffix.lower() == ".jpg" for file in listed)


@pytest.mark.parametrize("name", ["a.jpg copy.jpg", "a.mp4 frames/b.jpg", "my a.jpg b (1).JPG"])
def test_a_path_ends_with_its_last_extension(tmp_path: Path, name: str) -> None:
    (tmp_path / "list.txt").write_text(f"{name} 3\n{name} golden retriever\n")
    listed = read_list(tmp_path / "list.txt")
    assert [(str(file.path.relative_to(tmp_path)), file.label) for file in listed] == [
        (name, "3"),
        (name, "golden retriever"),
    ]


WORDS = ("Class ID", "class_id", "classId", "CLASS-ID", "class idx", "class_index", "label_idx",
         "Label Name", "ground_truth", "Ground Truth", "gt", "targetName")  # fmt: skip


@given(
    st.sampled_from(WORDS),
    st.sampled_from(("Image Path", "imagePath", "FILE_NAME", "img-name", "Image Id")),
    st.permutations(["split", "score", "width"]),
    st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_headers_in_any_spelling(
    folder: Path, label: str, path: str, others: list[str], first: bool
) -> None:
    header = [label, path, *others] if first else [path, *others, label]
    rows = [[f"{i}.jpg" if word == path else f"{word}{i}" for word in header] for i in range(3)]
    text = "\n".join(",".join(row) for row in [header, *rows])
    (folder / "spelled.csv").write_text(text)
    listed = read_list(folder / "spelled.csv")
    assert [(f.path.name, f.label) for f in listed] == [
        (f"{i}.jpg", f"{label}{i}") for i in range(3)
    ]


@pytest.mark.parametrize(("no", "yes"), [("0", "1"), ("0.0", "1.0"), ("False", "True")])
@pytest.mark.parametrize("ending", ["", ".jpg"])
@pytest.mark.parametrize("index", [False, True])
def test_a_column_for_each_class(
    no: str, yes: str, ending: str, index: bool, tmp_path: Path
) -> None:
    """As competitions (ISIC) and `pandas.get_dummies` write labels."""
    for name in "abc":
        (tmp_path / f"{name}.jpg").touch()
    rows = [["image", "MEL", "NV", "BCC"]]
    for name, label in zip("abc", (2, 0, 2), strict=True):
        rows.append([name + ending, *(yes if i == label else no for i in range(3))])
    if index:
        rows = [["" if i == 0 else str(i - 1), *row] for i, row in enumerate(rows)]
    path = tmp_path / "list.csv"
    path.write_text("\n".join(map(",".join, rows)))
    listed = read_list(path)
    assert [f.label for f in listed] == ["BCC", "MEL", "BCC"]
    assert all(f.path.is_file() for f in listed)
    path.write_text(
        path.read_text() + "\n" + ",".join(["3"] * index + ["a" + ending, yes, yes, no])
    )
    with pytest.raises(UsageError, match="may both hold the labels"):
        read_list(path)  # a row with two classes


def test_columns_of_0_and_1_may_be_parts_of_the_data(tmp_path: Path) -> None:
    """A column that says whether a file is for training is no class."""
    (tmp_path / "a.jpg").touch()
    path = tmp_path / "list.csv"
    path.write_text("image,train,test\na.jpg,1,0\n")
    with pytest.raises(UsageError, match="'train' and 'test' may both hold the labels"):
        read_list(path)


def test_what_is_no_list_of_files_here_is_said(tmp_path: Path) -> None:
    """Also a table with other facts in place of labels."""
    path = tmp_path / "list.csv"
    cases: list[tuple[bytes, str]] = [
        (b"PK\3\4\0\0", "is a spreadsheet or an archive, not a text file; save it as CSV"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "is a spreadsheet or an archive"),
        (b'{"path": "a.jpg", "label": "cat"\n', "is not valid JSON"),
        (b'[\n  {"path": "a.jpg", "label": "cat"}\n', "is not valid JSON"),
        (b'{\n  "a.jpg": {"cat": 3}\n}\n', "has no label"),
        (b"path,label\nhttps://h/a.jpg,cat\n", r"line 2 is a URL \(https://h/a.jpg\)"),
        (b"path,label\ns3://b/a.jpg,cat\n", "line 2 is a URL"),
        (b"path,size\na.jpg,99\n", "line 2 .* has no label"),
        ("path,label\na.jpg,Käse\n".encode("cp1252"), "label that is not UTF-8; save it as UTF-8"),
    ]
    for content, message in cases:
        path.write_bytes(content)
        with pytest.raises(UsageError, match=message):
            read_list(path)


def test_file_urls_are_paths(folder: Path) -> None:
    path = folder / "urls.csv"
    urls = [(folder / name).as_uri() for name in FILES]
    path.write_text("\n".join(["path,label", *(f'"{url}",cat' for url in urls)]))
    assert [f.path for f in read_list(path)] == [folder / name for name in FILES]
    names = [source.path for source in expand(urls)]
    assert names == [folder / name for name in FILES]
    (listed, *_) = expand([f"file://localhost{folder}/a%20b"])
    assert listed.path == folder / "a b" / "0.png"
    assert from_name(urls[0]).path == folder / FILES[0]


def test_file_urls_mean_what_their_paths_mean(
    folder: Path, tmp_path: Path, hiera: Callable[..., tuple[int, str, str]]
) -> None:
    """Patterns, folders, lists, tar files, class names, data and weights."""
    for pattern in ("a%20b/*.png", "a b/?.png", "a%20b/%2A.png", "a%20b/[01].png"):
        found = [source.path for source in expand([f"file://{folder}/{pattern}"])]
        assert found == [folder / "a b" / "0.png", folder / "a b" / "1.png"], pattern
        check_inputs([f"file://{folder}/{pattern}"])
        assert not names_one(f"file://{folder}/{pattern}")
    assert names_one((folder / FILES[0]).as_uri()) and not names_one(folder.as_uri())
    missing = f"file://{folder}/none/*.png"
    assert not list(expand([missing]))
    with pytest.raises(UsageError, match="nothing matches"):
        check_inputs([missing])
    (tmp_path / "p*.png").touch()  # a file of this name is that file
    (tmp_path / "pa.png").touch()
    (found,) = [source.path for source in expand([(tmp_path / "p*.png").as_uri()])]
    assert found == tmp_path / "p*.png"

    for number, sample in enumerate(sorted(SAMPLES.glob("*.png"))[:2]):
        (tmp_path / f"my data/{number}").mkdir(parents=True)
        shutil.copy(sample, tmp_path / f"my data/{number}")
    data = tmp_path / "my data"
    with tarfile.open(tmp_path / "x y.tar", "w") as archive:
        archive.add(next(data.glob("1/*.png")), "three.png")
    (tmp_path / "list.txt").write_text("\n".join(map(str, data.rglob("*.png"))))
    (tmp_path / "names.txt").write_text("\n".join(f"class {n}" for n in range(10)))
    hiera_core.create_model("hiera_nano_32", pretrained=True).save_pretrained(tmp_path / "my model")
    model = ("-m", (tmp_path / "my model").as_uri(), "-q", "-f", "csv")
    labels = ("--labels", (tmp_path / "names.txt").as_uri())
    inputs = (f"@{(tmp_path / 'list.txt').as_uri()}", (tmp_path / "x y.tar").as_uri())
    code, out, err = hiera("predict", *inputs, *model, *labels)
    assert code == 0 and len(out.splitlines()) == 4 and out.count(",class ") == 15, (out, err)
    code, out, err = hiera("eval", data.as_uri(), *model)
    assert code == 0 and len(out.splitlines()) == 3, err


COCO = {
    "info": {"description": "pictures"},
    "images": [{"id": 7, "file_name": "a.png", "coco_url": "http://h/a.png"},
               {"id": 9, "file_name": "b c.png", "coco_url": "http://h/b.png"}],
    "annotations": [{"id": 1, "image_id": 9, "category_id": 20, "bbox": [0, 0, 1, 1]},
                    {"id": 2, "image_id": 7, "category_id": 18, "bbox": [0, 0, 1, 1]},
                    {"id": 3, "image_id": 7, "category_id": 18, "bbox": [0, 0, 1, 1]}],
    "categories": [{"id": 18, "name": "dog"}, {"id": 20, "name": "cat"}],
}  # fmt: skip
ROWS = [{"file_name": "a.png", "label": "dog", "w": 9}, {"file_name": "b c.png", "label": "cat"}]
VIA = {
    f"{row['file_name']}99": {"filename": row["file_name"], "size": 99, "regions": [],
                              "file_attributes": {"animal": row["label"]}}
    for row in ROWS
}  # fmt: skip
JSON_LISTS = [
    COCO,
    ROWS,
    [{"url": "http://h/x", "n": 1, **row} for row in ROWS],
    [{"image": {"path": row["file_name"], "bytes": None}, "label": [row["label"]]} for row in ROWS],
    [[row["file_name"], row["label"]] for row in ROWS],
    [["path", "label"], *([row["file_name"], row["label"]] for row in ROWS)],
    {row["file_name"]: row["label"] for row in ROWS},
    {row["label"]: [row["file_name"]] for row in ROWS},
    {key: [row[key] for row in ROWS] for key in ("file_name", "label")},
    {key: [row[name] for row in ROWS] for key, name in (("images", "file_name"), ("y", "label"))},
    {"version": 1, "classes": ["dog", "cat"], "samples": ROWS},
    {"files": [{"path": row["file_name"]} for row in ROWS], "label": ["dog", "cat"]},
    # pandas: orient="columns", "index", "split" and "table"
    {key: {str(i): row[key] for i, row in enumerate(ROWS)} for key in ("file_name", "label")},
    {str(i): row for i, row in enumerate(ROWS)},
    {"columns": ["file_name", "label"], "index": [0, 1],
     "data": [[row["file_name"], row["label"]] for row in ROWS]},
    {"schema": {"fields": []}, "data": [{"index": i, **row} for i, row in enumerate(ROWS)]},
    # The same with paths as the index: orient="columns", "index" and "split", and of one column.
    {key: {row["file_name"]: row.get(key) for row in ROWS} for key in ("label", "w")},
    {row["file_name"]: {"label": row["label"], "original": "x.png"} for row in ROWS},
    {"columns": ["w", "label"], "index": [row["file_name"] for row in ROWS],
     "data": [[None, row["label"]] for row in ROWS]},
    {"name": "label", "index": [row["file_name"] for row in ROWS],
     "data": [row["label"] for row in ROWS]},
    VIA,
    {"_via_settings": {}, "_via_img_metadata": VIA, "_via_attributes": {}},
    [{"id": i, "image": row["file_name"], "choice": row["label"]} for i, row in enumerate(ROWS)],
    [{"image": row["file_name"], "class_id": i, "class_name": row["label"], "width": 1}
     for i, row in enumerate(ROWS)],
]  # fmt: skip


@pytest.mark.parametrize("value", JSON_LISTS, ids=range(len(JSON_LISTS)))
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_lists_in_json(tmp_path: Path, value: Any, encoding: str) -> None:
    """In any layout, and by name or by content; `@list.json` has the same files."""
    for name in ("a.png", "b c.png"):
        (tmp_path / name).touch()
    for indent in (None, 2):
        for ending in (".json", ".txt"):
            path = tmp_path / f"list{ending}"
            path.write_text(json.dumps(value, indent=indent), encoding)
            listed = read_list(path)
            assert [(file.path.name, file.label) for file in listed] == [
                ("a.png", "dog"),
                ("b c.png", "cat"),
            ]
    with contextlib.chdir(tmp_path):
        assert [source.name for source in expand(["@list.json"])] == ["a.png", "b c.png"]
    assert datasets.open_dataset(tmp_path / "list.json").classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path,label\na b.png,cat\nhttps://h/c.png,dog\n", ["a b.png", "https://h/c.png"]),
        (",path,label\n0,a.png,cat\n1,b.png,dog\n", ["a.png", "b.png"]),
        ("sep=;\npath;label\na.png;cat\n", ["a.png"]),
        ('"#TYPE System.Object"\r\n"path","label"\r\n"a.png","cat"\r\n', ["a.png"]),
        ("path,label\ra.png,cat\rb.png,cat\r", ["a.png", "b.png"]),
        ("label\tpath\ncat\ta b.png\n", ["a b.png"]),
        ("path\nmy cat.png\nmy dog.png\n", ["my cat.png", "my dog.png"]),
        ("my cat.png\nmy dog.png\n", ["my cat.png", "my dog.png"]),
        ("path,label\n", []),
    ],
)
@pytest.mark.parametrize("ending", [".csv", ".tsv"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_paths_in_tables(
    tmp_path: Path, text: str, expected: list[str], ending: str, encoding: str
) -> None:
    """`@list.csv` takes the column of paths."""
    path = tmp_path / f"list{ending}"
    path.write_bytes(text.encode(encoding))
    assert [source.name for source in expand([f"@{path}"])] == expected


def test_paths_in_json_and_in_json_lines(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('["x/a.png", "https://h/b.png", "", "c"]')
    (tmp_path / "rows.jsonl").write_text('{"url": "s3://b/x", "id": 3}\n{"url": "a.png"}\n')
    (tmp_path / "names.ndjson").write_text('"a.png"\n"b.png"\n')
    (tmp_path / "rows.json").write_text('{"path": "a.png"}\n{"path": "b.png"}\n')
    (tmp_path / "one.json").write_text('{"path": "a.png", "label": "cat"}')
    for name, expected in (
        ("list.json", ["x/a.png", "https://h/b.png", "c"]),
        ("rows.jsonl", ["s3://b/x", "a.png"]),
        ("names.ndjson", ["a.png", "b.png"]),
        ("rows.json", ["a.png", "b.png"]),
        ("one.json", ["a.png"]),
    ):
        found = list(expand([f"@{tmp_path / name}"]))
        assert [source.name for source in found] == expected
        assert [source.url is not None for source in found] == ["://" in name for name in expected]
    assert [file.path.name for file in read_list(tmp_path / "rows.json", False)] == [
        "a.png",
        "b.png",
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", "[", r"x\.json is not valid JSON"),
        ("x.json", "[" * 100_000, r"x\.json is not valid JSON"),
        ("x.json", "3", r"x\.json is no list of files; give an array of paths"),
        ("x.json", "{}", "is no list of files"),
        ("x.json", '{"a": {"b": 1}, "c": 2}', "is no list of files"),
        ("x.json", '["a.png", 3]', "entry 2 is no path"),
        ("x.json", '[{"path": "a.png"}, "b.png"]', "entry 2 is no path"),
        ("x.json", '{"images": [{"file_name": "a.png", "id": 1}], "annotations": [{}]}', "COCO"),
        ("x.json", '[{"a": "a.png", "b": "b.png", "label": 1}]', "may both hold the files"),
        ("x.json", '[{"path": "a.png", "label": ["a", "b"]}]', "entry 1 .* has no label"),
        (
            "x.json",
            '[{"path": "a.png", "label": 1}, {"path": ["b.png", "c.png"], "label": 1}]',
            "entry 2 .* has no path",
        ),
        ("x.json", '{"path": ["a.png"], "label": ["cat", "dog"]}', "entry 2 .* has no path"),
        ("x.jsonl", '{"path": "a.png", "label": 1}\n' * 30 + '{"file": "b.png"}', "31 .* no path"),
        (
            "x.json",
            '{"train": ["a.png"], "val": ["b.png"]}',
            "parts of a data set .* no classes",
        ),
        ("x.json", '[{"path": "a.png", "label": ["a", "b"]}]', "has no label; give each path a"),
        ("x.json", '[{"label": "cat"}]', r"no column holds paths \(label\)"),
        ("x.jsonl", '{"path": "a.png", "label": 1}\n{"path"', "line 2 is not valid JSON"),
        ("x.jsonl", '{"path": "a.png", "label": 1}\n7\n', "line 2 is no path"),
        ("x.jsonl", '{"path": "http://h/a.png", "label": 1}', "line 1 is a URL"),
    ],
)
def test_mistakes_in_lists_in_json(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_list(path)


def test_images_of_several_categories_have_no_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value: Any = json.loads(json.dumps(COCO))
    value["annotations"][1]["category_id"] = 20
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UsageError, match=r"a\.png has annotations of several .*'cat', 'dog'"):
        read_list(path)
    assert len(read_list(path, labelled=False)) == 2
    monkeypatch.setattr(json_rows, "MAX_JSON_BYTES", 100)
    (source,) = expand([f"@{path}"])
    assert source.error is not None and "too large for JSON" in source.error.message
    (source,) = expand([f"@{tmp_path / 'missing.json'}"])
    assert source.error is not None and "no such file" in source.error.message


@pytest.mark.parametrize(
    "value",
    [
        [{"path": f"{i}.png", "label": "cat", f"key{i}": 1} for i in range(1500)],
        {"path": {"0": "a.png"}, **{f"key{i}": {f"row{i}": 1} for i in range(1500)}},
        [["a.png", *["1"] * 1500]] * 3,
    ],
    ids=["objects", "columns", "arrays"],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_columns_in_json_are_limited(tmp_path: Path, value: Any, labelled: bool) -> None:
    """Each row has a cell for each column: time and memory would grow as their product."""
    path = tmp_path / "x.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UsageError, match=r"x\.json has 150[1-3] columns, more than 1000"):
        read_list(path, labelled)


def test_halves_of_characters_in_json_are_no_names(tmp_path: Path) -> None:
    """JSON may hold them, and no file can have such a name. Bytes that are not UTF-8 stay."""
    path = tmp_path / "x.json"
    path.write_text(r'[["\ud800.png", "\udfff"], ["\udcff.png", "cat"], ["\ud83d\ude00.png", "x"]]')
    listed = [(file.path.name, file.label) for file in read_list(path)]
    assert listed == [("\ufffd.png", "\ufffd"), ("\udcff.png", "cat"), ("\U0001f600.png", "x")]
