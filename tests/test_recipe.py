"""Tests of recipes: one for each model, the values of the paper, checks of keys and values."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hiera_core import zoo
from hiera_core.errors import UsageError
from hiera_core.training import recipe_reader as recipes
from hiera_core.training import sampler
from hiera_core.training.lr_schedule import learning_rate_at


def test_every_model_has_a_recipe() -> None:
    trainable = [name for name, entry in zoo.models().items() if entry.family == "hiera"]
    assert sorted(recipes.names()) == sorted(trainable)
    for name in recipes.names():
        recipe = recipes.read_recipe(name)
        assert recipe.model.name == name
        assert (
            recipes.Recipe.from_dict(recipe.to_dict()) == recipe
        )  # writing and reading change nothing


def test_the_old_name_of_keep_checkpoints_works_in_every_layer(tmp_path: Path) -> None:
    base, child = tmp_path / "base.yaml", tmp_path / "child.yaml"
    base.write_text("extends: hiera_nano_32\nkeep: 5\n")
    child.write_text("extends: base.yaml\nkeep_checkpoints: 7\n")
    assert recipes.read_recipe(base).keep_checkpoints == 5
    assert recipes.read_recipe(child).keep_checkpoints == 7
    assert recipes.read_recipe(base, {"keep_checkpoints": 2}).keep_checkpoints == 2
    assert recipes.read_recipe(child, {"keep": 3}).keep_checkpoints == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # Ryali et al. 2023, tables 11 and 14
        ("hiera_base_224", (1024, 2e-3, 0.7, 100, 0.1)),
        ("hiera_tiny_224", (1024, 2e-3, 0.65, 300, 0.1)),
        ("hiera_huge_224", (1024, 1e-3, 0.85, 50, 0.3)),
        ("hiera_large_16x224", (256, 8e-4, 0.9, 100, 0.2)),
        ("hiera_huge_16x224", (256, 4e-4, 0.9, 100, 0.3)),
        ("mae_hiera_large_224", (4096, 8e-4, 1.0, 400, 0.2)),
        ("mae_hiera_base_16x224", (512, 8e-4, 1.0, 800, 0.1)),
    ],
)
def test_values_match_the_paper(name: str, expected: tuple[float, ...]) -> None:
    recipe = recipes.read_recipe(name)
    optimizer, schedule = recipe.optimizer, recipe.schedule
    drop_path = recipe.model.config["drop_path_rate"]
    found = (recipe.batch_size, optimizer.lr, optimizer.layer_decay, schedule.epochs, drop_path)
    assert found == expected
    assert optimizer.weight_decay == 0.05
    assert optimizer.betas == ((0.9, 0.95) if recipe.task == "mae" else (0.9, 0.999))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimiser.lr": 1}, "did you mean optimizer"),
        ({"optimizer.lrr": 1}, "'optimizer.lrr'; did you mean lr"),
        ({"augment.mixpu": 1}, "did you mean mixup"),
        ({"lr": 1}, "unknown key 'lr'; did you mean optimizer.lr?"),
        ({"learning_rate": 1}, "did you mean optimizer.lr?"),
        ({"learning_rat": 1}, "did you mean optimizer.lr?"),
        ({"optimizer.epochs": 1}, "did you mean schedule.epochs?"),
        ({"qwertz": 1}, "keys are "),
        ({"schedule.epochs": "x"}, "schedule.epochs is 'x'; expected a number"),
        ({"augment.flip": True}, "expected a number"),
        ({"grad_checkpointing": "x"}, "expected true or false"),
        ({"data.val": [1]}, "expected a number"),
        ({"batch_size": "many"}, "batch_size is 'many'; expected a whole number"),
        ({"batch_size": 0}, "above 0"),
        ({"batch_size": 63, "accumulate": 2}, "no multiple"),
        ({"optimizer.betas": [0.9]}, "optimizer.betas"),
        ({"optimizer": 3}, "key: value"),
        ({"optimizer.lr.x": 3}, "holds no further keys"),
        ({"precision": "fp8"}, "one of auto, fp32, bf16, fp16"),
        ({"task": "mae"}, "use mae_hiera_base_224"),
        ({"mask_ratio": "nan"}, "outside (0, 1)"),
        ({"ema": 1.0}, "below 1"),
        ({"optimizer.betas": [2, 3]}, "optimizer.betas[0] is 2"),
        ({"augment.flip": 2}, "between 0 and 1"),
        ({"augment.erasing": 5}, "between 0 and 1"),
        ({"optimizer.layer_decay": -1}, "between 0 and 1"),
        ({"optimizer.clip_grad": -3}, "above 0"),
        ({"augment.scale": [1, 0.2]}, "[smallest, largest]"),
        ({"schedule.epochs": 3}, "more than schedule.epochs 3"),
        ({"model.name": "hiera_base_225"}, "did you mean hiera_base_224"),
    ],
)
def test_wrong_values_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as error:
        recipes.read_recipe("hiera_base_224", settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"save_every": float("inf")},
        {"val_every": float("nan")},
        {"log_every": float("inf")},
        {"schedule.epochs": float("inf")},
        {"schedule.final_lr": float("nan")},
        {"batch_size": 10**400},
        {"batch_size": "²"},
        {"seed": float("inf")},
        {"seed": float("nan")},
        {"seed": 2.5},
        {"optimizer.lr": 10**400},
        {"augment.ratio": [1, float("inf")]},
        {"augment.randaugment_ops": -1},
        {"augment.randaugment_ops": 10**9},
        {"task": ["mae"]},
        {"task": {}},
        {"model": []},
        {"data.val": []},
        {"optimizer.betas": 3},
        {"model.config": 3},
    ],
)
def test_odd_values_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        recipes.read_recipe("hiera_base_224", settings)


def test_rare_but_possible_values_are_accepted() -> None:
    for settings in ({"seed": 10**30}, {"seed": -1}, {"save_every": 1e300}, {"log_every": 10**30}):
        recipes.read_recipe("hiera_base_224", settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("embed_dim", "-1"),
        ("embed_dim", "0"),
        ("embed_dim", "1.5"),
        ("embed_dim", ".nan"),
        ("embed_dim", "1000000000000000000000000000000"),
        ("embed_dim", "²"),
        ("embed_dim", "[8]"),
        ("num_heads", "0"),
        ("in_chans", "0"),
        ("stages", "3"),
        ("stages", "[1, x]"),
        ("stages", "[-1, 1, 1]"),
        ("patch_stride", "[0, 0]"),
        ("q_stride", "[0, 2]"),
        ("mask_unit_size", "[0, 0]"),
        ("input_size", "[.inf, 32]"),
        ("input_size", "[-32, -32]"),
        ("mlp_ratio", "-1"),
        ("mlp_ratio", ".inf"),
        ("drop_path_rate", ".nan"),
        ("dim_mul", "1e300"),
        ("q_pool", "{}"),
        ("mlp_ratio", "2026-01-01"),
    ],
)
def test_odd_sizes_of_a_model_are_refused(
    tmp_path: Path, hiera: Callable[..., tuple[int, str, str]], name: str, value: str
) -> None:
    setting = f"model.config.{name}={value}"
    arguments = ("train", "hiera_nano_32", "digits", "-o", tmp_path / "run", "--set", setting)
    code, _, err = hiera(*arguments, "-j", "0")
    assert code == 2 and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


def test_recipes_that_are_not_recipes_are_refused(
    tmp_path: Path, hiera: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "deep.yaml").write_text("[" * 10_000)
    (tmp_path / "self.yaml").write_text("extends: self.yaml\n")
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: ./a.yaml\n")
    (tmp_path / "far.yaml").write_text("extends: [hiera_nano_32]\n")
    (tmp_path / "model.yaml").write_text("extends: hiera_nano_32\nmodel: []\n")
    (tmp_path / "device.yaml").symlink_to("/dev/full")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for path in sorted(tmp_path.iterdir()):
        code, _, err = hiera("train", path, "digits", "-o", tmp_path / "run")
        assert code == 2 and err.count("\n") == 1, (path.name, err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["[" * 10_000, "!!bool x", "2026-13-45", "&a [*a]"])
def test_odd_settings_are_refused(hiera: Callable[..., tuple[int, str, str]], value: str) -> None:
    code, _, err = hiera("train", "hiera_nano_32", "digits", "--set", f"model.config={value}")
    assert code == 2 and "not valid YAML" in err


@pytest.mark.parametrize("option", [("--config", "/dev/full"), ("--config", "."), ("-j", "²")])
def test_odd_options_are_refused(
    hiera: Callable[..., tuple[int, str, str]], option: tuple[str, str]
) -> None:
    code, _, err = hiera("train", "hiera_nano_32", "digits", *option)
    assert code == 2 and err.count("\n") == 1, err


def test_a_run_of_too_many_steps_is_refused() -> None:
    for epochs in (1e9, 1e300):
        recipe = recipes.read_recipe("hiera_base_224", {"schedule.epochs": epochs})
        with pytest.raises(UsageError, match="more than 99,999,999 steps"):
            sampler.StepSampler(1_281_167, recipe)


def test_a_file_extends_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: hiera_base_224\noptimizer: {lr: 1e-3}\nbatch_size: 64\n")
    mine, base = recipes.read_recipe(path, {"data.val": 0.1}), recipes.read_recipe("hiera_base_224")
    assert (mine.optimizer.lr, mine.batch_size, mine.data.val) == (1e-3, 64, 0.1)
    assert mine.augment == base.augment
    (tmp_path / "other.yaml").write_text("extends: mine.yaml\nseed: 3\n")
    assert recipes.read_recipe(tmp_path / "other.yaml").batch_size == 64
    path.write_text("- a\n")
    with pytest.raises(UsageError, match="holds no keys"):
        recipes.read_recipe(path)
    with pytest.raises(UsageError, match="cannot be read"):
        recipes.read_recipe(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="did you mean"):
        recipes.read_recipe("hiera_bsae_224")


def test_the_learning_rate_warms_up_and_decays() -> None:
    recipe = recipes.read_recipe("hiera_base_224", {"batch_size": 256})  # a quarter of 1024
    rates = [learning_rate_at(step, 1000, recipe) for step in range(1001)]
    assert rates[0] == 0
    assert rates[25] == pytest.approx(2e-3 / 4 / 2)  # half-way through 5 epochs of warm-up
    assert rates[50] == pytest.approx(2e-3 / 4)
    assert rates[525] == pytest.approx(2e-3 / 4 / 2)
    assert rates[1000] == pytest.approx(0, abs=1e-12)


def test_print_recipe_applies_settings(hiera: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = hiera("train", "hiera_base_224", "--print-recipe", "--set", "seed=7")
    assert code == 0
    assert "layer_decay: 0.7" in out
    assert "seed: 7" in out
    code, _, err = hiera("train", "hiera_base_224", "--set", "seed")
    assert code == 2
    assert "key=value" in err
    code, _, err = hiera("train", "hiera_base_224")
    assert code == 2
    assert "no data" in err


def test_a_warm_up_is_shortened_with_the_epochs(caplog: pytest.LogCaptureFixture) -> None:
    """Only if it would take more than half of them, and nobody has given it."""
    caplog.set_level(logging.INFO, "hiera")
    for epochs, expected in ((1, 0.12), (0.5, 0.06), (5, 0.6), (6, 3.0), (25, 3.0)):
        caplog.clear()
        recipe = recipes.read_recipe(
            "hiera_nano_32", {"schedule.epochs": epochs}, shorten_warmup=True
        )
        assert recipe.schedule.warmup_epochs == expected
        assert ("warm-up is shortened from 3 to" in caplog.text) == (expected != 3.0)
    given = {"schedule.epochs": 1, "schedule.warmup_epochs": 3}
    with pytest.raises(UsageError, match="warmup_epochs 3 is more than"):
        recipes.read_recipe("hiera_nano_32", given, shorten_warmup=True)


def test_a_warm_up_in_a_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: hiera_nano_32\nschedule: {epochs: 4, warmup_epochs: 3}\n")
    assert recipes.read_recipe(path, shorten_warmup=True).schedule.warmup_epochs == 3
    path.write_text("extends: hiera_nano_32\nschedule: {epochs: 4}\n")
    assert recipes.read_recipe(path, shorten_warmup=True).schedule.warmup_epochs == 0.48


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--epochs 5", "--set schedule.epochs=5"),
        ("--epochs=5", "--set schedule.epochs=5"),
        ("--epohcs 5", "--set schedule.epochs=5"),
        ("--lr 1e-3", "--set optimizer.lr=1e-3"),
        ("--learning-rate 1e-3", "--set optimizer.lr=1e-3"),
        ("--batch-size 8", "--set batch_size=8"),
        ("--batch_size 8", "--set batch_size=8"),
        ("-b 8", "--set batch_size=8"),
        ("--weight-decay 0.1", "--set optimizer.weight_decay=0.1"),
        ("--warmup-epochs 1", "--set schedule.warmup_epochs=1"),
        ("--mixup 0.1", "--set augment.mixup=0.1"),
        ("--seed 1", "--set seed=1"),
        ("--set batch_size=8 seed=1", "repeat the option for each value: --set seed=1"),
        ("--amp", "--set precision=VALUE"),
        ("--input-size 64", "--set model.config.input_size=64"),
        ("--num-classes 3", "the data decides"),
        ("--data-path x", "second argument"),
        ("--num-workers 2", "--workers N"),
        ("--pretrained", "--init-from"),
        ("--gpus 2", "torchrun"),
        ("--devise cpu", "--device"),
        ("--nonsense", "--print-recipe"),
    ],
)
def test_options_of_other_trainers_have_a_hint(option: str, message: str, hiera: Any) -> None:
    code, _, err = hiera("train", "hiera_nano_32", "digits", *option.split())
    assert code == 2 and message in err and err.count("\n") == 1


def test_print_recipe_shows_the_data_and_the_weights(
    hiera: Callable[..., tuple[int, str, str]],
) -> None:
    start = ("--init-from", "mae_hiera_nano_32")
    code, out, _ = hiera("train", "hiera_nano_32", "digits", *start, "--print-recipe")
    values = yaml.safe_load(out)
    assert code == 0
    assert (values["data"]["path"], values["init_from"]) == ("digits", "mae_hiera_nano_32")


def test_resume_and_overwrite_exclude_each_other(
    hiera: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    both = ("--resume", "auto", "--overwrite", "-o", tmp_path / "run")
    code, _, err = hiera("train", "hiera_nano_32", "digits", *both)
    assert code == 2 and "leave out one of them" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file or directory"),
        (b"a: 1\nb: [1, 2\n", "line 3, column 1: "),
        (b"a: 1\n b: 2\n", "line 2, column 3: mapping values are not allowed here"),
        ("a: Käse".encode("utf-16")[:-1], "it is not in UTF-16"),
        ("a: Käse".encode("latin-1"), "it is not in UTF-8"),
        (b"a: \0", "it is not a text file"),
    ],
)
def test_recipes_that_cannot_be_read_are_described_plainly(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        recipes.read_recipe(path)
    assert f"cannot be read ({reason}" in str(error.value)
    for word in ("unicode string", "Errno", "codec"):
        assert word not in str(error.value)
