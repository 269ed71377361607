"""Linear probe: logistic regression on frozen features.

It is the protocol of CLIP (Radford et al. 2021, arXiv 2103.00020, section 3.2): the loss is convex
and L-BFGS minimises it, so that there is no learning rate to choose, and two runs agree. Only the
strength of the weight decay is chosen, on a part of the training samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .frozen_features import FrozenFeatures

DECAYS = tuple(10.0**power for power in range(-5, 1))  # that are tried
HELD_OUT = 0.1  # share of the training samples that chooses among them
MAX_STEPS = 1000  # of L-BFGS
SEED = 0
log = logging.getLogger("hiera")


@dataclass
class LinearProbe:
    """A linear classifier of features.

    Attributes:
        weight, bias: Of the standardised features, float32 [classes, c] and [classes].
        mean, std: Of the training features, float32 [c].
        decay: Weight decay that was chosen.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    decay: float

    def scores(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return logits. [n, c] -> [n, classes]"""
        return F.linear((vectors - self.mean) / self.std, self.weight, self.bias)


def fit_linear_probe(
    train: FrozenFeatures, num_classes: int, on_step: Callable[[], None] = lambda: None
) -> LinearProbe:
    """Fit a linear probe, and choose its weight decay.

    Args:
        train: Features with labels.
        num_classes: Number of classes.
        on_step: Called before each evaluation of the loss. What it raises ends the fit.
    """
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SEED))
    count = max(1, round(HELD_OUT * len(train)))
    held_out, rest = train.rows(order[:count]), train.rows(order[count:])
    accuracy: dict[float, float] = {}
    probe = None
    for decay in sorted(DECAYS, reverse=True) if len(rest) else ():
        # The strongest decay comes first, because each solution is a good start for the next one.
        probe = _fit(rest, num_classes, decay, probe, on_step)
        right = probe.scores(held_out.vectors).argmax(1) == held_out.labels
        accuracy[decay] = float(right.float().mean())
    # Of equally good ones, take the strongest.
    best = max(accuracy, key=lambda decay: (accuracy[decay], decay), default=max(DECAYS))
    log.debug("accuracy by weight decay: %s", accuracy)
    return _fit(train, num_classes, best, None, on_step)


def _fit(
    train: FrozenFeatures,
    num_classes: int,
    decay: float,
    start: LinearProbe | None,
    on_step: Callable[[], None],
) -> LinearProbe:
    """Minimise the mean cross entropy plus decay / 2 times the squared norm of the weight."""
    mean, std = train.vectors.mean(0), train.vectors.std(0, correction=0).clamp(min=1e-6)
    x = (train.vectors - mean) / std
    if start is None:
        weight, bias = x.new_zeros(num_classes, x.shape[1]), x.new_zeros(num_classes)
    else:
        weight, bias = start.weight.clone(), start.bias.clone()
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=MAX_STEPS,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def loss() -> float:
        on_step()
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), train.labels)
        value = value + decay / 2 * weight.square().sum()
        value.backward()
        return value.item()

    with torch.enable_grad():
        optimizer.step(loss)
    return LinearProbe(weight.detach(), bias.detach(), mean, std, decay)
