"""k-NN: the class of a sample is that of the training samples whose features are most similar.

The votes are weighted as by Wu et al. (2018, arXiv 1805.01978), with the defaults of DINO (Caron et
al. 2021, arXiv 2104.14294): 20 neighbours and a temperature of 0.07.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .frozen_features import FrozenFeatures

NEIGHBOURS = 20
TEMPERATURE = 0.07
CHUNK = 1 << 26  # similarities that are computed at once


def knn_scores(
    train: FrozenFeatures, queries: torch.Tensor, num_classes: int, neighbours: int = NEIGHBOURS
) -> torch.Tensor:
    """Return the votes for each class.

    Args:
        train: Features with labels.
        queries: Features to classify, float32 [n, c].
        num_classes: Number of classes.
        neighbours: Number of training samples that vote; all, if there are fewer.

    Returns:
        float32 [n, classes]. A neighbour of cosine similarity s adds exp((s - 1) / 0.07).
    """
    known = F.normalize(train.vectors, dim=1).T
    count = min(neighbours, len(train))
    scores = []
    for part in F.normalize(queries, dim=1).split(max(1, CHUNK // len(train))):
        similarity, nearest = (part @ known).topk(count)
        votes = ((similarity - 1) / TEMPERATURE).exp()
        scores.append(
            votes.new_zeros(len(part), num_classes).scatter_add_(1, train.labels[nearest], votes)
        )
    return torch.cat(scores)
