"""The learning rate of a step: linear warm-up, then a half cosine or none."""

from __future__ import annotations

import math

from .recipe import Recipe


def learning_rate_at(step: int, steps: int, recipe: Recipe) -> float:
    """The learning rate of step `step` of `steps`, scaled to the recipe's batch size.

    A function of the step alone: there is no state to save.
    """
    part, scale = recipe.schedule, recipe.batch_size / recipe.optimizer.lr_batch_size
    peak, final = recipe.optimizer.lr * scale, part.final_lr * scale
    warmup = part.warmup_epochs / part.epochs * steps
    if step < warmup:
        return peak * step / warmup
    if part.kind == "constant":
        return peak
    done = (step - warmup) / max(1.0, steps - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * done))
