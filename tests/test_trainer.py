"""Tests of training: losses, parameter groups, batches, checkpoints, resuming and errors."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hiera.hiera_mae
import numpy as np
import pytest
import torch

import hiera_core
from hiera_core import zoo
from hiera_core.atomic import unfinished
from hiera_core.data import datasets, toy_datasets
from hiera_core.data.video_files import video_writer
from hiera_core.errors import CheckpointError, DeviceError, OutputError, TrainingError, UsageError
from hiera_core.training import (
    build,
    dataloader,
    distributed,
    optimizer,
    recipe,
    recipe_reader,
    run_log,
    sampler,
    step_statistics,
    trainer,
    validate,
)
from hiera_core.training.augment import Augment
from hiera_core.training.checkpoints import checkpoint
from hiera_core.training.judging import measurements
from hiera_core.training.loading import mixing
from hiera_core.training.loading.finish_views import FinishViews, erase
from hiera_core.training.settings import recipe_parts
from hiera_core.weights.download_record import sha256_of
from tests.conftest import assert_close

pytestmark = pytest.mark.usefixtures("quick_curves")

CPU = distributed.World(torch.device("cpu"))
# Narrow versions of the bundled models. A step takes milliseconds.
NARROW = {"embed_dim": 8, "stages": (1, 1, 1)}
NARROW_MAE = {**NARROW, "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
SHORT = {"schedule.warmup_epochs": 0, "batch_size": 32, "log_every": 1, "save_every": 1}


def recipe_of(model: str, **settings: Any) -> recipe.Recipe:
    """Return the recipe of a narrow model. In names of settings, `__` stands for a dot."""
    config = NARROW_MAE if model.startswith("mae_") else NARROW
    values = {
        "model.config": config,
        **SHORT,
        **{k.replace("__", "."): v for k, v in settings.items()},
    }
    return recipe_reader.read_recipe(model, values)


def digits(count: int = 128, val: int = 32) -> datasets.Splits:
    """Return the first digits, for training and for validation."""
    found = datasets.open_dataset("digits")
    return datasets.Splits(found.subset(range(count)), found.subset(range(count, count + val)))


def run(
    recipe: recipe.Recipe, folder: Path, splits: datasets.Splits | None = None, **options: Any
) -> dict[str, Any]:
    choices = build.RunOptions(**{"workers": 0, **options})
    return trainer.train(recipe, splits or digits(), folder, CPU, choices)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the events of a kind from the log of a run."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == kind]


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in events(folder, "step")]


def batches_of(recipe: recipe.Recipe, samples: datasets.MediaDataset, size: tuple[int, ...]) -> Any:
    """Yield the training batches of a recipe."""
    entry = zoo.get(recipe.model.name)
    card = entry.preprocessing
    augment = Augment(recipe.augment, size, card["mean"], card["interpolation"])
    finish = FinishViews(card["mean"], card["std"])
    windows = hiera_core.create_model(recipe.model.name).layout.windows
    masking = sampler.MaskSampler(windows, recipe.mask_ratio)
    dataset = dataloader.TrainDataset(
        samples, augment, recipe, None, masking if entry.autoencoder else None
    )
    collate = dataloader.Collator((3, *size), None if entry.autoencoder else 10, recipe)
    for keys in sampler.StepSampler(len(samples), recipe).batches():
        yield finish(collate([dataset[key] for key in keys]))


# Against the reference ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "decline"), [(8, 0.95), pytest.param(25, 0.75, marks=pytest.mark.slow)]
)
def test_losses_match_the_reference(tmp_path: Path, epochs: int, decline: float) -> None:
    """Compare MAE pre-training with a plain loop that trains the reference's model."""
    recipe = recipe_of(
        "mae_hiera_nano_32",
        batch_size=16,
        schedule__epochs=epochs,
        schedule__kind="constant",
        optimizer__lr=1e-4,
        optimizer__lr_batch_size=16,
    )
    splits = digits(128)
    entry = zoo.get("mae_hiera_nano_32")
    arguments = {**entry.config, **NARROW_MAE}
    torch.manual_seed(1)
    theirs = hiera.hiera_mae.MaskedAutoencoderHiera(**arguments)
    ours = hiera_core.MaskedAutoencoderHiera(**arguments)
    ours.load_state_dict(theirs.state_dict())
    ours.save_pretrained(tmp_path / "start")
    run(recipe, tmp_path / "run", splits, init_from=str(tmp_path / "start"))

    decay, rest = [], []
    for name, parameter in theirs.named_parameters():
        is_decayed = parameter.dim() > 1 and "pos_embed" not in name
        (decay if is_decayed else rest).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-4,
        betas=(0.9, 0.95),
    )
    expected = []
    for batch in batches_of(recipe, splits.train, (32, 32)):
        mask = torch.zeros(len(batch.x), 16, dtype=torch.bool).scatter(1, batch.visible_units, True)
        loss, *_ = theirs(batch.x, mask=mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    found = losses(tmp_path / "run")
    assert len(found) == len(expected) == 8 * epochs
    assert np.mean(expected[-8:]) < decline * np.mean(expected[:8])
    for our_loss, their_loss in zip(found, expected, strict=True):
        assert abs(our_loss - their_loss) <= 1e-4 * their_loss


def test_parameter_groups_of_hiera_base() -> None:
    """With 24 blocks and layer decay 0.7, the embedding is scaled by 0.7 ** 25, the head by 1."""
    with torch.device("meta"):
        model = hiera_core.hiera_base_224()
    groups = {name: g for g in optimizer.parameter_groups(model, 0.7) for name in g.names}
    assert set(groups) == {name for name, _ in model.named_parameters()}
    expected = {
        "pos_embed": (0.7**25, False),
        "patch_embed.proj.weight": (0.7**25, True),
        "patch_embed.proj.bias": (0.7**25, False),
        "blocks.0.attn.qkv.weight": (0.7**24, True),
        "blocks.0.norm1.weight": (0.7**24, False),
        "blocks.2.proj.weight": (0.7**22, True),
        "blocks.23.mlp.fc2.weight": (0.7, True),
        "blocks.23.mlp.fc2.bias": (0.7, False),
        "norm.weight": (1.0, False),
        "head.projection.weight": (1.0, True),
        "head.projection.bias": (1.0, False),
    }
    for name, (scale, decay) in expected.items():
        assert groups[name].scale == pytest.approx(scale), name
        assert groups[name].decay == decay, name
    # The embedding, 24 blocks and the head, each with and without weight decay.
    assert len(optimizer.parameter_groups(model, 0.7)) == 2 * 26
    assert len(optimizer.parameter_groups(model)) == 2
    count = sum(p.numel() for n, p in model.named_parameters() if not groups[n].decay)
    by_shape = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 1)
    assert count == by_shape + 56 * 56 * 96
    with torch.device("meta"):
        video = hiera_core.mae_hiera_base_16x224()
    undecayed = {n for g in optimizer.parameter_groups(video) if not g.decay for n in g.names}
    assert {"pos_embed_spatial", "pos_embed_temporal", "decoder_pos_embed"} <= undecayed
    assert "mask_token" not in undecayed


# Batches --------------------------------------------------------------------------------------


def test_batches_do_not_depend_on_the_number_of_processes() -> None:
    recipe = recipe_of("hiera_nano_32", data__repeats=2, accumulate=2, schedule__epochs=4)
    whole = list(sampler.StepSampler(70, recipe).batches())
    shares = [list(sampler.StepSampler(70, recipe, rank, 2).batches()) for rank in range(2)]
    together = [a + b for a, b in zip(*shares, strict=True)]
    # A step accumulates two batches.
    flat = [a + b for a, b in zip(whole[::2], whole[1::2], strict=True)]
    assert [a + b for a, b in zip(together[::2], together[1::2], strict=True)] == flat
    assert len(flat) == 4 * 2  # 2 passes of 4 steps; 16 samples x 2 repeats are a batch
    for epoch in range(2):
        seen = [key.sample for step in flat[4 * epoch : 4 * epoch + 4] for key in step]
        assert len(seen) == len(set(seen)) == 64
    assert list(sampler.StepSampler(70, recipe).batches(3)) == whole[6:]


def test_every_held_out_sample_is_evaluated_once() -> None:
    for samples, world in ((7, 2), (64, 3), (1, 2)):
        shares = [list(validate.eval_batches(samples, 4, rank, world)) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1  # otherwise, collectives would hang
        indices = [key.sample for share in shares for keys in share for key in keys]
        assert sorted(index for index in indices if index is not None) == list(range(samples))


def test_mixing_does_not_depend_on_the_number_of_processes() -> None:
    recipe = recipe_of("hiera_nano_32", augment__mixup=0.8, augment__cutmix=1.0, batch_size=8)
    batch = next(batches_of(recipe, digits().train, (32, 32)))
    assert batch.target.shape == (8, 10)
    assert torch.allclose(batch.target.sum(1), torch.ones(8))
    assert ((batch.target > 0).sum(1) <= 2).all()
    second_keys = next(sampler.StepSampler(128, recipe, 1, 2).batches())
    augment = Augment(recipe.augment, (32, 32), [0.5] * 3)
    dataset = dataloader.TrainDataset(digits().train, augment, recipe)
    second = dataloader.Collator((3, 32, 32), 10, recipe)([dataset[key] for key in second_keys])
    second = FinishViews([0.5] * 3, [0.5] * 3)(second)
    assert_close(second.x, batch.x[4:], 0)
    assert_close(second.target, batch.target[4:], 0)
    # Six pairs for five processes: the first one has two, and the others are filled up.
    recipe = recipe_of("hiera_nano_32", augment__mixup=0.8, batch_size=12)
    samplers = [sampler.StepSampler(128, recipe, rank, 5) for rank in range(5)]
    assert [len(each.share(0)) for each in samplers] == [4, 2, 2, 2, 2]
    keys = [next(each.batches()) for each in samplers]
    assert all(len(each) == 4 for each in keys)
    (whole,) = (next(sampler.StepSampler(128, recipe).batches()),)
    assert [key for each in keys for key in each if key.sample is not None] == whole
    with pytest.raises(UsageError, match="6 pairs to mix per step, fewer than 7 processes"):
        sampler.StepSampler(128, recipe, 0, 7)
    with pytest.raises(UsageError, match="mixed in pairs"):
        sampler.StepSampler(128, recipe_of("hiera_nano_32", augment__mixup=0.8, batch_size=7))


def test_all_frames_of_a_clip_are_augmented_alike() -> None:
    """Equal frames stay equal under cropping, flipping, RandAugment, erasing and mixing."""
    settings = recipe_parts.AugmentSettings(randaugment=9, erasing=1.0, mixup=0.0, cutmix=1.0)
    augment = Augment(settings, (32, 32), [0.5] * 3, "bilinear")
    frame = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    views = []
    for seed in range(6):
        torch.manual_seed(seed)
        pixels, erasure = augment(np.stack([frame] * 4))
        assert pixels.shape == (3, 4, 32, 32) and pixels.dtype is torch.uint8
        view = FinishViews([0.5] * 3, [0.5] * 3).normalise(pixels[None])[0]
        before = view.clone()
        assert erasure is not None
        erase(view, erasure)
        assert (view == view[:, :1]).all()
        assert (view != before).any()
        views.append(view)
    assert not torch.equal(views[0], views[1])
    mix = mixing.draw_mix(settings, 32, 32)
    mixed = mixing.mix_views(torch.stack(views[:2]), 1, [mix])
    assert (mixed == mixed[:, :, :1]).all()
    assert not torch.equal(mixed, torch.stack(views[:2]))


# Runs -----------------------------------------------------------------------------------------


def test_a_run_saves_a_model_and_its_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, real_curves: None
) -> None:
    caplog.set_level(logging.INFO, "hiera")
    recipe = recipe_of("hiera_nano_32", schedule__epochs=2, ema=0.5, augment__cutmix=1.0)
    result = run(recipe, tmp_path / "run")
    assert result["step"] == 8
    assert result["val"]["samples"] == 32
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"config.json", "hiera.json", "model.safetensors", "recipe.yaml"} <= names
    assert {"log.jsonl", "curves.png", "checkpoints"} <= names
    assert len(list((tmp_path / "run/checkpoints").glob("step_*"))) == 2
    assert "held out: loss" in caplog.text
    assert f"the run is written to {tmp_path / 'run'}" in caplog.messages[:2]
    model = hiera_core.Hiera.from_pretrained(tmp_path / "run")
    assert model.card["classes"][3] == "three"
    record = hiera_core.predict(next(iter(_save_digits(tmp_path))), str(tmp_path / "run"))
    assert record["topk"][0]["label"] in toy_datasets.DIGITS
    # The saved weights are the averaged ones, and their accuracy is that of the log.
    from hiera_core.inference.evaluate import evaluate_dataset
    from hiera_core.inference.predict import Predictor

    found = evaluate_dataset(digits().val, Predictor(str(tmp_path / "run"), topk=5))
    assert found.top1 == pytest.approx(result["val"]["top1"])
    assert found.top5 == pytest.approx(result["val"]["top5"])


def test_averaged_weights_are_updated_by_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kernel for all of them, not one for each (foreach)."""
    counts: list[int] = []
    original = torch._foreach_lerp_

    def counting(averages: list[torch.Tensor], *rest: Any) -> None:
        counts.append(len(averages))
        original(averages, *rest)

    monkeypatch.setattr(torch, "_foreach_lerp_", counting)
    run(recipe_of("hiera_nano_32", schedule__epochs=1, ema=0.5), tmp_path / "run")
    parameters = len(list(hiera_core.Hiera.from_pretrained(tmp_path / "run").parameters()))
    assert counts == [parameters] * 4


def test_a_run_finishes_without_matplotlib(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    real_curves: None,
) -> None:
    """Only the curves need this optional package."""
    caplog.set_level(logging.INFO, "hiera")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails
    result = run(recipe_of("hiera_nano_32", schedule__epochs=1), tmp_path / "run")
    assert result["step"] == 4
    assert "curves.png needs matplotlib: pip install 'hiera-toolkit[plots]'" in caplog.messages
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert "model.safetensors" in names
    assert "curves.png" not in names


def _save_digits(folder: Path) -> Iterator[Path]:
    for index in range(3):
        path = folder / f"{index}.png"
        path.write_bytes(toy_datasets.Digits()[index].content())
        yield path


def test_resuming_is_bit_exact(tmp_path: Path) -> None:
    """The recipe uses every source of randomness, averaged weights and accumulation."""
    settings: dict[str, Any] = {
        "schedule__epochs": 3,
        "ema": 0.9,
        "augment__mixup": 0.8,
        "augment__randaugment": 9,
        "accumulate": 2,
        "keep": 3,
        "model__config": {**NARROW, "drop_path_rate": 0.3, "head_dropout": 0.2},
    }
    recipe = recipe_of("hiera_nano_32", **settings)
    run(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in ("step_00000008", "step_00000012"):
        shutil.rmtree(tmp_path / "cut/checkpoints" / step)
    (tmp_path / "cut/model.safetensors").unlink()
    (tmp_path / "cut/checkpoints/step_00000008.unfinished").mkdir()  # as if killed while saving
    with (tmp_path / "cut/log.jsonl").open("a") as file:
        file.write('{"event": "st')  # and while writing to the log
    run(recipe, tmp_path / "cut", resume="auto")
    whole, cut = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "cut"))
    assert whole == cut
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert not list((tmp_path / "cut/checkpoints").glob("*.unfinished"))


def test_a_folder_with_a_run_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of("hiera_nano_32", schedule__epochs=1)
    run(recipe, tmp_path / "run")
    with pytest.raises(UsageError, match="already holds a run"):
        run(recipe, tmp_path / "run")
    other = recipe_of("hiera_nano_32", schedule__epochs=2)
    with pytest.raises(UsageError, match=r"schedule\.epochs: 1\.0 in the run, 2\.0 on the command"):
        run(other, tmp_path / "run", resume="auto")
    with pytest.raises(UsageError, match="no checkpoint"):
        run(recipe, tmp_path / "new", resume=str(tmp_path / "nothing"))
    run(recipe, tmp_path / "run", resume="auto")  # finished: nothing left to do
    run(other, tmp_path / "run", overwrite=True)
    assert len(losses(tmp_path / "run")) == 8


def test_resuming_a_finished_run_says_that_it_is_finished(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_of("hiera_nano_32", schedule__epochs=1)
    run(recipe, tmp_path / "run")
    with caplog.at_level("INFO", "hiera"):
        run(recipe, tmp_path / "run", resume="auto")
    assert "resuming after step 4 of 4: nothing is left to do" in caplog.text


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("hiera_nano_32", "shapes", "takes images, and the data holds videos, such as shapes/"),
        ("hiera_nano_8x32", "digits", "takes videos, and the data holds images, such as digits/"),
    ],
)
def test_data_of_the_other_kind_is_refused_at_once(
    tmp_path: Path, name: str, data: str, message: str
) -> None:
    whole = datasets.open_splits(data, None)
    with pytest.raises(UsageError, match=message):
        run(recipe_of(name, data__path=data), tmp_path / "run", whole)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    recipe = recipe_of(
        "hiera_nano_32",
        schedule__epochs=20,
        optimizer__lr=1e30,
        schedule__kind="constant",
        save_every=0.25,
        keep=50,
        log_every=20,
    )
    with pytest.raises(TrainingError, match=r"(loss|gradient) of step \d+ is no number") as found:
        run(recipe, tmp_path / "run")
    step = int(str(found.value).split("step ")[1].split()[0])
    saved = sorted((tmp_path / "run/checkpoints").glob("step_*"))
    assert all(int(p.name.removeprefix("step_")) < step for p in saved)
    for path in saved:  # earlier checkpoints are intact
        meta = checkpoint.read_meta(path)
        assert sha256_of(path / "state.safetensors") == meta["sha256"]


def test_unreadable_samples_are_skipped_up_to_a_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = tmp_path / "data"
    for name in ("a", "b"):
        (pictures / name).mkdir(parents=True)
    source = toy_datasets.Digits()
    for i in range(64):
        content = source[i].content()
        assert isinstance(content, bytes)
        (pictures / "ab"[i % 2] / f"{i}.png").write_bytes(content)
    (pictures / "a" / "10.png").write_bytes(b"\x89PNG\r\n nothing")
    recipe = recipe_of("hiera_nano_32", schedule__epochs=2, data__max_bad=0.05)
    splits = datasets.open_splits(pictures)
    run(recipe, tmp_path / "run", splits)
    bad = events(tmp_path / "run", "bad")
    assert {event["input"] for event in bad} == {str(pictures / "a" / "10.png")}
    assert all(event["step"] > 0 for event in bad)
    assert events(tmp_path / "run", "step")[-1]["unreadable"] == 2  # once in each pass
    card = json.loads((tmp_path / "run/hiera.json").read_text())
    assert card["training"]["unreadable"] == 2
    strict = recipe_of("hiera_nano_32", schedule__epochs=2, data__max_bad=0.01)
    with pytest.raises(TrainingError, match=r"more than data\.max_bad"):
        run(strict, tmp_path / "strict", splits)
    # The unreadable sample has no weight, so it does not change the gradients of the others.
    recipe = recipe_of("hiera_nano_32", batch_size=64)
    batch = next(batches_of(recipe, splits.train, (32, 32)))
    assert batch.weight.sum() == 63
    assert len(batch.x[batch.weight == 0].unique()) == 1  # a black picture


def test_accumulation_does_not_change_losses(tmp_path: Path) -> None:
    """With mixup, drop path and dropout, which are drawn for each view of the whole batch."""
    for parts in (1, 4):
        recipe = recipe_of(
            "hiera_nano_32",
            accumulate=parts,
            schedule__epochs=2,
            augment__mixup=0.8,
            model__config={**NARROW, "drop_path_rate": 0.3, "head_dropout": 0.2},
        )
        run(recipe, tmp_path / str(parts))
    pairs = zip(losses(tmp_path / "1"), losses(tmp_path / "4"), strict=True)
    assert max(abs(a - b) for a, b in pairs) < 1e-5


def test_losses_with_checkpointing_and_in_bf16(tmp_path: Path) -> None:
    for name, settings in (
        ("plain", {}),
        ("recomputed", {"grad_checkpointing": True}),
        ("bf16", {"precision": "bf16"}),
    ):
        run(recipe_of("hiera_nano_32", schedule__epochs=2, **settings), tmp_path / name)
    plain, recomputed, half = (losses(tmp_path / n) for n in ("plain", "recomputed", "bf16"))
    assert plain == pytest.approx(recomputed, abs=1e-6)
    assert plain != half and plain == pytest.approx(half, rel=0.05)


def test_fine_tuning_starts_from_the_weights_of_an_autoencoder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(recipe_of("mae_hiera_nano_32", schedule__epochs=1), tmp_path / "mae")
    before = hiera_core.MaskedAutoencoderHiera.from_pretrained(tmp_path / "mae")
    recipe = recipe_of("hiera_nano_32", schedule__epochs=1, optimizer__lr=0)
    run(recipe, tmp_path / "ft", init_from=str(tmp_path / "mae"))
    after = hiera_core.Hiera.from_pretrained(tmp_path / "ft")
    name = "blocks.1.attn.qkv.weight"
    assert torch.equal(before.get_parameter(name), after.get_parameter(name))
    assert "norm (2), head (2) newly initialised" in caplog.text
    # It has a name of its own, also in records and for the class that loads it.
    assert json.loads((tmp_path / "ft/hiera.json").read_text())["model"] == "hiera_nano_32"
    assert hiera_core.Hiera.from_pretrained(tmp_path / "mae").card["model"] == "hiera_nano_32"
    record = hiera_core.predict(next(iter(_save_digits(tmp_path))), str(tmp_path / "ft"))
    assert isinstance(record, dict) and record["model"] == "hiera_nano_32"


@pytest.mark.parametrize("model", ["mae_hiera_nano_32", "mae_hiera_nano_8x32"])
def test_the_training_step_compiles_as_one_graph(model: str) -> None:
    """As with `--compile`. Under fullgraph, a graph break is an error."""
    recipe = recipe_of(model)
    mae = hiera_core.create_model(model, **NARROW_MAE).train()
    units = torch.stack([sampler.MaskSampler(mae.layout.windows, 0.6).draw(i) for i in range(2)])
    x = torch.randn(2, 3, *mae.config["input_size"])
    batch = dataloader.Batch(x, torch.ones(2), visible_units=units)
    from hiera_core.training.losses import compute_losses

    expected = compute_losses(mae, batch, recipe, torch.float32).losses
    mae.compile(fullgraph=True, backend="aot_eager")
    found = compute_losses(mae, batch, recipe, torch.float32).losses
    found.mean().backward()
    assert_close(found.detach(), expected.detach(), 1e-5)
    assert mae.get_parameter("blocks.0.attn.qkv.weight").grad is not None


def test_out_of_memory_has_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(hiera_core.Hiera, "forward", no_memory)
    with pytest.raises(DeviceError, match="accumulate"):
        run(recipe_of("hiera_nano_32", schedule__epochs=1), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 1024}, "fewer than the 1024 of one step"),
        ({"batch_size": 1024}, "--set batch_size=128$"),
        ({"batch_size": 30, "accumulate": 15, "augment__mixup": 1.0}, None),
    ],
)
def test_batches_larger_than_the_data_are_refused(
    tmp_path: Path, settings: Any, message: str | None
) -> None:
    if message is None:
        sampler.StepSampler(128, recipe_of("hiera_nano_32", **settings))
        return
    with pytest.raises(UsageError, match=message):
        run(recipe_of("hiera_nano_32", **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_clips_of_a_video_start_at_their_positions(tmp_path: Path) -> None:
    """A position of 0 is the start of the video, and a clip at 1 ends with the last frame."""
    from hiera_core.data.transforms import VideoTransform

    entry = zoo.get("hiera_nano_8x32")
    clip = VideoTransform.from_preprocessing(entry.preprocessing, entry.config["input_size"])
    frames = np.zeros((24, 48, 48, 3), np.uint8)
    frames += np.arange(24, dtype=np.uint8)[:, None, None, None] * 10
    views = dataloader.read_clips(video_writer.encode(frames, 4), clip, [0.0, 0.5, 1.0])
    shades = [view[:, 20, 20, 0].astype(int) // 10 for view in views]
    for found, start in zip(shades, (0, 8, 16), strict=True):
        assert np.abs(found - np.arange(start, start + 8)).max() <= 1


def test_train_on_the_command_line(
    tmp_path: Path, hiera: Callable[..., tuple[int, str, str]]
) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "extends: hiera_nano_32\nmodel: {config: {embed_dim: 8, stages: [1, 1, 1]}}\n"
        "schedule: {epochs: 1, warmup_epochs: 0}\nbatch_size: 128\nlog_every: 4\n"
    )
    code, _, err = hiera("train", recipe, "digits", "-o", tmp_path / "run", "-j", "0")
    assert code == 0
    assert "step 11/11" in err and "top-1" in err and "predict --checkpoint" in err
    code, out, _ = hiera("eval", "digits", "--checkpoint", tmp_path / "run", "-f", "json")
    found = json.loads(out)
    assert code == 0 and found["samples"] == 359
    assert found["top1"] == pytest.approx(events(tmp_path / "run", "val")[-1]["top1"])
    code, _, err = hiera("train", recipe, "digits", "-o", tmp_path / "run")
    assert code == 2 and "--resume auto" in err
    code, _, err = hiera("train", recipe, tmp_path / "nothing", "-o", tmp_path / "run2")
    assert code == 2 and "no data" in err


def test_pre_training_draws_pictures_after_every_epoch(tmp_path: Path) -> None:
    """The pictures show the same held-out samples under the same masks."""
    from PIL import Image

    recipe = recipe_of("mae_hiera_nano_32", schedule__epochs=2, ema=0.5)
    run(recipe, tmp_path / "run")
    files = sorted((tmp_path / "run/pictures").iterdir())
    assert [f.name for f in files] == ["epoch-0001.png", "epoch-0002.png"]
    pictures = []
    for file in files:
        with Image.open(file) as image:
            pictures.append(np.asarray(image))
    first, second = pictures
    assert first.shape == (4 * 166 + 6 + 20, 3 * 166 + 6, 3)
    column = 166
    assert np.array_equal(first[:, : 2 * column], second[:, : 2 * column]), (
        "originals and masks do not change"
    )
    assert not np.array_equal(first[:660, 2 * column :], second[:660, 2 * column :])
    run(recipe_of("hiera_nano_32", schedule__epochs=1), tmp_path / "other")
    assert not (tmp_path / "other/pictures").exists(), "a classifier draws no pictures"


# Signals ----------------------------------------------------------------------------------------


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a signal arrive in the middle of the step after `step` steps, once."""
    original, left = trainer.Trainer._step, [True]

    def interrupted(self: trainer.Trainer, number: int, batches: Any) -> torch.Tensor:
        values = original(self, number, batches)
        if number == step - 1 and left:
            left.clear()
            unfinished.raise_or_defer(KeyboardInterrupt())
        return values

    monkeypatch.setattr(trainer.Trainer, "_step", interrupted)


def recipe_with_reports() -> recipe.Recipe:
    settings: dict[str, Any] = {"schedule__epochs": 3, "log_every": 5, "val_every": 2}
    config = {**NARROW, "drop_path_rate": 0.3}
    return recipe_of("hiera_nano_32", ema=0.9, save_every=2, model__config=config, **settings)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run(recipe_with_reports(), folder)
    return folder


@pytest.mark.parametrize("step", [1, 3, 5, 8, 12])
def test_an_interrupted_run_continues_exactly(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """In the middle of a report (1, 3), at a report (5), at a validation and checkpoint (8), at the
    end (12)."""
    recipe = recipe_with_reports()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as found:
        interrupt_after(step, patch)
        run(recipe, tmp_path / "cut")
    (note,) = found.value.__notes__
    assert note == (
        f"step {step} of 12 is saved in {tmp_path / 'cut'}; to continue: "
        f"hiera train --resume {tmp_path / 'cut'} -j 0"
    )
    latest = (tmp_path / "cut/checkpoints/latest").read_text().strip()
    assert latest == f"step_{step:08}" and not (tmp_path / "cut/model.safetensors").exists()
    result = run(recipe, tmp_path / "cut", resume="auto")
    assert result["step"] == 12 and result["val"]["samples"] == 32
    for name in ("model.safetensors", "hiera.json"):
        assert (whole_run / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    for kind in ("step", "val"):
        whole, cut = ([(e["step"], e["loss"]) for e in events(folder, kind)]
                      for folder in (whole_run, tmp_path / "cut"))  # fmt: skip
        assert whole == cut


def test_a_signal_during_validation_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation ends after a batch, and is done again when the run continues."""
    original = validate.compute_losses

    def interrupted(*arguments: Any) -> Any:
        unfinished.raise_or_defer(KeyboardInterrupt())
        return original(*arguments)

    recipe = recipe_of("hiera_nano_32", schedule__epochs=2, batch_size=16)
    run(recipe, tmp_path / "whole", digits(32))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(validate, "compute_losses", interrupted)
        run(recipe, tmp_path / "cut", digits(32))
    assert not events(tmp_path / "cut", "val")
    run(recipe, tmp_path / "cut", digits(32), resume="auto")
    assert events(tmp_path / "cut", "val") == events(tmp_path / "whole", "val")


def test_control_c_in_a_program_saves_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that uses the library has Python's own handler. A second signal ends at once."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        pytest.skip("the tests run without Python's handler")
    original = trainer.Trainer._step

    def pressed(self: trainer.Trainer, number: int, batches: Any) -> torch.Tensor:
        for _ in range(presses):
            signal.raise_signal(signal.SIGINT)
        return original(self, number, batches)

    monkeypatch.setattr(trainer.Trainer, "_step", pressed)
    recipe = recipe_of("hiera_nano_32", schedule__epochs=1)
    for presses, saved in ((1, ["latest", "step_00000001"]), (2, [])):
        folder = tmp_path / str(presses)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, folder)
        assert sorted(p.name for p in (folder / "checkpoints").glob("*")) == saved
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Display ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["cat"], ["cat", "dog"]])
def test_a_single_class_is_pointed_out(
    names: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A user may name the folder above that of the class folders."""
    sample = next((Path(hiera_core.__file__).parent / "zoo/assets/samples").glob("*.png"))
    for number in range(4):
        target = tmp_path / "photos" / names[number % len(names)] / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sample, target)
    recipe = recipe_of("hiera_nano_32", schedule__epochs=1, batch_size=4)
    run(recipe, tmp_path / "run", datasets.open_splits(str(tmp_path / "photos"), None))
    assert ("all samples are of one class" in caplog.text) == (len(names) == 1)


def test_the_first_step_is_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And before it, what is trained, and that the weights are random."""
    caplog.set_level(logging.INFO, "hiera")
    recipe = recipe_of("hiera_nano_32", schedule__epochs=2, log_every=100)
    run(recipe, tmp_path / "run")
    start, where, hint, first, *_ = caplog.messages
    assert where.startswith("the run is written to ")
    assert re.fullmatch(
        r"hiera_nano_32: [\d.]+M parameters, 10 classes, 128 images, 32 held out, "
        r"on cpu in float32, weights random",
        start,
    )
    assert "weights are random" in hint and "--init-from mae_hiera_nano_32" in hint
    assert re.fullmatch(
        r"step 1/8, epoch 0.25, loss 2\.\d+, lr 0.0005, elapsed 0:00:\d\d, eta 0:\d\d:\d\d", first
    )
    assert len(events(tmp_path / "run", "step")) == 2, "the log itself has no further event"
    caplog.clear()
    run(recipe, tmp_path / "other", init_from=str(tmp_path / "run"))
    assert f"weights from {tmp_path / 'run'}" in caplog.text
    assert "weights are random" not in caplog.text
    caplog.clear()
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000008")
    run(recipe, tmp_path / "run", resume="auto")
    assert "weights from the checkpoint" in caplog.text and "step 5/8" in caplog.text


def test_a_live_table_shows_the_progress(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the first step, and then about twice a second."""
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(
        run_log._LiveTable, "show", lambda self, event, values: shown.append(values)
    )
    log = run_log.RunLog(tmp_path, 100)
    log.open(0)
    for step in range(1, 4):
        if log.wants_progress(step):
            log.show_progress({"step": step, "epoch": 0.1, "loss": 2.0, "lr": 0.0})
    assert [values["step"] for values in shown] == [1]
    monkeypatch.setattr(run_log, "PROGRESS_S", 0.0)
    assert log.wants_progress(4)
    log.close()
    assert {"step", "epoch", "loss", "lr", "elapsed", "eta"} <= set(shown[0])


# Errors -----------------------------------------------------------------------------------------


def test_a_failed_start_changes_nothing(tmp_path: Path) -> None:
    """Errors that can be detected before training are raised before the folder is changed."""
    recipe = recipe_of("hiera_nano_32", schedule__epochs=1)
    folder = tmp_path / "run"
    misspelt = recipe_of("hiera_nano_32", model__config__drop_path_rat=0.1)
    with pytest.raises(UsageError, match="did you mean drop_path_rate"):
        run(misspelt, folder)
    with pytest.raises(CheckpointError):
        run(recipe, folder, init_from=str(tmp_path / "none.pth"))
    with pytest.raises(UsageError, match="the data decides"):
        run(recipe_of("hiera_nano_32", model__config__num_classes=7), folder)
    assert not folder.exists()
    run(recipe, folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError):
        run(recipe, folder, overwrite=True, init_from=str(tmp_path / "none.pth"))
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_resumed_run_keeps_preprocessing_and_source(tmp_path: Path) -> None:
    """Both come from the initial checkpoint, not from the zoo."""
    model = hiera_core.mae_hiera_nano_32(**NARROW_MAE)
    model.card["preprocessing"] = {**model.card["preprocessing"], "mean": [0.2, 0.2, 0.2]}
    model.save_pretrained(tmp_path / "start")
    recipe = recipe_of("hiera_nano_32", schedule__epochs=2)
    run(recipe, tmp_path / "whole", init_from=str(tmp_path / "start"))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step_00000008")
    run(recipe, tmp_path / "cut", resume=str((tmp_path / "cut").resolve()))
    for name in ("model.safetensors", "hiera.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    card = json.loads((tmp_path / "cut/hiera.json").read_text())
    assert card["preprocessing"]["mean"][0] == 0.2 and "start" in card["source"]


def test_a_damaged_checkpoint_names_the_previous_one(
    tmp_path: Path, hiera: Callable[..., tuple[int, str, str]]
) -> None:
    """The error names the previous checkpoint. Resuming from it removes the later ones."""
    recipe = recipe_of("hiera_nano_32", schedule__epochs=3, keep=3)
    folder = tmp_path / "run"
    run(recipe, folder)
    expected = (folder / "model.safetensors").read_bytes()
    newest, previous = (folder / f"checkpoints/step_{n:08}" for n in (12, 8))
    part = newest / "state.safetensors"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(CheckpointError) as found:
        run(recipe, folder, resume="auto")
    assert found.value.hint == f"--resume {previous}"
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    code, _, err = hiera(
        "train", folder / "recipe.yaml", "digits", "-o", folder, "--resume", newest, "-q"
    )
    assert code == 2 and "other data" in err, "the command trains on all of the digits"
    run(recipe, folder, resume=str(previous))
    assert (folder / "model.safetensors").read_bytes() == expected
    shutil.rmtree(folder / "checkpoints/step_00000012")
    run(recipe, folder, resume=str(previous))
    assert sorted(p.name for p in (folder / "checkpoints").glob("step*"))[-1] == newest.name
    (previous / "meta.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"meta\.json"):
        run(recipe, folder, resume=str(previous))


def test_a_full_disk_leaves_no_partial_checkpoints(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    recipe = recipe_of("hiera_nano_32", schedule__epochs=1, save_every=0.5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))  # no file may grow larger
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            run(recipe, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "run/checkpoints").glob("step_????????"))
    run(recipe, tmp_path / "run", resume="auto")


def test_a_share_that_holds_out_nothing_is_refused(
    tmp_path: Path, hiera: Callable[..., tuple[int, str, str]]
) -> None:
    """Otherwise the run would report an accuracy of 0%."""
    for share, what in (("1e-9", "none"), ("0.9999", "all")):
        setting = f"data.val={share}"
        code, _, err = hiera("train", "hiera_nano_32", "digits", "-o", tmp_path, "--set", setting)
        assert code == 2 and f"holds out {what} of 1797 samples" in err


def test_data_without_a_readable_sample_has_no_loss(tmp_path: Path) -> None:
    """Even if data.max_bad allows it, because there is nothing to measure."""
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    (tmp_path / "list.txt").write_text("\n".join(f"{n}.png {n % 10}" for n in range(40)))
    bad = datasets.open_dataset(tmp_path / "list.txt")
    recipe = recipe_of("hiera_nano_32", schedule__epochs=1, data__max_bad=1)
    with pytest.raises(TrainingError, match="40 of 40 held-out samples"):
        run(recipe, tmp_path / "run", datasets.Splits(digits().train, bad))
    with pytest.raises(TrainingError, match="none of the samples up to step 1 can be read"):
        run(recipe, tmp_path / "other", datasets.Splits(bad))


def test_a_diverged_run_has_its_own_exit_code(
    tmp_path: Path, hiera: Callable[..., tuple[int, str, str]]
) -> None:
    settings = ("optimizer.lr=1e30", "schedule.kind=constant", "schedule.warmup_epochs=0")
    sets = [word for setting in settings for word in ("--set", setting)]
    code, _, err = hiera("train", "hiera_nano_32", "digits", "-o", tmp_path, "-j", "0", "-q", *sets)
    assert code == 6 and "is no number" in err and err.count("\n") == 1


def test_rates_do_not_count_the_time_of_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reading of this clock is a second later, and a validation takes a thousand seconds."""
    now = [0.0]

    def clock() -> float:
        now[0] += 1
        return now[0]

    def slow(*_: Any) -> dict[str, Any]:
        now[0] += 1000
        return {"loss": float("nan"), "samples": 1, "bad": 0}

    monkeypatch.setattr(step_statistics.time, "perf_counter", clock)
    monkeypatch.setattr(measurements, "validate", slow)
    # Validations after steps 3, 6, 9 and 12, measurements after steps 5 and 10, too.
    recipe = recipe_of("hiera_nano_32", schedule__epochs=3, val_every=0.75, log_every=5)
    run(recipe, tmp_path / "run")
    steps = events(tmp_path / "run", "step")
    assert len(events(tmp_path / "run", "val")) == 4
    assert all(event["seconds"] < 100 for event in steps)
    assert all(event["eta"] < 100 * 12 for event in steps)


def test_the_log_is_strict_json(tmp_path: Path, real_curves: None) -> None:
    """A gradient norm may be infinite (fp16), and so may a loss on held-out data."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    log = run_log.RunLog(tmp_path, 10, live=False)
    log.open(0)
    log.log_event("step", step=1, epoch=1, loss=0.5, grad_norm=float("inf"))
    log.log_event("val", step=1, epoch=1, loss=float("nan"), samples=1)
    log.close()
    first, second = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(first, parse_constant=refuse)["grad_norm"] is None
    assert json.loads(second, parse_constant=refuse)["loss"] is None
    with (tmp_path / "log.jsonl").open("a") as file:  # from an earlier version
        file.write('{"event": "step", "step": 2, "grad_norm": Infinity}\n')
    log.open(2)
    log.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all(json.loads(line, parse_constant=refuse) for line in lines)
    log.draw_curves()


@pytest.mark.parametrize(
    "line",
    ["3", "[]", "{}", '{"event": 1, "step": 1}', '{"event": "step", "step": "1"}', "[" * 100_000],
)
def test_odd_lines_end_a_log(tmp_path: Path, line: str) -> None:
    good = {"event": "step", "step": 1, "epoch": 1, "loss": "odd"}
    (tmp_path / "log.jsonl").write_text(f"{json.dumps(good)}\n{line}\n{json.dumps(good)}\n")
    assert list(run_log.events(tmp_path)) == [good]
    log = run_log.RunLog(tmp_path, 10, live=False)
    log.open(1)
    log.close()
    assert log.draw_curves() is None


# Devices that are not here -----------------------------------------------------------------------


@pytest.mark.parametrize(("device", "expected"), [("mps", False), ("cpu", False), ("cuda", True)])
def test_only_cuda_copies_without_waiting(
    monkeypatch: pytest.MonkeyPatch, device: str, expected: bool
) -> None:
    """Under MPS, a copy may read memory that is freed by then."""
    flags: list[bool] = []

    def to(self: torch.Tensor, device: torch.device, non_blocking: bool) -> torch.Tensor:
        flags.append(non_blocking)
        return self

    monkeypatch.setattr(torch.Tensor, "to", to)
    dataloader.Batch(torch.zeros(2, 3), torch.ones(2)).to(torch.device(device))
    assert flags == [expected] * 2


def test_sums_are_not_computed_in_float64_on_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPS has no float64. The stand-in for its tensors is one that can only be moved."""

    class OnMps:
        def to(self, device: torch.device) -> torch.Tensor:
            assert device.type == "cpu"
            return torch.ones(3)

    total = distributed.World(torch.device("mps")).total(OnMps())  # type: ignore[arg-type]
    assert total.dtype == torch.float64


@pytest.mark.parametrize(("local", "cores", "expected"), [("8", 16, 2), ("1", 4, 4), ("4", 64, 8)])
def test_workers_share_the_cores_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, local: str, cores: int, expected: int
) -> None:
    """WORLD_SIZE also counts the processes on other machines."""
    monkeypatch.setenv("WORLD_SIZE", "512")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    assert build.default_workers() == expected
    monkeypatch.delattr(os, "sched_getaffinity")  # not on macOS and Windows
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert build.default_workers() == expected


@pytest.mark.parametrize("workers", [-1, 10**11])
def test_impossible_numbers_of_workers_are_refused(workers: int) -> None:
    with pytest.raises(UsageError, match="workers"):
        build.RunOptions(workers=workers)


def test_resuming_with_other_data_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of("hiera_nano_32", schedule__epochs=1)
    run(recipe, tmp_path / "run")
    with pytest.raises(UsageError, match="other data"):
        run(recipe, tmp_path / "run", digits(96), resume="auto")


def test_unreadable_held_out_samples_stop_a_run(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    (tmp_path / "val.txt").write_text("\n".join(f"{n}.png {n}" for n in range(8)))
    splits = datasets.Splits(digits().train, datasets.open_dataset(tmp_path / "val.txt"))
    with pytest.raises(TrainingError, match="8 of 8 held-out samples"):
        run(recipe_of("hiera_nano_32", schedule__epochs=1), tmp_path / "run", splits)
