"""Tests of indices: one compact form for folders, lists and tar files, opened again from disk."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hiera_core.data import datasets
from hiera_core.data.indexed import index_cache, sections
from hiera_core.data.indexed.sample_index import IndexWriter, SampleIndex
from hiera_core.errors import UsageError

LONG_AGO = 1_000_000_000


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Indices of 10 samples and more are kept, in a folder of the test."""
    monkeypatch.setenv("HIERA_INDEX_FOLDER", str(tmp_path / "indices"))
    monkeypatch.setattr(index_cache, "KEPT_SAMPLES", 10)
    return tmp_path / "indices"


def make_folder(root: Path, count: int = 6) -> Path:
    """Make two class folders of empty files. They are old, so that their times can be trusted."""
    for name in ("cat", "dog"):
        (root / name / "deep").mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.jpg").touch()
        (root / name / "deep" / "0.png").touch()
    age(root)
    return root


def age(root: Path) -> None:
    for folder in (root, *(p for p in root.rglob("*") if p.is_dir())):
        os.utime(folder, (LONG_AGO, LONG_AGO))


def make_list(
    path: Path, count: int, label: Callable[[int], object] = lambda i: f"c{i % 7}"
) -> Path:
    path.write_text("path,label\n" + "".join(f"in/{i}.jpg,{label(i)}\n" for i in range(count)))
    return path


def make_tar(path: Path, names: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in names.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def make_shards(folder: Path, count: int = 8) -> Path:
    folder.mkdir()
    for shard in range(2):
        names = {}
        for number in range(count):
            names[f"{number}.jpg"] = f"picture {shard} {number}".encode()
            names[f"{number}.cls"] = str(number % 3).encode()
        make_tar(folder / f"s-{shard}.tar", names)
    return folder


def built(samples: datasets.MediaDataset) -> str:
    """Return what identifies the index that a data set comes from."""
    assert isinstance(samples.sources, SampleIndex)
    name: str = samples.sources._sections.facts["build"]
    return name


def is_on_disk(samples: datasets.MediaDataset) -> bool:
    assert isinstance(samples.sources, SampleIndex)
    return isinstance(samples.sources._sections, sections.SectionsInFile)


MAKERS: dict[str, Callable[[Path], Path]] = {
    "folder": lambda root: make_folder(root / "data"),
    "list": lambda root: make_list(root / "list.csv", 20),
    "shards": lambda root: make_shards(root / "data"),
}
CHANGES: dict[str, Callable[[Path], object]] = {
    "folder": lambda data: (data / "dog/deep/new.jpg").touch(),
    "list": lambda data: make_list(data, 21),
    "shards": lambda data: make_tar(data / "s-1.tar", {"9.jpg": b"x", "9.cls": b"1"}),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_an_index_is_opened_again_and_built_again_when_its_data_changes(
    tmp_path: Path, kind: str
) -> None:
    data = MAKERS[kind](tmp_path)
    first, second = datasets.open_dataset(data), datasets.open_dataset(data)
    assert is_on_disk(first) and built(first) == built(second)
    assert [s.name for s in first.sources] == [s.name for s in second.sources]
    assert first.labels is not None and second.labels is not None
    assert first.labels.tolist() == second.labels.tolist() and first.classes == second.classes
    without = datasets.open_dataset(data, labelled=False)
    assert without.labels is None and built(without) != built(first)
    CHANGES[kind](data)
    third = datasets.open_dataset(data)
    assert built(third) != built(first) and len(third) != len(first)
    # What was opened before the change still is what it was.
    assert [s.name for s in second.sources] == [s.name for s in first.sources]


@pytest.mark.parametrize("kind", MAKERS)
def test_small_data_sets_write_nothing_and_are_the_same(
    tmp_path: Path, own_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    data = MAKERS[kind](tmp_path)
    kept = datasets.open_dataset(data)
    assert is_on_disk(kept)
    monkeypatch.setattr(index_cache, "KEPT_SAMPLES", 1000)
    monkeypatch.setenv("HIERA_INDEX_FOLDER", str(own_folder / "other"))
    small = datasets.open_dataset(data)
    assert not is_on_disk(small) and not (own_folder / "other").exists()
    assert [*small.sources] == [*kept.sources]
    assert small.labels is not None and kept.labels is not None
    assert small.labels.tolist() == kept.labels.tolist() and small.classes == kept.classes
    for samples in (small, kept):
        again = pickle.loads(pickle.dumps(samples))
        assert [*again.sources] == [*samples.sources]
        with pytest.raises(IndexError):
            samples.sources[len(samples)]
        assert samples.sources[-1] == samples.sources[len(samples) - 1]


def test_samples_are_those_of_the_files(tmp_path: Path) -> None:
    samples = datasets.open_dataset(make_folder(tmp_path / "data"))
    names = [str(s.path.relative_to(tmp_path / "data")) for s in samples.sources if s.path]
    cats = [f"cat/{n}.jpg" for n in range(6)] + ["cat/deep/0.png"]
    assert names == cats + [name.replace("cat", "dog") for name in cats]
    assert samples.labels is not None and samples.labels.tolist() == [0] * 7 + [1] * 7
    shards = datasets.open_dataset(make_shards(tmp_path / "shards"))
    assert shards.sources[11].content() == b"picture 1 3"
    assert shards.labels is not None and shards.labels.dtype == np.int64
    assert shards.labels[11] == 0 and shards.num_classes == 3


def test_a_folder_that_was_changed_just_now_is_listed_again(tmp_path: Path) -> None:
    """Its time could be the same after another change."""
    data = make_folder(tmp_path / "data")
    os.utime(data / "cat")
    assert built(datasets.open_dataset(data)) != built(datasets.open_dataset(data))


def test_files_of_a_list_that_move_are_found_again(tmp_path: Path) -> None:
    path = make_list(tmp_path / "list.csv", 20)
    (tmp_path / "images/in").mkdir(parents=True)
    (tmp_path / "images/in/0.jpg").touch()
    assert datasets.open_dataset(path).sources[1].path == tmp_path / "images/in/1.jpg"
    (tmp_path / "images").rename(tmp_path / "other")
    assert datasets.open_dataset(path).sources[1].path == tmp_path / "other/in/1.jpg"


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "gone"])
def test_a_damaged_index_is_built_again(tmp_path: Path, own_folder: Path, damage: str) -> None:
    data = make_list(tmp_path / "list.csv", 20)
    first = datasets.open_dataset(data)
    (path,) = own_folder.iterdir()
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes({"cut": content[:-40], "empty": b"", "text": b"text" * 100}[damage])
    again = datasets.open_dataset(data)
    assert built(again) != built(first) and len(again) == 20


def test_an_index_that_cannot_be_kept_is_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HIERA_INDEX_FOLDER", str(tmp_path / "file/indices"))
    samples = datasets.open_dataset(make_list(tmp_path / "list.csv", 20))
    assert len(samples) == 20 and not is_on_disk(samples)
    assert "is not kept for the next run" in caplog.text


def test_processes_build_an_index_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for the one that has claimed it."""
    monkeypatch.setattr(index_cache, "WAIT_S", 0.01)
    path = make_list(tmp_path / "list.csv", 20)
    kept = index_cache.IndexRequest._keep
    writes: list[int] = []

    def slowly(self: index_cache.IndexRequest, *arguments: object) -> SampleIndex:
        writes.append(1)
        time.sleep(0.3)
        return kept(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(index_cache.IndexRequest, "_keep", slowly)
    found: list[datasets.MediaDataset] = []
    threads = [
        threading.Thread(target=lambda: found.append(datasets.open_dataset(path))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len({built(each) for each in found}) == 1 and len(writes) == 1


def test_indices_that_nobody_opens_are_removed(
    tmp_path: Path, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets.open_dataset(make_list(tmp_path / "old.csv", 20))
    (old,) = own_folder.iterdir()
    os.utime(old, (LONG_AGO, LONG_AGO))
    datasets.open_dataset(make_list(tmp_path / "new.csv", 20))
    assert not old.exists() and len(list(own_folder.iterdir())) == 1


def test_labels_are_numbered_as_before(tmp_path: Path) -> None:
    words = datasets.open_dataset(make_list(tmp_path / "a.csv", 20, lambda i: "zyx"[i % 3]))
    assert words.classes == ["x", "y", "z"] and words.labels is not None
    assert words.labels[:4].tolist() == [2, 1, 0, 2]
    numbers = datasets.open_dataset(make_list(tmp_path / "b.csv", 20, lambda i: i % 5 * 2))
    assert numbers.classes is None and numbers.num_classes == 9
    large = make_list(tmp_path / "c.csv", 20, lambda i: 10**8)
    with pytest.raises(UsageError, match="label 100000000 is no class number"):
        datasets.open_dataset(large)


def test_memory_does_not_grow_with_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building keeps a buffer for each section, and opening keeps nothing."""
    monkeypatch.setattr(sections, "BUFFER", 1 << 12)

    def memory(count: int) -> tuple[int, int]:
        """Return the peaks of building an index, and of opening and reading it, in bytes."""
        path = make_list(tmp_path / f"{count}.csv", count)
        peaks = []
        for _ in range(2):
            tracemalloc.start()
            samples = datasets.open_dataset(path)
            for number in range(0, count, 37):
                assert samples.sources[number].name.endswith(f"in/{number}.jpg")
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert len(samples) == count and is_on_disk(samples)
        return peaks[0], peaks[1]

    memory(100)  # what is imported now is not counted
    few, many = memory(2_000), memory(12_000)
    assert many[0] - few[0] < 20 * 10_000, "a path alone takes 300 bytes"
    assert many[1] - few[1] < 20_000 and many[1] < 200_000


def test_sections_can_be_changed_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "BUFFER", 64)
    writer = sections.SectionWriter(None)
    for number in range(100):
        assert writer.write(number.to_bytes(8, "little")) == 8 * number
    writer.change(lambda old: (np.frombuffer(old, np.int64) + 1).tobytes())
    assert np.frombuffer(writer.content(), np.int64).tolist() == [*range(1, 101)]
    writer.close()


def test_names_of_any_bytes_come_back() -> None:
    writer = IndexWriter("files", labelled=False)
    names = ["ä.jpg", os.fsdecode(b"\xff\xfe.jpg"), "a b.jpg", "." * 200 + ".jpg"]
    place = writer.add_place("/data/ü")
    for name in names:
        writer.add(place, name, None)
    index = writer.in_memory()
    assert [s.path for s in index] == [Path("/data/ü") / name for name in names]


def test_an_index_whose_sections_are_too_short_is_built_again(
    tmp_path: Path, own_folder: Path
) -> None:
    folder = make_folder(tmp_path / "data")
    count = len(datasets.open_dataset(folder))
    (path,) = own_folder.glob("*.index")
    kept = path.read_bytes()
    length = int.from_bytes(kept[-16:-8], "little")
    header = json.loads(kept[-16 - length : -16])
    damaged = [b"[" * 5000, b'{"facts": [], "sections": 3}']
    for fact in ("count", "places"):
        facts = header["facts"] | {fact: 1000}
        damaged.append(json.dumps(header | {"facts": facts}).encode())
    for text in damaged:
        end = text + len(text).to_bytes(8, "little") + kept[-8:]
        path.write_bytes(kept[: -16 - length] + end)
        assert len(datasets.open_dataset(folder)) == count
        assert path.read_bytes()[-8:] == kept[-8:] and len(path.read_bytes()) == len(kept)


def test_files_of_the_user_beside_indices_stay(tmp_path: Path, own_folder: Path) -> None:
    own_folder.mkdir()
    for name in ("mine.index", "mine.content", "c" * 32 + ".index"):
        (own_folder / name).write_text("mine")
        os.utime(own_folder / name, (LONG_AGO, LONG_AGO))
    datasets.open_dataset(make_folder(tmp_path / "data"))
    assert {p.name for p in own_folder.iterdir()} > {"mine.index", "mine.content"}
    assert not (own_folder / ("c" * 32 + ".index")).exists()


def test_a_pattern_that_matches_no_tar_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing matches"):
        datasets.open_dataset(f"{tmp_path}/none-*.tar")
