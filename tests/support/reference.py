"""Literal reference of Eq. 1-9 of L2Rec: loops over users, tokens and experts; nothing from l2rec.

Slow on purpose. Tensors are float64, and every function of them can be differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# ------------------------------------------------------------------------------- Eq. 1


def semantic_row(
    items: Sequence[int],
    texts: Sequence[Sequence[int]],
    *,
    item_tokens: int,
    max_tokens: int,
    max_items: int,
    before: Sequence[int],
    after: Sequence[int],
) -> list[list[int]]:
    """Return the tokens of each item that fits, oldest first, ``before`` in the first: Eq. 1."""
    blocks: list[list[int]] = []
    room = max_tokens - len(before)
    for item in reversed(items):
        block = [*texts[item][:item_tokens], *after]
        if blocks and (len(block) > room or len(blocks) == max_items):
            break
        room -= len(block)
        blocks.insert(0, block)
    blocks[0] = [*before, *blocks[0]]
    return blocks


# ------------------------------------------------------------------------------- Eq. 3-6


@dataclass
class Router:
    """Weights of one of the three networks of Eq. 4."""

    r1: Tensor  # [W, size of z]
    b1: Tensor  # [W]
    r2: Tensor  # [E, W]
    b2: Tensor  # [E]


@dataclass
class Matrix:
    """Parameters of one view at one adapted matrix.

    shared, experts: (B_i [d_out, r], A_i [r, d_in]) of each. user, interaction: None where the
    router does not know the user.
    """

    shared: list[tuple[Tensor, Tensor]]
    experts: list[tuple[Tensor, Tensor]]
    context: Router
    user: Router | None
    interaction: Router | None


def softmax(logits: Sequence[Tensor]) -> list[Tensor]:
    powers = [torch.exp(x) for x in logits]
    total = sum(powers, torch.zeros(()))
    return [p / total for p in powers]


def route(router: Router, z: Tensor) -> list[Tensor]:
    """Compute g^(m) of Eq. 4, the score of each expert."""
    hidden = [
        torch.clamp(torch.dot(row, z) + bias, min=0)
        for row, bias in zip(router.r1, router.b1, strict=True)
    ]
    logits = []
    for row, bias in zip(router.r2, router.b2, strict=True):
        total = bias
        for weight, unit in zip(row, hidden, strict=True):
            total = total + weight * unit
        logits.append(total)
    return softmax(logits)


def fused_gates(matrix: Matrix, u: Tensor, x: Tensor) -> list[Tensor]:
    """Compute g_hat, first line of Eq. 5; without a user router, g^c alone."""
    g_c = route(matrix.context, x)
    if matrix.user is None or matrix.interaction is None:
        return g_c
    g_u = route(matrix.user, u)
    g_f = route(matrix.interaction, torch.cat((u, x)))
    return [c + (a + b) * c for c, a, b in zip(g_c, g_u, g_f, strict=True)]


def chosen(scores: Sequence[Tensor], n: int) -> list[bool]:
    """Mark the N largest scores: the indicator in the second line of Eq. 5."""
    order = sorted(range(len(scores)), key=lambda i: -float(scores[i].detach()))
    return [i in order[:n] for i in range(len(scores))]


def update(
    matrix: Matrix, u: Tensor, x: Tensor, top: int, scaling: float, norm: bool = False
) -> Tensor:
    """Compute dW_j x of Eq. 3 for one token, times ``scaling``.

    norm: gates of the chosen experts are divided by their sum.
    """
    total = torch.zeros(matrix.experts[0][0].shape[0], dtype=x.dtype)
    for b, a in matrix.shared:
        total = total + b @ (a @ x)
    scores = fused_gates(matrix, u, x)
    active = chosen(scores, top)
    if norm:
        total_gate = sum(
            score for score, is_active in zip(scores, active, strict=True) if is_active
        )
        scores = [score / total_gate for score in scores]
    for (b, a), score, is_active in zip(matrix.experts, scores, active, strict=True):
        if is_active:
            total = total + score * (b @ (a @ x))
    return scaling * total


def load_balance(scores: Sequence[Sequence[Tensor]], active: Sequence[Sequence[bool]]) -> Tensor:
    """Compute E * sum_i f_i P_i over the tokens of one view at one matrix."""
    experts = len(scores[0])
    total = torch.zeros((), dtype=scores[0][0].dtype)
    choices = sum(sum(row) for row in active)
    for i in range(experts):
        share = sum(row[i] for row in active) / choices
        probability = sum((row[i] / sum(row) for row in scores), torch.zeros(())) / len(scores)
        total = total + share * probability
    return experts * total


# ------------------------------------------------------------------------------- readouts


def mean(vectors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(vectors[0])
    for vector in vectors:
        total = total + vector
    return total / len(vectors)


def prefix_means(blocks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Average all tokens up to the end of every block of one row."""
    return [mean([x for block in blocks[: k + 1] for x in block]) for k in range(len(blocks))]


# ------------------------------------------------------------------------------- attention


def attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[int], attend: str, scale: float
) -> Tensor:
    """Attend in one row and one head: q, k, v [T, d], query by query, key by key."""
    out = []
    for t in range(len(q)):
        seen = [
            s
            for s in range(len(k))
            if attend == "full"
            or (attend == "causal" and s <= t)
            or (attend == "block_causal" and blocks[s] <= blocks[t])
        ]
        weights = softmax([torch.dot(q[t], k[s]) * scale for s in seen])
        out.append(sum((w * v[s] for w, s in zip(weights, seen, strict=True)), torch.zeros(())))
    return torch.stack(out)


# ------------------------------------------------------------------------------- Eq. 7


def fuse(
    behavioral: Tensor,
    semantic: Tensor,
    p_b: tuple[Tensor, Tensor],
    p_s: tuple[Tensor, Tensor],
    gate: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute h~^B, h~^S, h^F and delta of one user, Eq. 7. Each map is (W, b)."""
    b = behavioral + p_b[0] @ behavioral + p_b[1]
    s = semantic + p_s[0] @ semantic + p_s[1]
    delta = 1 / (1 + torch.exp(-(gate[0] @ torch.cat((b, s)) + gate[1])))
    return b, s, delta * b + (1 - delta) * s, delta


# ------------------------------------------------------------------------------- Eq. 8-9


def similarity(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a, b) / (torch.sqrt(torch.dot(a, a)) * torch.sqrt(torch.dot(b, b)))


def recommendation_loss(
    scores: Tensor, positive: Sequence[int], negatives: Sequence[Sequence[int]]
) -> Tensor:
    """Compute Eq. 8, mean over users; ``negatives``: the set N of each, without the positive."""
    total = torch.zeros((), dtype=scores.dtype)
    for u, (column, others) in enumerate(zip(positive, negatives, strict=True)):
        assert column not in others
        above = torch.exp(scores[u, column])
        below = above
        for i in others:
            below = below + torch.exp(scores[u, i])
        total = total - torch.log(above / below)
    return total / len(positive)


def preference_contrast(
    behavioral: Tensor, semantic: Tensor, users: Sequence[int], tau: float, weight: float
) -> Tensor:
    """Compute Eq. 9, mean over rows; other rows of the same user are no negatives."""
    n = len(users)
    total = torch.zeros((), dtype=behavioral.dtype)
    for u in range(n):
        others = [w for w in range(n) if w == u or users[w] != users[u]]
        same = torch.exp(similarity(behavioral[u], semantic[u]) / tau)
        to_semantic = sum(
            (torch.exp(similarity(behavioral[u], semantic[w]) / tau) for w in others),
            torch.zeros(()),
        )
        to_behavioral = sum(
            (torch.exp(similarity(semantic[u], behavioral[w]) / tau) for w in others),
            torch.zeros(()),
        )
        distance = sum(
            ((x - y) ** 2 for x, y in zip(behavioral[u], semantic[u], strict=True)),
            torch.zeros(()),
        )
        total = total - torch.log(same / to_semantic) - torch.log(same / to_behavioral)
        total = total + weight * distance
    return total / n
