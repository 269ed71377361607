"""Tests of `hiera bench --mode train`: the step is that of `hiera train`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hiera_core
from hiera_core.benchmarking import machine, workloads
from hiera_core.benchmarking.end_to_end import training_work
from hiera_core.benchmarking.end_to_end.training_work import TrainingWork, recipe_of
from hiera_core.benchmarking.job import Job
from hiera_core.errors import DeviceError
from hiera_core.training.steps.train_step import TrainStep

CLASSIFIER = Job("hiera", "hiera_nano_32", batch=4, mode="train")


@pytest.mark.parametrize("model", ["hiera_nano_32", "mae_hiera_nano_8x32", "mae_hiera_nano_32"])
def test_the_step_is_that_of_a_run(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is `TrainStep`, with the recipe's groups of AdamW, clipping, EMA, erasing and mixing."""
    steps: list[int] = []
    run = TrainStep.run
    monkeypatch.setattr(
        TrainStep, "run", lambda self, step, batches: steps.append(step) or run(self, step, batches)
    )
    work = TrainingWork(Job("hiera", model, batch=4, mode="train"))
    before = {name: p.detach().clone() for name, p in work.model.named_parameters()}
    for _ in range(3):
        work()
    assert steps == [0, 1, 2]
    moved = [n for n, p in work.model.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) > 0.9 * len(before), "the weights do not change"
    setup, recipe = work._step.setup, work._step.recipe
    groups = setup.training.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, recipe.optimizer.weight_decay}
    assert groups[0]["betas"] == recipe.optimizer.betas
    assert recipe.batch_size == 4 and recipe.precision == "fp32"


def test_augmentation_on_the_device_is_part_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches are bytes; erasing and mixing, as the recipe says, happen within the step."""
    job = Job("hiera", "hiera_tiny_224", batch=2, mode="train")
    work = TrainingWork(job)
    batches = [next(work._batches) for _ in range(training_work.DRAWN_BATCHES)]
    assert all(batch.x.dtype is torch.uint8 for batch in batches)
    assert all(len(batch.mixes) == 1 for batch in batches)
    assert batches[0].x.shape == (2, 3, 224, 224)
    assert work._step.recipe.augment.erasing == 0.25
    targets = [batch.target for batch in batches]
    assert all(target is not None and target.shape == (2, 1000) for target in targets)
    assert not torch.equal(batches[0].x, batches[1].x)
    finished: list[Any] = []
    finish = work._step.finish
    monkeypatch.setattr(
        work._step, "finish", lambda batch: finished.append(finish(batch)) or finished[-1]
    )
    work()
    assert finished[0].x.dtype is torch.float32


def test_autocast_keeps_weights_in_fp32() -> None:
    """`bf16` is the dtype of autocast, as in training. `infer` casts the weights."""
    work = TrainingWork(Job("hiera", "hiera_nano_32", batch=2, dtype="bf16", mode="train"))
    assert {p.dtype for p in work.model.parameters()} == {torch.float32}
    assert work._step.setup.precision is torch.bfloat16
    work()
    assert not torch.is_autocast_enabled("cpu")


def test_an_odd_batch_is_not_mixed_and_says_so() -> None:
    job = Job("hiera", "hiera_tiny_224", batch=1, mode="train")
    recipe, notes = recipe_of(job)
    assert (recipe.augment.mixup, recipe.augment.cutmix) == (0, 0) and "odd" in notes[0]
    recipe, notes = recipe_of(Job("hiera", "hiera_base_16x224", batch=2, mode="train"))
    assert recipe.data.repeats == 1 and recipe.augment.mixup > 0 and not notes
    recipe, notes = recipe_of(Job("hiera", "hiera_base_16x224", batch=4, mode="train"))
    assert recipe.data.repeats == 2 and not notes
    assert recipe.optimizer.clip_grad == 5.0


def test_rows_share_a_model_and_have_its_notes() -> None:
    job = Job("hiera", "hiera_nano_32", batch=3, mode="train", size=(64, 64))
    variants = workloads.build(job)
    assert [v.row.attention for v in variants] == ["fused", "eager"]
    assert variants[0].row.params == sum(
        p.numel() for p in hiera_core.hiera_nano_32(input_size=(64, 64)).parameters()
    )
    assert variants[0].row.size == "64x64"
    for variant in variants:
        variant.step()


def test_one_model_runs_compiled_and_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled steps run under the stance that leaves compiled programs out."""
    stances: list[str] = []
    called: list[str] = []
    real = torch.compiler.set_stance
    monkeypatch.setattr(
        torch.compiler, "set_stance", lambda stance: stances.append(stance) or real(stance)
    )
    monkeypatch.setattr(
        "hiera_core.training.build.compile_in_place", lambda module: called.append("compiled")
    )
    job = Job("hiera", "hiera_nano_32", batch=2, mode="train", compile=True)
    variants = workloads.build(job)
    assert [(v.row.attention, v.row.compiled) for v in variants] == [
        ("fused", False),
        ("eager", False),
        ("fused", True),
    ]
    assert called == ["compiled"]
    for variant in variants:
        variant.step()
    assert stances == ["force_eager", "force_eager"]


def test_memory_that_runs_out_is_seen_by_the_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """`hiera train` has words for it, and the runner halves the batch."""
    work = TrainingWork(CLASSIFIER)

    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(work.model, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        work()

    def refuse(*_: Any) -> Any:
        raise DeviceError("no")

    monkeypatch.setattr(work._step, "run", refuse)
    with pytest.raises(DeviceError, match="no"):
        work()


def test_auto_is_the_dtype_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hiera_core.device.has_native_bf16", lambda: True)
    header, _ = machine.settings("cpu", "auto", "train", None)
    assert header.dtype == "fp32" and "as `hiera train` chooses" in header.lines()[1]
    assert machine.settings("cpu", "auto", "grad", None)[0].dtype == "bf16"


def test_sam2_and_peers_have_a_step_of_their_own() -> None:
    """`hiera train` does not train SAM 2's encoder."""
    job = Job("hiera", "sam2_hiera_tiny", batch=1, mode="train", size=(64, 64))
    workloads.build(job)[0].step()
    (peer,) = workloads.build(Job("timm", "hiera_nano_32", batch=2, mode="train"))
    peer.step()
