"""A residual quantiser: vectors to a few codes each, coarse to fine (RQ-VAE).

Lee et al. Autoregressive Image Generation using Residual Quantization. CVPR '22,
https://arxiv.org/abs/2203.01941; for item ids as in TIGER (Rajput et al. NeurIPS '23) and LETTER
(Wang et al. CIKM '24).

    z = Enc(x),  r_0 = z
    c_l = argmin_k |r_{l-1} - E_{l,k}|^2,  r_l = r_{l-1} - E_{l,c_l}
    z^ = sum_l E_{l,c_l},  x^ = Dec(z^), gradients of x^ go to z past the argmin
    L = |x - x^|^2 + mean_l (|sg(r_{l-1}) - E_{l,c_l}|^2 + commitment |r_{l-1} - sg(E_{l,c_l})|^2)

Squared errors are means over vectors and dimensions. Legend: n vectors, d their size, L levels, K
codes of a level, w size of a code.
"""

from __future__ import annotations

__all__ = ["Quantized", "ResidualQuantizer", "balanced", "centres", "usage"]

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from torch.nn import functional as F

from l2rec.protocols import CodeUsage

KMEANS_ROUNDS = 30
SINKHORN_ROUNDS = 50


@dataclass(frozen=True)
class Quantized:
    """codes: [n, L] int64. vectors: [n, L, w], E_{l,c_l}. residuals: [n, L, w], r_{l-1}."""

    codes: Tensor
    vectors: Tensor
    residuals: Tensor


class ResidualQuantizer(nn.Module):
    """Encoder, codebooks and decoder.

    Args:
        dim: d. hidden: widths between d and w, of the encoder; the decoder's are reversed. width:
            w. levels: L. codes: K. commitment: weight of the encoder's part of the loss.
        sinkhorn: epsilon of a balanced assignment at the last level in training (`balanced`); 0 is
            the nearest code.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: Sequence[int],
        width: int,
        levels: int,
        codes: int,
        commitment: float = 0.25,
        sinkhorn: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = [dim, *hidden, width]
        self.encoder, self.decoder = _layers(sizes), _layers(sizes[::-1])
        self.codebooks = nn.Parameter(torch.randn(levels, codes, width) / width**0.5)
        self.commitment, self.sinkhorn = commitment, sinkhorn

    @property
    def levels(self) -> int:
        """L."""
        return len(self.codebooks)

    @torch.no_grad()
    def fill(self, x: Tensor, seed: int) -> None:
        """Set the codebooks to the centres of k-means over ``x`` [n, d], level by level, each over
        what the levels before it leave. With fewer vectors than codes some are drawn around them.
        """
        residual = self.encoder(x)
        for level, book in enumerate(self.codebooks):
            book.copy_(centres(residual, len(book), seed=[seed, level]))
            residual = residual - book[_nearest(residual, book)]

    @torch.no_grad()
    def revive(self, x: Tensor) -> int:
        """Put codes that no vector of ``x`` [n, d] has where a random one stands; return how many.

        A code that nothing is nearest to gets no gradient, and would never come back.
        """
        found = self.quantize(self.encoder(x))
        moved = 0
        for level, book in enumerate(self.codebooks):
            dead = torch.bincount(found.codes[:, level], minlength=len(book)) == 0
            count = int(dead.sum())
            drawn = torch.randint(len(x), (count,), device=x.device)
            book[dead] = found.residuals[drawn, level]
            moved += count
        return moved

    def quantize(self, z: Tensor) -> Quantized:
        """Quantise encoded vectors z [n, w]."""
        residual, codes, vectors, residuals = z, [], [], []
        for level, book in enumerate(self.codebooks):
            if self.training and self.sinkhorn and level == self.levels - 1:
                distances = torch.cdist(residual.detach(), book.detach()).square()
                code = balanced(distances, self.sinkhorn)
            else:
                code = _nearest(residual, book)
            codes.append(code)
            vectors.append(F.embedding(code, book))
            residuals.append(residual)
            residual = residual - vectors[-1].detach()
        return Quantized(torch.stack(codes, 1), torch.stack(vectors, 1), torch.stack(residuals, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Quantized, dict[str, Tensor]]:
        """Return z^ with gradients to the encoder [n, w], what was found, and the parts of the
        loss by name, of vectors x [n, d].
        """
        z = self.encoder(x)
        found = self.quantize(z)
        whole = found.vectors.sum(1)
        straight = z + (whole - z).detach()
        parts = {
            "reconstruction": F.mse_loss(self.decoder(straight), x),
            "codebook": F.mse_loss(found.vectors, found.residuals.detach()),
            "commitment": self.commitment * F.mse_loss(found.residuals, found.vectors.detach()),
        }
        return straight, found, parts

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes [n, L] int64 of vectors x [n, d], each the nearest."""
        return self._found(x).codes

    def residuals(self, x: Tensor) -> Tensor:
        """Return r_{l-1} [n, L, w] of vectors x [n, d]."""
        return self._found(x).residuals

    @torch.no_grad()
    def _found(self, x: Tensor) -> Quantized:
        mode = self.training
        try:
            return self.eval().quantize(self.encoder(x))
        finally:
            self.train(mode)


def _layers(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _nearest(x: Tensor, book: Tensor) -> Tensor:
    """Return the row of ``book`` [K, w] that is nearest to each of x [n, w], the first of equal."""
    with torch.no_grad():
        # |x - e|^2 without |x|^2, which is the same for all codes.
        return (book.square().sum(-1) - 2 * x @ book.T).argmin(-1)


def centres(x: Tensor, count: int, *, seed: int | Sequence[int]) -> Tensor:
    """Return ``count`` centres of k-means over x [n, w]. With fewer vectors than centres, the
    vectors and some drawn around them.
    """
    rng = np.random.default_rng(seed)
    points = x.double().cpu().numpy()
    if len(points) <= count:
        spread = points.std(0) + 1e-3
        extra = points[rng.integers(len(points), size=count - len(points))]
        points = np.concatenate((points, extra + rng.normal(size=extra.shape) * spread))
        return torch.from_numpy(points).to(x)
    start = points[rng.choice(len(points), count, replace=False)]
    with warnings.catch_warnings():  # a centre that loses all points stays where it is
        warnings.filterwarnings("ignore", message="One of the clusters is empty")
        found, _ = kmeans2(points, start, iter=KMEANS_ROUNDS, minit="matrix", missing="warn")
    return torch.from_numpy(found).to(x)


def balanced(distances: Tensor, epsilon: float) -> Tensor:
    """Assign n vectors to K codes so that codes are used alike: [n, K] distances -> [n] int64.

    Sinkhorn-Knopp on exp(-distance / epsilon), distances scaled to [-1, 1], as in LC-Rec and
    LETTER. In float64: small epsilons underflow.
    """
    low, high = distances.min(), distances.max()
    middle, reach = (high + low) / 2, ((high - low) / 2).clamp_min(1e-12)
    logits = -((distances - middle) / reach).double() / epsilon
    for _ in range(SINKHORN_ROUNDS):
        logits = logits - logits.logsumexp(0, keepdim=True)
        logits = logits - logits.logsumexp(1, keepdim=True)
    return logits.argmax(-1)


def usage(codes: Tensor, count: int) -> CodeUsage:
    """Describe codes [N, L] of ``count`` a level."""
    used, perplexity, collisions = [], [], []
    for number, level in enumerate(codes.T, 1):
        share = torch.bincount(level, minlength=count).double() / len(level)
        used.append(float((share > 0).double().mean()))
        perplexity.append(float(torch.special.entr(share).sum().exp()))
        begun = codes[:, :number]
        _, which, sizes = begun.unique(dim=0, return_inverse=True, return_counts=True)
        collisions.append(float((sizes[which] > 1).double().mean()))
    return CodeUsage(used, perplexity, collisions)
