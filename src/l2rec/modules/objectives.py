"""Training objectives of L2Rec (SIGIR '26), Eq. 8-9: pure functions of tensors, in float32.

    Eq. 8   L_Rec, in-batch negatives             `contrastive_loss`, of `cosine` / tau
            all other items as negatives          `catalog_loss`, `fused_catalog_loss`
    Eq. 9   L_BPC                                 `bpc_loss`

The load-balancing loss L_LB is `experts.load_balance`. `fused_catalog_loss` is `catalog_loss` of
scores users x items that are never all in memory. Legend: B users, P positions, n encoded items,
N items of the catalog, D size of vectors.
"""

from __future__ import annotations

__all__ = [
    "Cells",
    "bpc_loss",
    "catalog_loss",
    "contrastive_loss",
    "cosine",
    "fused_catalog_loss",
]

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from l2rec.modules.processes import everyone

FUSED_SCORES, FUSED_ROWS = 1 << 22, 256
"""Sizes of a block of `fused_catalog_loss`: about so many scores, a few MB that stay in the
processor's cache, but at least so many rows, because fewer make slow matrix products.
"""


def cosine(users: Tensor, items: Tensor) -> Tensor:
    """Compute the cosines of users [B, D] and items [n, D], sim of Eq. 8: [B, n] float32."""
    return F.normalize(users.float(), dim=-1) @ F.normalize(items.float(), dim=-1).T


def contrastive_loss(scores: Tensor, positive: Tensor, allowed: Tensor) -> Tensor:
    """Compute L_Rec of Eq. 8, mean over users: a scalar.

    Args:
        scores: [B, n] float, r_{u,i} = sim / tau of every user with every encoded item.
        positive: [B] int64, column of each user's next item i^+.
        allowed: [B, n] bool, the negatives N of each user; the positive may be False.
    """
    allowed = allowed.scatter(1, positive[:, None], True)
    return F.cross_entropy(scores.masked_fill(~allowed, float("-inf")), positive)


def catalog_loss(scores: Tensor, positive: Tensor) -> Tensor:
    """Compute Eq. 8 with every other item of the catalog as a negative: full-softmax cross-entropy.

    scores: [B, N] float. positive: [B] int64. Returns the mean over users, a scalar.
    """
    return F.cross_entropy(scores, positive)


class Cells(NamedTuple):
    """Chosen cells of a matrix of scores. rows, columns: [cells] int64, rows ascending."""

    rows: Tensor
    columns: Tensor


def fused_catalog_loss(
    users: Tensor,
    items: Tensor,
    positive: Tensor,
    *,
    without: Cells | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute `catalog_loss` of users @ items.T, some rows at a time.

    No [P, N] is stored for the backward pass: the forward pass computes the gradients.

    Args:
        users: [P, D] float32, divided by tau. items: [N, D] float32.
        positive: [P] int64, next item of each position.
        without: scores that are left out, none of them a positive's; or None.
        dtype: of the matrix products; softmax and sums are float32.
    """
    if without is None:
        without = Cells(positive[:0], positive[:0])
    apply: Any = _FusedCatalogLoss.apply
    loss: Tensor = apply(users, items, positive, *without, dtype)
    return loss


class _FusedCatalogLoss(torch.autograd.Function):
    """Loss whose gradients are computed in the forward pass, while the scores are in memory."""

    @staticmethod
    def forward(
        ctx: Any,
        users: Tensor,
        items: Tensor,
        positive: Tensor,
        rows: Tensor,
        columns: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        count = len(users)
        size = max(FUSED_ROWS, FUSED_SCORES // len(items))
        starts = list(range(0, count, size))
        low_users, low_items = users.to(dtype), items.to(dtype)
        to_users, to_items = torch.empty_like(users), torch.zeros_like(items)
        total = users.new_zeros(())
        edges = torch.tensor([*starts, count], device=rows.device)
        cells = torch.searchsorted(rows.contiguous(), edges).tolist()
        for number, start in enumerate(starts):
            part = low_users[start : start + size]
            scores = (part @ low_items.T).to(users.dtype)
            some = slice(cells[number], cells[number + 1])
            scores[rows[some] - start, columns[some]] = float("-inf")
            wanted = positive[start : start + size, None]
            # Softmax in place, one exponential per score; less 1 at the positive: the gradient.
            scores.sub_(scores.amax(dim=1, keepdim=True))
            total -= scores.gather(1, wanted).sum()
            norm = scores.exp_().sum(dim=1, keepdim=True)
            total += norm.log().sum()
            grad = scores.div_(norm)
            grad.scatter_add_(1, wanted, grad.new_full(wanted.shape, -1.0))
            low = grad.to(dtype)
            to_users[start : start + size] = low @ low_items
            to_items += low.T @ part
        ctx.save_for_backward(to_users, to_items)
        ctx.count = count
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        scale = grad / ctx.count
        to_users, to_items = ctx.saved_tensors
        return scale * to_users, scale * to_items, None, None, None, None


def bpc_loss(
    behavioral: Tensor, semantic: Tensor, users: Tensor, temperature: Tensor | float, weight: float
) -> Tensor:
    """Compute the bidirectional preference contrast L_BPC of Eq. 9, mean over rows: a scalar.

    Args:
        behavioral, semantic: [B, D] h~^B and h~^S; row b of both is the same user.
        users: [B] int64, user of each row; rows of one user (other positions of its history) are
            not negatives of each other.
        temperature: tau of r = sim / tau.
        weight: lambda of the squared distance.

    Where a batch is dealt out over processes, negatives are the rows of all of them.
    """
    others, first = everyone(users)
    own = first + torch.arange(len(users), device=users.device)  # columns of the positives
    same = users[:, None] == others
    same.scatter_(1, own[:, None], False)

    def contrast(rows: Tensor, columns: Tensor) -> Tensor:
        scores = cosine(rows, everyone(columns)[0]) / temperature
        return F.cross_entropy(scores.masked_fill(same, float("-inf")), own)

    distance = (behavioral.float() - semantic.float()).square().sum(-1).mean()
    both = contrast(behavioral, semantic) + contrast(semantic, behavioral)
    return both + weight * distance
