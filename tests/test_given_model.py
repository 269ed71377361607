"""Tests of models that a benchmark is given by their checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hiera_core
from hiera_core import zoo
from hiera_core.benchmarking import flops, peers, runner, workloads
from hiera_core.benchmarking.given_model import describe_models, entry_of
from hiera_core.benchmarking.job import Job
from hiera_core.errors import CheckpointError, UsageError

from .conftest import SMALL, draw_weights
from .test_benchmarking import SHORT

Hiera = Callable[..., tuple[int, str, str]]


def job_of(name: Path | str, **values: Any) -> Job:
    (description,) = describe_models([str(name)]).values()
    return Job("hiera", str(name), batch=2, description=description, **values)


def test_the_zoo_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hiera_core.hiera_nano_32(num_classes=7).save_pretrained("hiera_nano_32")
    found = describe_models(["hiera_nano_32", "./hiera_nano_32", "hiera_base_224.mae_in1k"])
    assert found["hiera_nano_32"] is None and found["hiera_base_224.mae_in1k"] is None
    assert Job("hiera", "hiera_base_224.mae_in1k", 1).entry.name == "hiera_base_224"
    own = found["./hiera_nano_32"]
    assert own is not None and own["config"]["num_classes"] == 7
    assert entry_of(own).name == "hiera_nano_32" and entry_of(own).speed is None


def test_a_checkpoint_is_measured_by_its_own_architecture(small_folder: Path) -> None:
    """It has the widths of no model in the zoo. The description survives JSON."""
    job = job_of(small_folder)
    job = Job.from_json(json.loads(json.dumps(dataclasses.asdict(job))))
    assert job.entry.config["input_size"] == (64, 64) and job.entry.kind == "image"
    model = hiera_core.Hiera(**SMALL)
    variants = workloads.build(job)
    for variant in variants:
        assert variant.row.params == sum(p.numel() for p in model.parameters())
        assert variant.row.model == str(small_folder) and variant.row.published is None
        assert variant.step().shape == (2, 10)
    assert flops.count_gmacs(dataclasses.replace(job, size=(128, 128))) > 3 * flops.count_gmacs(job)


def test_an_autoencoder_and_a_file_are_recognised(tmp_path: Path) -> None:
    import torch

    hiera_core.mae_hiera_nano_8x32().save_pretrained(tmp_path / "mae")
    job = job_of(tmp_path / "mae", mode="grad")
    assert job.entry.autoencoder and job.entry.kind == "video"
    workloads.build(job)[0].step()
    model = hiera_core.hiera_nano_32(num_classes=5)
    torch.save({"model_state": model.state_dict()}, tmp_path / "mine.pth")
    assert job_of(tmp_path / "mine.pth").entry.config["num_classes"] == 5


def test_a_model_without_classes_has_a_backward_pass(tmp_path: Path) -> None:
    hiera_core.hiera_nano_32(num_classes=0).save_pretrained(tmp_path / "trunk")
    for mode in ("grad", "train"):
        workloads.build(job_of(tmp_path / "trunk", mode=mode))[0].step()


@pytest.mark.parametrize(
    ("changes", "peer", "reason"),
    [
        ({"in_chans": 1}, "timm", None),
        ({"head_dropout": 0.1}, "timm", None),
        ({"mlp_ratio": 2.0}, "reference", None),
        ({"mlp_ratio": 2.0}, "transformers", "no Hiera with other mlp_ratio"),
        ({"init_values": 0.1}, "reference", "cannot build"),
        ({"init_values": 0.1}, "vit", "no ViT"),
    ],
)
def test_peers_build_the_same_model_or_say_that_they_cannot(
    changes: dict[str, Any], peer: str, reason: str | None, tmp_path: Path
) -> None:
    model = draw_weights(hiera_core.Hiera(**{**SMALL, **changes}))
    model.save_pretrained(tmp_path / "mine")
    job = dataclasses.replace(job_of(tmp_path / "mine"), implementation=peer)
    if reason is not None:
        with pytest.raises(peers.NotOffered, match=reason):
            workloads.build(job)
        return
    (variant,) = workloads.build(job)
    assert variant.row.params == sum(p.numel() for p in model.parameters())
    variant.step()


def test_a_peer_without_the_model_has_a_row_that_says_so(
    hiera: Hiera, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row is no failure: the exit code is 0. Of the zoo, such peers are left out."""
    monkeypatch.setattr(runner, "measure", measure_in_process)
    hiera_core.hiera_nano_32(num_classes=7).save_pretrained(tmp_path / "mine")
    run = ("-b", "2", "--against", "vit,timm", "--attention", "fused", "-q", "--dtype", "fp32")
    code, out, err = hiera("bench", tmp_path / "mine", *run)
    ours, timm, vit = map(json.loads, out.splitlines())
    assert code == 0 and err == ""
    assert {row["model"] for row in (ours, vit, timm)} == {str(tmp_path / "mine")}
    assert "no ViT" in vit["unavailable"] and vit["error"] is None and not vit["throughput"]
    assert timm["ratio"] > 0 and ours["params"] == timm["params"]
    code, out, _ = hiera("bench", tmp_path / "mine", *run, "-f", "table")
    assert code == 0 and "no ViT" in out.splitlines()[3]


def measure_in_process(jobs: list[Job], *_: Any) -> list[Any]:
    """Do what `runner.measure` does, without processes."""
    monkey = pytest.MonkeyPatch()

    class Here:
        def __init__(self, job: Job) -> None:
            self.job, self.facts = job, dict[str, Any]()
            self.variants = workloads.build(job)
            self.rows = [variant.row for variant in self.variants]

        def run(self, variant: int, seconds: float) -> tuple[list[float], None]:
            import time

            start = time.perf_counter()
            self.variants[variant].step()
            self.facts = self.variants[variant].facts
            return [time.perf_counter() - start], None

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None: ...

    with monkey.context() as patched:
        patched.setattr(runner, "Worker", Here)
        return MEASURE(jobs, SHORT)


MEASURE = runner.measure


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("hiera_nano_33", UsageError),
        ("", UsageError),
        ("none/model", CheckpointError),
        ("none.safetensors", CheckpointError),
    ],
)
def test_what_is_no_model_is_refused(
    name: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "Worker", lambda job: pytest.fail("a worker was started"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((error, hiera_core.errors.HubError)):
        hiera_core.bench([name])


def test_the_command_refuses_a_missing_checkpoint(hiera: Hiera, tmp_path: Path) -> None:
    code, out, err = hiera("bench", tmp_path / "none.pth")
    assert (code, out) == (3, "") and "none.pth" in err
    (tmp_path / "text.pth").write_text("no weights")
    assert hiera("bench", tmp_path / "text.pth")[0] == 3


def test_every_kind_of_input_has_a_nearest_model() -> None:
    from hiera_core.benchmarking import given_model

    for (autoencoder, dims), name in given_model.NEAREST.items():
        entry = zoo.get(name)
        assert entry.autoencoder == autoencoder and len(entry.config["input_size"]) == dims
