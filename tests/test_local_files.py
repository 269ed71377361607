"""Weights in the folders that trainers and other libraries write, and in several files."""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import json
import shutil
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import hiera_core
from hiera_core.errors import CheckpointError, HubError
from hiera_core.weights import files, load, local_files, state_dict
from hiera_core.weights.cache_repair import read_cached
from hiera_core.weights.download import FetchedFiles
from hiera_core.weights.integrity import DamagedFile

from .conftest import Hub, draw_weights

Command = Callable[..., tuple[int, str, str]]
State = dict[str, torch.Tensor]
THREE = Path(hiera_core.__file__).parent / "zoo" / "assets" / "samples" / "three.png"


@pytest.fixture(scope="module")
def weights() -> State:
    return hiera_core.create_model("hiera_nano_32", pretrained=True).state_dict()


def write_parts(folder: Path, weights: State, ending: str) -> Path:
    """Write weights in two files and their index, which is returned."""
    stem, names = {"safetensors": "model", "bin": "pytorch_model"}[ending], list(weights)
    parts = {f"{stem}-0000{i + 1}-of-00002.{ending}": names[i::2] for i in range(2)}
    for file, chosen in parts.items():
        write: Any = save_file if ending == "safetensors" else torch.save
        write({name: weights[name] for name in chosen}, folder / file)
    index = folder / f"{stem}.{ending}.index.json"
    listed = {name: file for file, chosen in parts.items() for name in chosen}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed}))
    return index


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_weights_in_several_files(ending: str, weights: State, tmp_path: Path) -> None:
    index = write_parts(tmp_path, weights, ending)
    for name in (tmp_path, index):
        found = load.read_checkpoint(name)
        assert set(found.state) == set(weights)
        assert all(torch.equal(found.state[key], weights[key]) for key in weights)
    part = index.with_name(next(iter(json.loads(index.read_text())["weight_map"].values())))
    with pytest.raises(CheckpointError, match="is one of several files") as error:
        load.read_checkpoint(part)
    assert str(tmp_path) in str(error.value.hint)
    part.unlink()
    with pytest.raises(CheckpointError, match=rf"lists {part.name}, which is not there"):
        load.read_checkpoint(tmp_path)


@pytest.fixture
def places(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, servers and remote places, with caches of their own."""
    from huggingface_hub import constants

    pytest.importorskip("fsspec")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return hub


def put(hub: Hub, kind: str, folder: dict[str, bytes], index: str) -> str:
    """Put the files of a folder at a place, and return what a user names."""
    if kind in ("repository", "hf"):
        hub.repositories["someone/parts"] = folder
        return "someone/parts" if kind == "repository" else "hf://someone/parts@main"
    if kind == "web":
        hub.plain |= {f"/parts/{name}": content for name, content in folder.items()}
        return f"{hub.url}/parts/{index}"
    import fsspec

    system = fsspec.filesystem("memory")
    system.store.clear()
    for name, content in folder.items():
        system.pipe_file(f"/bucket/parts/{name}", content)
    return "memory://bucket/parts/" if kind == "folder" else f"memory://bucket/parts/{index}"


def forget(folder: Path) -> None:
    for cache in ("hf", "torch"):
        shutil.rmtree(folder / cache, ignore_errors=True)


PLACES = ("repository", "hf", "web", "folder", "remote file")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", PLACES)
def test_weights_in_several_files_elsewhere(
    kind: str, ending: str, weights: State, places: Hub, tmp_path: Path, hiera: Command
) -> None:
    """At the hub, at a URL, and at a remote place; a config.json beside them counts where one of a
    single file does. What is in the cache is not fetched again."""
    source = tmp_path / "parts"
    source.mkdir()
    index = write_parts(source, weights, ending)
    config = hiera_core.create_model("hiera_nano_32").config
    (source / "config.json").write_text(json.dumps(config))
    (source / "optimizer.bin").write_bytes(b"no weights")
    content = {path.name: path.read_bytes() for path in source.iterdir()}
    name = put(places, kind, content, index.name)
    found = load.read_checkpoint(name)
    assert set(found.state) == set(weights)
    assert all(torch.equal(found.state[key], weights[key]) for key in weights)
    assert (found.config is None) == (kind == "web")
    before = sum(line.startswith("GET") for line in places.log)
    load.read_checkpoint(name)
    assert sum(line.startswith("GET") for line in places.log) == before
    if kind != "repository":
        with pytest.raises(CheckpointError, match="is one of several files") as error:
            load.read_checkpoint(f"{places.url}/p/{next(n for n in content if '00001' in n)}")
        assert error.value.hint == f"name the index: {places.url}/p/{index.name}"
        code, out, err = hiera("predict", THREE, "-m", name, "-f", "csv")
        assert code == 0 and "three" in out, err


@pytest.mark.parametrize("kind", PLACES)
def test_a_wrong_index_elsewhere_is_refused(
    kind: str, weights: State, places: Hub, tmp_path: Path
) -> None:
    """Nothing outside of the folder is asked for, and a file that is missing is named."""
    index = write_parts(tmp_path, weights, "safetensors")
    part = tmp_path / "model-00002-of-00002.safetensors"
    content = {path.name: path.read_bytes() for path in (index, part)}
    with pytest.raises(HubError, match=r"model-00001-of-00002\.safetensors"):
        load.read_checkpoint(put(places, kind, content, index.name))
    for listed in ("../x.safetensors", "/etc/passwd", "a\\b", "\ud800", "a\nb", 3):
        text = json.dumps({"weight_map": {"a": listed}}).encode()
        places.log.clear()
        forget(tmp_path)
        with pytest.raises(HubError, match="has no weight_map of file names"):
            load.read_checkpoint(put(places, kind, {**content, index.name: text}, index.name))
        assert not [line for line in places.log if "passwd" in line or "x.safe" in line]
    text = json.dumps({"weight_map": {"a": "x" * 5000}}).encode()
    forget(tmp_path)
    with pytest.raises(HubError):
        load.read_checkpoint(put(places, kind, {**content, index.name: text}, index.name))
    many = {"weight_map": {str(i): f"{i}.safetensors" for i in range(1001)}}
    text = json.dumps(many).encode()
    forget(tmp_path)
    with pytest.raises(HubError, match="lists more than 1000 files"):
        load.read_checkpoint(put(places, kind, {**content, index.name: text}, index.name))


def test_a_part_without_an_index_is_not_the_weights_of_a_remote_folder(
    weights: State, places: Hub, tmp_path: Path
) -> None:
    write_parts(tmp_path, weights, "safetensors")
    name = "model-00001-of-00002.safetensors"
    url = put(places, "folder", {name: (tmp_path / name).read_bytes()}, "")
    with pytest.raises(HubError, match=r"the folder holds no model\.safetensors"):
        load.read_checkpoint(url)


def test_many_damaged_files_are_fetched_again(tmp_path: Path) -> None:
    damaged = [tmp_path / f"{i}.safetensors" for i in range(20)]

    def read(_: FetchedFiles) -> str:
        if damaged:
            raise DamagedFile(damaged.pop(), "is damaged")
        return "whole"

    assert read_cached(lambda: FetchedFiles(tmp_path), read, "x", offline=False) == "whole"


@pytest.mark.parametrize("kind", ["repository", "web", "folder"])
def test_a_damaged_part_in_the_cache_is_fetched_again(
    kind: str, weights: State, places: Hub, tmp_path: Path
) -> None:
    source = tmp_path / "parts"
    source.mkdir()
    index = write_parts(source, weights, "safetensors")
    content = {path.name: path.read_bytes() for path in source.iterdir()}
    name = put(places, kind, content, index.name)
    load.read_checkpoint(name)
    cached = [
        p for cache in ("hf", "torch") for p in (tmp_path / cache).rglob("*00002*.safetensors")
    ]
    assert cached
    for path in cached:
        path.resolve().write_bytes(b"damaged")
    assert set(load.read_checkpoint(name).state) == set(weights)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (None, "has no weight_map"),
        ({"a": "../secret.safetensors"}, "has no weight_map"),
        ({"a": 3}, "has no weight_map"),
        ({"a": ""}, "has no weight_map"),
        ({"a": ".."}, "has no weight_map"),
        ({"a": "/etc/passwd"}, "has no weight_map"),
        ({"a": "part.safetensors\0"}, "has no weight_map"),
        ({"a": "x" * 5000}, "which is not there"),
        ({"a": "part.safetensors", "b": "part.safetensors"}, "lists b, which its files"),
    ],
)
def test_a_wrong_index_is_refused(listed: Any, message: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "part.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(CheckpointError, match=message):
        local_files.read(index)


def test_a_tensor_comes_from_the_file_that_the_index_names(tmp_path: Path) -> None:
    """The other file may be left from an earlier run."""
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "1.safetensors")
    save_file({"a": torch.zeros(1), "c": torch.zeros(1)}, tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    listed = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    index.write_text(json.dumps({"weight_map": listed}))
    found = {name: float(tensor) for name, tensor in local_files.read(index)[0].items()}
    assert found == {"a": 1, "b": 1, "c": 0}


def test_one_file_of_one_is_the_whole(weights: State, tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00001.safetensors"
    save_file(weights, path)
    for name in (path, tmp_path):
        assert set(load.read_checkpoint(name).state) == set(weights)


def test_a_command_that_is_proposed_can_be_copied(tmp_path: Path) -> None:
    folder = tmp_path / "my $(touch x)"
    folder.mkdir()
    (folder / "__0_0.distcp").touch()
    with pytest.raises(CheckpointError) as error:
        load.read_checkpoint(folder)
    assert f"dcp_to_torch '{folder}' model.pth" in str(error.value.hint)


def test_transformers_writes_several_files(tmp_path: Path, hiera: Command) -> None:
    config = transformers.HieraConfig(
        embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], image_size=[64, 64]
    )
    model = draw_weights(transformers.HieraForImageClassification(config))
    results = []
    for size in ("100KB", "1GB"):
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        code, out, err = hiera("predict", THREE, "-m", tmp_path / size, "-f", "jsonl")
        assert code == 0, err
        results.append(json.loads(out)["topk"])
    assert len(list((tmp_path / "100KB").glob("*.safetensors"))) > 1
    assert results[0] == results[1]


FOLDERS: dict[str, dict[str, str]] = {
    "Accelerate": {"model.safetensors": "weights", "optimizer.bin": "", "scheduler.bin": "",
                   "random_states_0.pkl": ""},
    "Accelerate, FSDP": {"pytorch_model_fsdp.bin": "weights", "optimizer.bin": "",
                         "scheduler.bin": "", "sampler.bin": ""},
    "Trainer of transformers": {"pytorch_model.bin": "weights", "optimizer.pt": "",
                                "scheduler.pt": "", "training_args.bin": "", "rng_state.pth": ""},
    "DeepSpeed": {"mp_rank_00_model_states.pt": "weights",
                  "zero_pp_rank_0_mp_rank_00_optim_states.pt": ""},
    "Lightning": {"epoch=3-step=40.ckpt": "weights", "hparams.yaml": ""},
    "timm": {"model_best.pth.tar": "weights", "args.yaml": "", "summary.csv": ""},
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_of_trainers(kind: str, weights: State, tmp_path: Path, hiera: Command) -> None:
    for name, content in FOLDERS[kind].items():
        if name.endswith(".safetensors"):
            save_file(weights, tmp_path / name)
        elif content:
            torch.save({"module": {f"module.{n}": t for n, t in weights.items()}}, tmp_path / name)
        else:
            torch.save({}, tmp_path / name)
    code, out, err = hiera("predict", THREE, "-m", tmp_path, "-f", "jsonl")
    assert code == 0, err
    assert json.loads(out)["topk"][0]["label"] == "three"


def test_folders_say_what_to_name(weights: State, tmp_path: Path, hiera: Command) -> None:
    (tmp_path / "checkpoint-500").mkdir()
    save_file(weights, tmp_path / "checkpoint-500" / "model.safetensors")
    for name in ("a.ckpt", "last.ckpt"):
        torch.save(weights, tmp_path / name)
    code, _, err = hiera("predict", THREE, "-m", tmp_path)
    assert code == 3
    assert "name the file itself: a.ckpt, last.ckpt, checkpoint-500/model.safetensors" in err
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / "__0_0.distcp").touch()
    code, _, err = hiera("predict", THREE, "-m", tmp_path / "dcp")
    assert code == 3 and "distributed checkpoint" in err and "dcp_to_torch" in err


@pytest.mark.parametrize(
    "name", ["last.ckpt", "model_best.pth.tar", "model.safetensors.index.json"]
)
def test_a_missing_file_is_no_unknown_model(name: str, hiera: Command) -> None:
    for option in ("-m", "--checkpoint"):
        code, _, err = hiera("predict", THREE, option, name)
        assert code == 3 and f"no file, folder or hub repository '{name}'" in err


@pytest.mark.filterwarnings("ignore")
def test_programs_and_archives_are_called_so(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    torch.jit.save(torch.jit.script(layer), tmp_path / "a.pt")
    torch.export.save(torch.export.export(layer, (torch.ones(1, 2),)), tmp_path / "b.pt2")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("weights.pth", b"")
    for name, what in (("a.pt", "a TorchScript program"), ("b.pt2", "an exported program"),
                       ("c.zip", "an archive")):  # fmt: skip
        with pytest.raises(CheckpointError, match=f"is {what}, not a checkpoint"):
            files.read(tmp_path / name)


VALUES: dict[str, Any] = {
    "frozenset": frozenset([1]),
    "range": range(3),
    "slice": slice(1, 2),
    "deque": collections.deque([1, 2], maxlen=3),
    "type": {"dtype": float},
    "time": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    "zone": datetime.timezone(datetime.timedelta(hours=2)),
    "decimal": decimal.Decimal("0.1"),
    "fraction": fractions.Fraction(1, 3),
    "uuid": uuid.UUID(int=3),
}


@pytest.mark.parametrize("kind", VALUES)
def test_settings_of_python_are_left_out(kind: str, weights: State, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": weights, "hyper_parameters": {"value": VALUES[kind]}}, path)
    assert set(files.read(path)[0]) == set(weights)


def test_settings_of_omegaconf_are_left_out(
    weights: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning saves them if the program is configured by Hydra. The package is not needed."""
    import sys
    import types

    module = types.ModuleType("omegaconf.dictconfig")
    package = types.ModuleType("omegaconf")
    monkeypatch.setitem(sys.modules, "omegaconf", package)
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", module)
    made = type("DictConfig", (), {"__module__": "omegaconf.dictconfig"})
    module.DictConfig = made  # type: ignore[attr-defined]
    settings = made()
    settings.content = {"lr": 0.1, "inner": made()}
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": weights, "hyper_parameters": {"config": settings}}, path)
    monkeypatch.delitem(sys.modules, "omegaconf.dictconfig")
    assert set(files.read(path)[0]) == set(weights)


def test_values_that_are_left_out_take_no_memory() -> None:
    """A few bytes of a pickle can ask for a set or a list of any length."""
    assert not state_dict.IgnoredList([1, 2])
    deque = state_dict.IgnoredList()
    deque.extend(range(3))
    deque.append(3)
    assert not deque and not vars(state_dict.IgnoredValue(range(10)))


def test_a_run_that_has_not_finished_says_so(hiera: Command, tmp_path: Path) -> None:
    """Its weights are only in checkpoints, which hold more than a model needs."""
    run = tmp_path / "run"
    (run / "checkpoints/step_00000007").mkdir(parents=True)
    (run / "checkpoints/step_00000007/state.safetensors").write_bytes(b"x")
    (run / "recipe.yaml").write_text("model: hiera_nano_32\n")
    (run / "log.jsonl").touch()
    code, _, err = hiera("predict", THREE, "-m", run)
    assert code == 3 and f"has not finished: `hiera train --resume {run}` continues it" in err
