"""`keep_best:` in a recipe: whether the weights of a step are the best so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...data.datasets import Splits
from ...errors import UsageError
from ..recipe import Recipe

FOLDER = "best"  # in the folder of the run


class BestWeights:
    """Knows the best measurement of a run.

    Args:
        recipe: The recipe, for the kind of measurement.
        splits: The data of the run.
        value: The best measurement so far, of a run that resumes.

    Raises:
        UsageError: The measurement needs held-out data, and there is none.
    """

    def __init__(self, recipe: Recipe, splits: Splits, value: float | None = None) -> None:
        self.kind, self.value = recipe.keep_best, value
        if self.kind in ("loss", "top1") and splits.val is None:
            raise UsageError(f"keep_best is {self.kind}, and no data is held out", "set data.val")

    def improves(self, measured: Mapping[str, Any]) -> bool:
        """Return whether measurements are better than all before, and remember them if so.

        Args:
            measured: `val` and `probe`, as far as they have been measured.
        """
        group, name = ("probe", "top1") if self.kind == "probe" else ("val", self.kind)
        found = None if self.kind is None else measured.get(group, {}).get(name)
        if found is None or not math.isfinite(found):
            return False
        sign = -1 if self.kind == "loss" else 1
        if self.value is not None and sign * found <= sign * self.value:
            return False
        self.value = float(found)
        return True
