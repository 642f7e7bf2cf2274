"""Training objectives of L2Rec (SIGIR '26), Eq. 8-9: pure functions of tensors, in float32."""

from __future__ import annotations

__all__ = ["bpc_loss", "catalog_loss", "contrastive_loss", "cosine"]

import torch
from torch import Tensor
from torch.nn import functional as F


def cosine(users: Tensor, items: Tensor) -> Tensor:
    """sim of Eq. 8: [B, D], [n, D] -> cosine similarities [B, n] float32."""
    return F.normalize(users.float(), dim=-1) @ F.normalize(items.float(), dim=-1).T


def contrastive_loss(scores: Tensor, positive: Tensor, allowed: Tensor) -> Tensor:
    """L_Rec of Eq. 8, mean over users.

    Args:
        scores: [B, n] r_{u,i} = sim / tau of every user with every encoded item.
        positive: [B] int64 column of each user's next item.
        allowed: [B, n] bool, the negatives of each user; the positive column is added here.
    """
    allowed = allowed.scatter(1, positive[:, None], True)
    return F.cross_entropy(scores.masked_fill(~allowed, float("-inf")), positive)


def catalog_loss(scores: Tensor, positive: Tensor) -> Tensor:
    """Full-softmax cross-entropy over the whole catalog: Eq. 8 with every other item a negative.

    scores: [B, N]; positive: [B] int64.
    """
    return F.cross_entropy(scores, positive)


def bpc_loss(
    behavioral: Tensor, semantic: Tensor, users: Tensor, temperature: Tensor | float, weight: float
) -> Tensor:
    """Bidirectional preference contrast L_BPC of Eq. 9, mean over rows.

    Args:
        behavioral, semantic: [B, D] h~^B and h~^S, row by row the same user.
        users: [B] int64; rows of one user (its other positions) are not negatives of each other.
        temperature: tau of r = sim / tau.
        weight: lambda of the squared distance.
    """
    scores = cosine(behavioral, semantic) / temperature  # [B, B], row B -> column S
    same = users[:, None] == users[None, :]
    same.fill_diagonal_(False)
    scores = scores.masked_fill(same, float("-inf"))
    rows = torch.arange(len(users), device=users.device)
    distance = (behavioral.float() - semantic.float()).square().sum(-1).mean()
    return F.cross_entropy(scores, rows) + F.cross_entropy(scores.T, rows) + weight * distance
