"""Tests of recipes: one for each model, the values of the paper, checks of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hiera_core import zoo
from hiera_core.errors import UsageError
from hiera_core.training import recipe_reader as recipes
from hiera_core.training.lr_schedule import learning_rate_at


def test_every_model_has_a_recipe() -> None:
    assert sorted(recipes.names()) == sorted(zoo.names())
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
        ({"batch_size": "many"}, "batch_size is 'many'; expected int"),
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
