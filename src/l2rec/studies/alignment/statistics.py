"""How far apart two sets of vectors of the same users are, and how each lies on the sphere.

    `linear_cka`      Kornblith et al., ICML '19            1: equal up to a rotation and a scale
    `mean_cosine`     of each user's two vectors            1: equal
    `mmd`             Gretton et al., JMLR '12, unbiased    0: one distribution
    `alignment`       Wang & Isola, ICML '20, alpha = 2     0: each user's two vectors are equal
    `uniformity`      Wang & Isola, t = 2                   -4: spread over the sphere, 0: one point
    `effective_rank`  Roy & Vetterli, EUSIPCO '07           dimensions that are in use

Users and items are compared by cosine, so all are of vectors at unit length, [M, D]. Computed in
float64. tests/unit/test_alignment.py has each as plain loops.
"""

from __future__ import annotations

__all__ = [
    "alignment",
    "effective_rank",
    "linear_cka",
    "mean_cosine",
    "mmd",
    "on_sphere",
    "statistics",
    "uniformity",
]

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from l2rec.evaluation.significance import ROUNDING

TINY = 1e-150
"""Least scale of the kernel, whose square is above 0: where most vectors are equal."""


def on_sphere(x: Tensor) -> Tensor:
    """Return rows [M, D] at unit length, in float64 on the processor."""
    return F.normalize(x.detach().double().cpu(), dim=-1)


def _centred(x: Tensor) -> Tensor:
    """Subtract the mean of each column; all are 0 where rows differ by rounding alone."""
    off = x - x.mean(0)
    return off * (off.abs().max() > ROUNDING * x.abs().max())


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Compute ||Y'X||² / (||X'X|| ||Y'Y||) of centred columns; nan where all rows are equal."""
    x, y = _centred(x), _centred(y)
    across = (y.T @ x).square().sum()
    within = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return float(across / within)


def mean_cosine(x: Tensor, y: Tensor) -> float:
    """Average the cosine of each row of x with that of y."""
    return float((x * y).sum(-1).mean())


def alignment(x: Tensor, y: Tensor) -> float:
    """Average ||x_i - y_i||²: of unit vectors, 2 - 2 `mean_cosine`."""
    return float((x - y).square().sum(-1).mean())


def mmd(x: Tensor, y: Tensor) -> float:
    """Estimate the squared maximum mean discrepancy without bias: it may be just below 0.

    The kernel is exp(-d² / 2 s²); s is the median distance of two vectors of both sets together.
    """
    both = torch.cat((x, y))
    squares = (2 - 2 * both @ both.T).clamp_min(0)
    pairs = squares[tuple(torch.triu_indices(len(both), len(both), 1))]
    scale = max(float(np.median(pairs.sqrt().numpy())), TINY)
    kernel = torch.exp(-squares / (2 * scale**2))
    m, n = len(x), len(y)
    within = [part.sum() - part.diagonal().sum() for part in (kernel[:m, :m], kernel[m:, m:])]
    means = within[0] / (m * (m - 1)) + within[1] / (n * (n - 1))
    return float(means - 2 * kernel[:m, m:].mean())


def uniformity(x: Tensor) -> float:
    """Compute log of the mean of exp(-2 d²) over pairs of two rows."""
    squares = (2 - 2 * x @ x.T).clamp_min(0)
    pairs = squares[tuple(torch.triu_indices(len(x), len(x), 1))]
    return float(torch.exp(-2 * pairs).mean().log())


def effective_rank(x: Tensor) -> float:
    """Compute exp of the entropy of the singular values of x, centred, taken as shares; nan where
    all rows are equal.
    """
    values = torch.linalg.svdvals(_centred(x))
    return float(torch.special.entr(values / values.sum()).sum().exp())


def statistics(semantic: Tensor, behavioral: Tensor, seed: int = 0) -> dict[str, float]:
    """Compute all of them for both views [M, D] of M users, two or more, of any length.

    ``..._others``: with the views of different users, paired by the seed: what CKA and cosine are
    where nothing but the distributions is shared.
    """
    x, y = on_sphere(semantic), on_sphere(behavioral)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    others, partners = x[order], y[order.roll(1)]
    return {
        "cka": linear_cka(x, y),
        "cka_others": linear_cka(others, partners),
        "cosine": mean_cosine(x, y),
        "cosine_others": mean_cosine(others, partners),
        "mmd": mmd(x, y),
        "alignment": alignment(x, y),
        "uniformity_semantic": uniformity(x),
        "uniformity_behavioral": uniformity(y),
        "rank_semantic": effective_rank(x),
        "rank_behavioral": effective_rank(y),
    }
