"""Tests of the callables for engines: the numbers of `predict` and `features`, one row an input."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import hiera_core
from hiera_core import zoo
from hiera_core.data.clip_reader import read_segments
from hiera_core.data.transforms import VideoTransform
from hiera_core.errors import CheckpointError, UsageError
from hiera_core.inference import Classifier, Decoder, Embedder
from hiera_core.inference.columns.decoded_fit import check_fits
from hiera_core.inference.decoded_input import DecodedInput
from hiera_core.records import Record

SAMPLES = Path(hiera_core.__file__).parent / "zoo/assets/samples"
PICTURES = [str(SAMPLES / name) for name in ("eight.png", "cat.jpg", "three.png")]
CLIP = str(SAMPLES / "moving_right.mp4")
DAMAGED = str(Path(hiera_core.__file__))
OPTIONS = {"dtype": "fp32", "workers": 1, "batch_size": 2}


def column(values: list[object]) -> np.ndarray:
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """The embeddings of `PICTURES`."""
    found = hiera_core.features(PICTURES, "hiera_nano_32", **OPTIONS)
    return np.stack([one["embedding"].numpy() for one in found])


@pytest.mark.parametrize("form", ["path", "bytes", "image", "decoded"])
def test_embeddings_are_those_of_features(form: str, vectors: np.ndarray) -> None:
    from PIL import Image

    paths = np.array(PICTURES)
    values = {
        "path": paths,
        "bytes": column([Path(path).read_bytes() for path in PICTURES]),
        "image": column([np.array(Image.open(path).convert("RGB")) for path in PICTURES]),
        "decoded": Decoder("hiera_nano_32", workers=1)({"path": paths})["decoded"],
    }[form]
    embedder = pickle.loads(pickle.dumps(Embedder("hiera_nano_32", **OPTIONS)))
    found = embedder({form: values, "key": np.arange(3)})
    assert list(found["status"]) == ["ok"] * 3 and list(found["error"]) == [""] * 3
    assert (found["key"] == np.arange(3)).all()
    assert ("path" in found) == (form == "path")  # pixels and content end here
    assert found["embedding"].dtype == np.float32
    np.testing.assert_allclose(found["embedding"], vectors, atol=1e-6)


def test_a_damaged_value_costs_its_row_only(vectors: np.ndarray) -> None:
    good = list(Decoder("hiera_nano_32", workers=1)({"path": np.array(PICTURES)})["decoded"])
    other = Decoder("mae_hiera_nano_8x32", workers=1)({"path": np.array([CLIP])})["decoded"][0]
    length = int.from_bytes(good[0][16:24], "little")
    header = json.loads(good[0][24 : 24 + length])

    def packed(**changes: object) -> bytes:
        text = json.dumps({**header, **changes}).encode()
        return good[0][:16] + len(text).to_bytes(8, "little") + text + good[0][24 + length :]

    record = header["record"]
    bad = {
        "no bytes": None,
        "they begin otherwise": b"nothing",
        "its record is none": packed(record={**record, "input": 5}),
        "the model takes 32x32x3": packed(arrays=[{"dtype": "uint8", "shape": [16, 16, 3]}]),
        "float32 pixels": packed(arrays=[{"dtype": "float32", "shape": [8, 32, 3]}]),
        "an image of shape": packed(arrays=[{"dtype": "uint8", "shape": [3072]}]),
        "an image in the record of a video": packed(record={**record, "kind": "video"}),
        "not the bytes": packed(arrays=[{"dtype": "uint8", "shape": [2**62, 2**62, 3]}]),
        "a video without segments": packed(image=None, segments=[]).replace(
            b'"image": ', b'"other": '
        ),
        "takes pictures": other,
    }
    values = [good[0], *bad.values(), *good[1:]]
    found = Embedder("hiera_nano_32", **OPTIONS)({"decoded": column(values)})
    for row, reason in enumerate(bad, start=1):
        assert found["status"][row] == "error" and reason in found["error"][row], (row, found)
    rows = [0, len(bad) + 1, len(bad) + 2]
    assert [found["status"][row] for row in rows] == ["ok"] * 3
    np.testing.assert_allclose(found["embedding"][rows], vectors, atol=1e-6)


def test_clips_of_another_model_cost_their_row_only() -> None:
    decode = Decoder("hiera_nano_8x32", workers=1)
    (good,) = decode({"path": np.array([CLIP])})["decoded"]
    length = int.from_bytes(good[16:24], "little")
    header = json.loads(good[24 : 24 + length])
    (segment,) = header["segments"]

    def packed(**changes: object) -> bytes:
        text = json.dumps({**header, "segments": [{**segment, **changes}]}).encode()
        return good[:16] + len(text).to_bytes(8, "little") + text + good[24 + length :]

    bad = {
        "views of 16x16 pixels": packed(size=[16, 16]),
        "a crop lies outside": packed(boxes=[[1000, 0]]),
        "without views": packed(boxes=[]),
        "not the bytes": packed(scaled=[1]),
        "frames that become 200000x200000": packed(scaled=[200000, 200000]),
    }
    values = column([*bad.values(), good])
    found = Classifier("hiera_nano_8x32", **OPTIONS)({"decoded": values})
    for row, reason in enumerate(bad):
        assert found["status"][row] == "error" and reason in found["error"][row], (row, found)
    assert found["label"][len(bad)] == "moving right"


@pytest.mark.parametrize("size", [(20, 48), (48, 20), (100, 150)])
@pytest.mark.parametrize("crops", [1, 3])
def test_small_frames_are_what_a_model_takes(size: tuple[int, int], crops: int) -> None:
    """They travel as they are, and are resized where the model is."""
    known = zoo.get("hiera_base_16x224")
    transform = VideoTransform.from_preprocessing(known.preprocessing, known.config["input_size"])
    frames = np.zeros((70, *size, 3), np.uint8)
    _, segments = read_segments(frames, hiera_core.Sampling(crops=crops), transform)
    for segment in segments:
        assert segment.views.scaled is not None
        decoded = DecodedInput(Record("clip", 0, "", "video"), segments=iter([segment]))
        check_fits(decoded, lambda kind: SimpleNamespace(transform=transform))


def test_a_device_that_fails_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row is at fault, and rows with an error would be taken for done."""
    decoded = Decoder("hiera_nano_32", workers=1)({"path": np.array(PICTURES)})["decoded"]
    embed = Embedder("hiera_nano_32", **OPTIONS)

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(embed.pipeline.runner("image"), "_batches", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        embed({"decoded": decoded})


@pytest.mark.parametrize("decodes", [False, True])
def test_an_error_stays_in_its_row(decodes: bool, vectors: np.ndarray) -> None:
    missing = str(SAMPLES / "missing.png")
    batch = {"path": np.array([PICTURES[0], DAMAGED, PICTURES[1], CLIP, missing])}
    if decodes:
        batch = Decoder("hiera_nano_32", workers=1)(batch)
    found = Embedder("hiera_nano_32", **OPTIONS)(batch)
    assert list(found["status"]) == ["ok", "error", "ok", "error", "error"]
    np.testing.assert_allclose(found["embedding"][[0, 2]], vectors[:2], atol=1e-6)
    assert np.isnan(found["embedding"][[1, 3, 4]]).all()
    messages = found["error"][[1, 3, 4]]
    for message, part in zip(messages, ("not a picture", "a video", "no such file"), strict=True):
        assert part in message


def test_a_batch_of_errors_has_the_columns_of_any_other() -> None:
    batch = {"path": np.array([DAMAGED, DAMAGED])}
    assert Embedder("hiera_nano_32", **OPTIONS)(batch)["embedding"].shape == (2, 96)
    assert Embedder("hiera_nano_8x32", **OPTIONS)(batch)["embedding"].shape == (2, 96)
    found = Classifier("hiera_nano_32", topk=3, **OPTIONS)(batch)
    assert (found["topk_id"] == -1).all() and np.isnan(found["topk_prob"]).all()
    assert found["topk_label"].shape == (2, 3) and list(found["label"]) == ["", ""]


@pytest.mark.parametrize("decodes", [False, True])
def test_classes_are_those_of_predict(decodes: bool) -> None:
    batch = {"path": np.array([CLIP, DAMAGED])}
    records = hiera_core.predict([CLIP, DAMAGED], "hiera_nano_8x32", topk=3, **OPTIONS)
    if decodes:
        batch = Decoder("hiera_nano_8x32", workers=1)(batch)
    found = Classifier("hiera_nano_8x32", topk=3, **OPTIONS)(batch)
    assert list(found["topk_id"][0]) == [one["id"] for one in records[0]["topk"]]
    assert list(found["topk_label"][0]) == [one["label"] for one in records[0]["topk"]]
    probabilities = [one["prob"] for one in records[0]["topk"]]
    np.testing.assert_allclose(found["topk_prob"][0], probabilities, atol=1e-6)
    assert records[1]["error"] is not None
    assert found["error"][1] == f"{records[1]['error']['message']}; {records[1]['error']['hint']}"


def test_segments_are_decoded_where_the_model_is() -> None:
    sampling = hiera_core.Sampling(segments=0.5)
    options = {**OPTIONS, "sampling": sampling}
    decoded = Decoder("hiera_nano_8x32", sampling=sampling)({"path": np.array([CLIP])})
    records = Classifier("hiera_nano_8x32", **options).records(decoded)
    (expected,) = [hiera_core.predict(CLIP, "hiera_nano_8x32", **options)]
    assert records[0].to_json() == expected


def test_mistakes_are_named(tmp_path: Path) -> None:
    embedder = Embedder("hiera_nano_32", **OPTIONS)
    with pytest.raises(UsageError, match=r"no column is named decoded.*column=.*'file'"):
        embedder({"file": np.array(PICTURES)})
    with pytest.raises(UsageError, match="there is no column 'file'; there are 'path'"):
        Embedder("hiera_nano_32", column="file")({"path": np.array(PICTURES)})
    with pytest.raises(UsageError, match="of type int"):
        Embedder("hiera_nano_32", column="n")({"n": column([3])})
    with pytest.raises(UsageError, match="one vector"):
        every = hiera_core.Sampling(every=1.0)
        Embedder("hiera_nano_32", sampling=every)({"path": np.array([CLIP])})
    with pytest.raises(UsageError, match="give one of both"):
        Embedder("hiera_nano_32", checkpoint="x.pth", random_init=True)
    (tmp_path / "empty.pth").touch()
    lazy = Embedder(checkpoint=tmp_path / "empty.pth")  # read in the worker, not here
    with pytest.raises(CheckpointError):
        lazy({"path": np.array(PICTURES)})


def test_random_weights_are_those_of_every_worker() -> None:
    batch = {"path": np.array(PICTURES[:1])}
    first, second = (Embedder("hiera_nano_32", random_init=True, **OPTIONS) for _ in range(2))
    assert (first(batch)["embedding"] == second(batch)["embedding"]).all()


def test_no_engine_is_imported() -> None:
    code = (
        "import sys; from hiera_core.inference import Classifier, Decoder, Embedder\n"
        "Embedder('hiera_nano_32')\n"
        "assert not {'ray', 'daft', 'pyarrow', 'pandas', 'pyspark'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_callables_run_in_daft(vectors: np.ndarray) -> None:
    daft = pytest.importorskip("daft")

    @daft.cls
    class Embed:
        def __init__(self) -> None:
            self.decode = Decoder("hiera_nano_32", workers=1)
            self.embed = Embedder("hiera_nano_32", **OPTIONS)
            self.classify = Classifier("hiera_nano_32", **OPTIONS)

        @daft.method.batch(return_dtype=daft.DataType.binary())
        def decoded(self, path: daft.Series) -> list[bytes]:
            return list(self.decode({"path": column(path.to_pylist())})["decoded"])

        @daft.method.batch(return_dtype=daft.DataType.embedding(daft.DataType.float32(), 96))
        def embedding(self, decoded: daft.Series) -> list[np.ndarray]:
            return list(self.embed({"decoded": column(decoded.to_pylist())})["embedding"])

        @daft.method.batch(return_dtype=daft.DataType.string())
        def label(self, decoded: daft.Series) -> list[str]:
            return list(self.classify({"decoded": column(decoded.to_pylist())})["label"])

    embed = Embed()
    frame = daft.from_pydict({"path": [*PICTURES, DAMAGED]})
    frame = frame.with_column("decoded", embed.decoded(frame["path"]))
    frame = frame.with_column("embedding", embed.embedding(frame["decoded"]))
    found = frame.with_column("label", embed.label(frame["decoded"])).to_pydict()
    np.testing.assert_allclose(np.stack(found["embedding"][:3]), vectors, atol=1e-6)
    assert np.isnan(found["embedding"][3]).all()
    assert found["label"][0] == "eight" and found["label"][3] == ""
