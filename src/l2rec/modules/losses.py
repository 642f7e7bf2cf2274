"""Losses of the baselines beside the full softmax, which is `objectives.fused_catalog_loss`.

Legend: P positions, k sampled negatives of each, B rows.
"""

from __future__ import annotations

__all__ = ["binary_loss", "in_batch_loss", "negative_scores", "sampled_softmax_loss"]

import torch
from torch import Tensor
from torch.nn import functional as F

from l2rec.modules.objectives import cosine
from l2rec.modules.processes import everyone


def binary_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """Compute -log sigmoid(s+) - sum_j log(1 - sigmoid(s-_j)), mean over positions: a scalar.

    positive: [P] scores. negative: [P, k] scores, -inf where a negative does not count.
    """
    return (F.softplus(-positive) + F.softplus(negative).sum(-1)).mean()


def negative_scores(users: Tensor, table: Tensor, drawn: Tensor) -> Tensor:
    """Score the sampled items of each position: [P, k].

    users: [P, h] states. table: [N, h] item vectors. drawn: [P, k] item ints, or [k] for all
    positions together, which is one product of matrices.
    """
    vectors = F.embedding(drawn, table)
    return users @ vectors.T if drawn.ndim == 1 else torch.einsum("ph,pkh->pk", users, vectors)


def sampled_softmax_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """Compute the cross-entropy of the positive among itself and its sampled negatives.

    positive: [P] scores. negative: [P, k] scores, -inf where a negative does not count. Returns
    the mean over positions, a scalar.
    """
    return (torch.logsumexp(torch.cat((positive[:, None], negative), 1), 1) - positive).mean()


def in_batch_loss(
    rows: Tensor, columns: Tensor, who: Tensor | None = None, *, temperature: float
) -> Tensor:
    """Compute InfoNCE of row i with column i by their cosines, mean over rows: a scalar.

    Where a batch is dealt out over processes, the columns of all of them are negatives.

    rows, columns: [B, h]. who: [B] int64, the item or user of each: of two alike, one is no
    negative of the other. temperature: divides the cosines.
    """
    columns, first = everyone(columns)
    scores = cosine(rows, columns) / temperature
    own = first + torch.arange(len(scores), device=scores.device)
    if who is not None:
        same = who[:, None] == everyone(who)[0]
        scores = scores.masked_fill(same.scatter(1, own[:, None], False), float("-inf"))
    return F.cross_entropy(scores, own)
