"""Classes of unequal size: splits that keep their shares, orders and weights that even them out."""

from __future__ import annotations

import numpy as np

SPLIT_SEED = 0


def held_out_rows(count: int, share: float, labels: np.ndarray | None) -> np.ndarray:
    """Return which samples are held out, the same ones every time, in ascending order.

    With labels, every class is held out in proportion to its size: a class of n samples gives
    n * share, rounded down or up so that the total is right. A class of one sample stays in the
    training data if possible.

    Args:
        count: Number of samples.
        share: Share to hold out, from 0 to 1.
        labels: Class indices, int64 [count], if they are known.

    Returns:
        Indices, int64 [round(count * share)].
    """
    generator = np.random.default_rng(SPLIT_SEED)
    order, total = generator.permutation(count), round(count * share)
    if labels is None:
        return np.sort(order[:total])
    sizes = np.bincount(labels)
    wanted = sizes * share
    quotas = np.floor(wanted).astype(np.int64)
    # Classes with the largest remainders give one more. Of equal ones, the largest class does.
    remainders = np.where(sizes > 1, wanted - quotas, wanted - quotas - 1)
    for number in np.lexsort((-sizes, -remainders))[: total - int(quotas.sum())]:
        quotas[number] += 1
    shuffled = labels[order]
    ranks = np.empty(count, np.int64)  # how many samples of its class come before each one
    by_class = np.argsort(shuffled, kind="stable")
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    ranks[by_class] = np.arange(count) - starts[shuffled[by_class]]
    return np.sort(order[ranks < quotas[shuffled]])


def balanced_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return an order of as many samples as there are, in which all classes are equally frequent.

    Samples of a small class come several times, and some of a large one not at all. The numbers
    within a class differ by one at most.

    Args:
        labels: Class indices, int64 [n].
        seed: Seed of the order.

    Returns:
        Indices, int64 [n].
    """
    generator = np.random.default_rng(seed)
    classes = generator.permutation(np.unique(labels))
    each, more = divmod(len(labels), len(classes))
    parts: list[np.ndarray] = []
    for place, number in enumerate(classes):
        own = np.flatnonzero(labels == number)
        whole, rest = divmod(each + (place < more), len(own))
        parts += [np.tile(own, whole), generator.permutation(own)[:rest]]
    return generator.permutation(np.concatenate(parts))


def balanced_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return a weight for each class that is inversely proportional to its size, float32 [classes].

    The mean over the samples is 1. A class without samples has weight 0.
    """
    sizes = np.bincount(labels, minlength=num_classes).astype(np.float64)
    present = sizes > 0
    weights = np.zeros(num_classes)
    weights[present] = len(labels) / (sizes[present] * present.sum())
    return weights.astype(np.float32)
