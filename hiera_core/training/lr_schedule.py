"""Learning rate schedule: linear warm-up, then a half cosine or a constant rate."""

from __future__ import annotations

import math

from .recipe import Recipe


def learning_rate_at(step: int, steps: int, recipe: Recipe) -> float:
    """Return the learning rate of step `step` of `steps`, scaled to the recipe's batch size.

    It depends on the step alone, so a checkpoint holds no state of the schedule.
    """
    schedule, scale = recipe.schedule, recipe.batch_size / recipe.optimizer.lr_batch_size
    peak, final = recipe.optimizer.lr * scale, schedule.final_lr * scale
    warmup = schedule.warmup_epochs / schedule.epochs * steps
    if step < warmup:
        return peak * step / warmup
    if schedule.kind == "constant":
        return peak
    progress = (step - warmup) / max(1.0, steps - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))
