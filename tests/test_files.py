"""Tests of the readers of weights: code in pickles, damage, and files that claim too much."""

from __future__ import annotations

import argparse
import codecs
import functools
import importlib
import io
import json
import operator
import os
import pickle
import pty
import random
import re
import runpy
import struct
import subprocess
import tarfile
import webbrowser
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import hiera_core
from hiera_core.errors import CheckpointError, UsageError
from hiera_core.weights import files, state_dict
from hiera_core.weights.integrity import DamagedFile, check_weights_file

from .conftest import SMALL, draw_weights

Command = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parent.parent


class Call:
    """Object that calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def in_array(item: Any) -> np.ndarray:
    objects = np.empty(1, dtype=object)
    objects[0] = item
    return objects


def in_torch(item: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(item, buffer)
    return buffer.getvalue()


def touch(trap: Path) -> str:
    return f"touch {trap}"


# By kind, an object that creates the file `trap` when it is unpickled.
GADGETS: dict[str, Callable[[Path], Any]] = {
    "os.system": lambda trap: Call(os.system, touch(trap)),
    "os.mkdir": lambda trap: Call(os.mkdir, str(trap)),
    "subprocess": lambda trap: Call(subprocess.call, ["touch", str(trap)]),
    "eval": lambda trap: Call(eval, f"__import__('os').system({touch(trap)!r})"),
    "exec": lambda trap: Call(exec, f"open({str(trap)!r}, 'w')"),
    "open": lambda trap: Call(open, str(trap), "w"),
    "Path.touch": lambda trap: Call(Path.touch, trap),
    "codecs.open": lambda trap: Call(codecs.open, str(trap), "w"),
    "methodcaller": lambda trap: Call(operator.methodcaller("touch"), trap),
    "pickle.loads": lambda trap: Call(pickle.loads, pickle.dumps(Call(os.system, touch(trap)))),
    "numpy objects": lambda trap: in_array(Call(os.system, touch(trap))),
    "functools.partial": lambda trap: Call(functools.partial(os.system, touch(trap))),
    "importlib": lambda trap: Call(importlib.import_module, "antigravity"),
    "runpy": lambda trap: Call(runpy.run_path, str(trap.with_name("script.py"))),
    "pty.spawn": lambda trap: Call(pty.spawn, ["touch", str(trap)]),
    "webbrowser": lambda trap: Call(webbrowser.open, f"file://{trap}"),
    "torch.load": lambda trap: Call(
        functools.partial(torch.load, weights_only=False),
        io.BytesIO(in_torch(Call(os.system, touch(trap)))),
    ),
    "torch.hub.load": lambda trap: Call(
        functools.partial(torch.hub.load, source="local"), str(trap.parent), "x"
    ),
    "load_from_bytes": lambda trap: Call(
        torch.storage._load_from_bytes, in_torch(Call(os.system, touch(trap)))
    ),
    "rebuild_from_type": lambda trap: Call(
        torch._tensor._rebuild_from_type_v2, os.system, str, (touch(trap),), {}
    ),
    "rebuild_parameter": lambda trap: Call(
        torch._utils._rebuild_parameter_with_state, Call(os.system, touch(trap)), 1, 2, 3
    ),
}


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Path]:
    """Return a path that no test may create."""
    path = tmp_path / "trap"
    (tmp_path / "script.py").write_text(f"open({str(path)!r}, 'w').close()")
    (tmp_path / "hubconf.py").write_text(f"open({str(path)!r}, 'w').close()")
    yield path
    assert not path.exists(), "code in a file was run"


@pytest.mark.parametrize("kind", GADGETS)
def test_no_code_in_a_checkpoint_runs(
    kind: str, trap: Path, tmp_path: Path, hiera: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    gadget = GADGETS[kind](trap)
    folder = tmp_path / "folder"
    folder.mkdir()
    content = {"model_state": {"norm.weight": torch.ones(3)}, "x": gadget}
    torch.save(content, folder / "pytorch_model.bin")
    torch.save(gadget, tmp_path / "bare.pth")
    torch.save(content, tmp_path / "zipped.pt")
    torch.save(content, tmp_path / "named.safetensors")
    torch.save({"a": torch.nn.Parameter(torch.ones(1)), 3: gadget}, tmp_path / "key.pth")
    torch.save(content, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    for protocol in (2, 4):
        with (tmp_path / f"pickle{protocol}.bin").open("wb") as file:
            pickle.dump(content, file, protocol)
    for path in (folder, *tmp_path.glob("*.p*"), *tmp_path.glob("*.safetensors")):
        if path.suffix == ".py":
            continue
        code, _, err = hiera("predict", "x.jpg", "--checkpoint", path)
        assert code == 3 and err.count("\n") == 1 and "unexpected" not in err, (path, err)
        assert not trap.exists(), path


@pytest.mark.parametrize("kind", ["os.system", "numpy objects", "torch.load"])
def test_no_code_in_other_files_runs(
    kind: str, trap: Path, tmp_path: Path, hiera: Command, small_folder: Path
) -> None:
    """Arrays, members of tar files, labels, configurations, inputs and recipes."""
    gadget = GADGETS[kind](trap)
    raw = pickle.dumps(gadget)
    from hiera_core.inference import feature_formats

    for name in ("a.npz", "b.npz"):
        path = tmp_path / name
        path.write_bytes(raw)
        if name == "b.npz":
            np.savez(path, metadata=in_array(gadget), embedding=in_array(gadget))
        with pytest.raises((ValueError, pickle.UnpicklingError)):
            feature_formats._read_npz(path)
        with pytest.raises(UsageError, match="not a file of features"):
            feature_formats.read_metadata(path)
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "s-0.tar", "w") as archive:
        for name, content in (("0.png", raw), ("0.cls", raw), ("1.png", raw), ("1.cls", b"1")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    assert hiera("eval", tmp_path / "data", "-m", "hiera_nano_32", "-q")[0] in (1, 2)
    (tmp_path / "x.png").write_bytes(raw)
    code, out, _ = hiera("predict", tmp_path / "x.png", "-m", "hiera_nano_32", "-q")
    assert code == 1 and json.loads(out)["status"] == "error"
    (tmp_path / "labels").write_bytes(raw)
    options = ["-m", "hiera_nano_32", "--labels", tmp_path / "labels"]
    assert hiera("predict", "x.jpg", *options)[0] in (1, 2)
    for name in ("hiera.json", "config.json"):
        folder = tmp_path / name.removesuffix(".json")
        folder.mkdir()
        for path in small_folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / name).write_bytes(raw)
        assert hiera("predict", "x.jpg", "-m", folder)[0] == 3
    (tmp_path / "recipe.yaml").write_bytes(raw)
    assert hiera("train", tmp_path / "recipe.yaml", "digits")[0] == 2
    assert hiera("predict", "x.jpg", "--config", tmp_path / "recipe.yaml")[0] == 2


def test_no_module_reads_pickles_without_a_list_of_allowed_types() -> None:
    for path in [*ROOT.glob("hiera_core/**/*.py"), *ROOT.glob("hiera_cli/**/*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"pickle\.loads?\(|allow_pickle\s*=\s*True|unsafe_load", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, (path, call)


def _text(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(text)) + text.encode()


# By kind, a value in a pickle, which NumPy would read as a pointer that leads nowhere, and as the
# size of an array of 3 GB.
NUMPY_VALUES = {
    "pointer": b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n"
    + (_text("O8") + b"\x89\x88\x87R" + b"(K\x03" + _text("|"))
    + (b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb" + b"c_codecs\nencode\n")
    + (_text("A" * 8) + _text("latin1") + b"\x86R\x86R"),
    "size": b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n\x8a\x06"
    + ((3 * 10**9).to_bytes(6, "little") + b"\x85" + _text("b") + b"\x87R"),
}


@pytest.mark.parametrize("kind", NUMPY_VALUES)
def test_numpy_objects_in_a_checkpoint_are_not_built(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        content = b"\x80\x02}" + _text("a") + NUMPY_VALUES[kind] + b"s."
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    with pytest.raises(CheckpointError, match=r"'a' is of NumPy, .* \(torch\.from_numpy"):
        files.read(path)


def test_no_type_that_pickles_may_name_is_numpys() -> None:
    for allowed in state_dict.safe_types():
        found = allowed[0] if isinstance(allowed, tuple) else allowed
        assert not found.__module__.startswith("numpy"), allowed


def test_threads_read_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=0.1)}, path)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(files.read_tensors, [path] * 200):
            assert found["a"].tolist() == [1, 1]


def test_types_that_the_program_allows_stay_allowed(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pth")
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = set(torch.serialization.get_safe_globals())
        torch.save({"a": torch.ones(2)}, tmp_path / "b.pth")
        files.read(tmp_path / "b.pth")
        assert set(torch.serialization.get_safe_globals()) == before
        assert torch.load(tmp_path / "a.pth", weights_only=True)["args"].lr == 0.1


# Damage -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    model = draw_weights(hiera_core.Hiera(**SMALL))
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def test_flipped_bytes_in_a_pth_file_are_refused(
    tmp_path: Path, state: dict[str, torch.Tensor], hiera: Command
) -> None:
    """At 100 places in the values of tensors, together and one by one."""
    path, draw = tmp_path / "flipped.pth", random.Random(0)
    torch.save({"model_state": state}, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    start = largest.header_offset + 200  # after its header
    places = [draw.randrange(start, start + largest.file_size - 200) for _ in range(100)]
    for chosen in [places, *([place] for place in places)]:
        content = bytearray(whole)
        for place in chosen:
            content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        with pytest.raises(DamagedFile, match="CRC"):
            files.read(path)
    code, _, err = hiera("predict", "x.jpg", "--checkpoint", path)
    assert code == 3 and err.count("\n") == 1 and "truncated or damaged" in err


def test_every_flipped_byte_is_refused_or_harmless(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    """Bytes between the members and time stamps do not matter; the weights are then the same."""
    few = {name: tensor for name, tensor in state.items() if tensor.numel() < 100}
    path = tmp_path / "flipped.pth"
    torch.save(few, path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 29):
        content = bytearray(whole)
        content[place] ^= 0x41
        path.write_bytes(content)
        try:
            found = files.read_tensors(path)
        except CheckpointError:
            continue
        assert found.keys() == few.keys()
        assert all(torch.equal(found[name], few[name]) for name in few), place


def test_archives_without_crcs_are_read(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    found = files.read_tensors(tmp_path / "a.pth")
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_compressed_archives_are_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    """A memory map would show the compressed bytes as weights."""
    torch.save(state, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member))
    with pytest.raises(DamagedFile, match="compressed"):
        files.read(tmp_path / "packed.pth")


@pytest.mark.parametrize("change", [-1, 1, -1000, 1000])
def test_the_length_of_safetensors_is_exact(
    tmp_path: Path, state: dict[str, torch.Tensor], change: int
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(state, path)
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    with pytest.raises(DamagedFile, match="its header says"):
        check_weights_file(path)


# Files that claim too much ----------------------------------------------------------------------


def test_expanded_tensors_are_refused(tmp_path: Path, hiera: Command) -> None:
    """A few bytes that pretend to be a terabyte: summing them would take hours."""
    huge = torch.zeros(1).expand(1 << 38)
    torch.save({"norm.weight": huge}, tmp_path / "huge.pth")
    assert (tmp_path / "huge.pth").stat().st_size < 10_000
    code, _, err = hiera("predict", "x.jpg", "--checkpoint", tmp_path / "huge.pth")
    assert code == 3 and "not a plain dense tensor" in err


@pytest.mark.parametrize("zipped", [True, False])
def test_claims_of_petabytes_are_refused(
    tmp_path: Path, hiera: Command, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "huge.pth"
    torch.save({"a": torch.zeros(77777)}, path, _use_new_zipfile_serialization=zipped)
    number, larger = (
        struct.pack("<I", 77777),
        pickle.LONG1 + b"\x07" + (1 << 50).to_bytes(7, "little"),
    )
    if zipped:
        changed = tmp_path / "changed.pth"
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w") as new:
            for member in old.infolist():
                content = old.read(member)
                if member.filename.endswith("data.pkl"):
                    content = content.replace(pickle.BININT + number, larger)
                new.writestr(member.filename, content)
        path = changed
    else:
        path.write_bytes(path.read_bytes().replace(pickle.BININT + number, larger))
    code, _, err = hiera("predict", "x.jpg", "--checkpoint", path)
    assert code == 3 and err.count("\n") == 1 and "truncated or damaged" in err, err


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "[]", "3", "", "\0", '{"a": NaN'])
def test_json_that_cannot_be_read(content: str, tmp_path: Path, small_folder: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(DamagedFile, match=r"config\.json"):
        files.read_json(path)


def test_files_that_the_system_refuses_are_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        files.read(tmp_path / "gone.pth")
    assert not isinstance(caught.value, DamagedFile)


@pytest.mark.parametrize("old", [False, True])
def test_the_content_decides_and_not_the_name(tmp_path: Path, old: bool) -> None:
    weights = {"x": torch.arange(6.0)}
    torch.save(weights, tmp_path / "a.safetensors", _use_new_zipfile_serialization=not old)
    assert torch.equal(files.read(tmp_path / "a.safetensors")[0]["x"], weights["x"])
    files.write_safetensors(tmp_path / "b.safetensors", weights)
    (tmp_path / "b.safetensors").rename(tmp_path / "b.pth")
    assert torch.equal(files.read(tmp_path / "b.pth")[0]["x"], weights["x"])
