"""Which items are bought near each other: counts of pairs in training sequences.

    C[i, j]   = sum over pairs (i at p, j at p + d), 0 < |d| <= window, of decay^(|d| - 1),
                divided by n_i^(1/2) n_j^rarity, with n how often each occurs: what is rare says
                more, of j too where something else knows already what is popular
    m[u, j]   = sum over the ``newest`` items i of u's history, k = 0 the newest, of fade^k C[i, j]

Before and after count alike: in logs of purchases the order within a day says little.

Where texts are given, C + TEXT_SHARE K takes the place of C: K[i, j] is a softmax over the items
that read most like i (`text_neighbors`). Its rows sum to 1 and those of C grow with what was seen
of i, so that texts speak for what is rare or new, and counts for the rest.

In small data these counts say what no embedding of the same data has learned to say. Used alone
they are a floor (`l2rec.methods.floors`); beside a method's scores they are a term that knows what
the method does not. A method is trained without them, or it would leave to the counts what it could
learn; what they are worth beside it is chosen on validation.

Rows of sparse matrices throughout; nothing of size N x N or P x N is made dense here.
"""

from __future__ import annotations

__all__ = ["NEAR", "CoOccurrence", "Weights", "choose", "text_neighbors"]

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from l2rec.data.ragged import IntArray, Ragged
from l2rec.metrics import expected_ranks, rank_values

Sparse = Any
"""scipy.sparse.csr_array; scipy is slow to import and only needed here."""
Floats = npt.NDArray[np.float64]
NEAR = (0.0, *(2.0 ** (k / 2) for k in range(-2, 17)))
"""w to choose from, up to 256: m is smaller where items occur more often."""
CHOSEN_ON = 10_000
"""Users that `choose` looks at, at most: weights far apart differ by a percent, which two thousand
users do not tell from chance."""
BLOCK_SCORES = 1 << (24 if torch.cuda.is_available() else 20)
"""Scores that `choose` makes at once."""
TEXT_SHARE = 0.2
TEXT_NEIGHBORS = 20
TEXT_TEMPERATURE = 0.05


class CoOccurrence(nn.Module):
    """Counts C of pairs, kept as the three arrays of a sparse matrix so that a run saves them.

    n_items: N. Empty until `count`. The buffers' lengths follow the data: see `sized_by_data`.
    """

    sized_by_data = frozenset({"items", "weights"})

    def __init__(
        self,
        n_items: int,
        *,
        window: int = 10,
        decay: float = 0.8,
        newest: int = 10,
        fade: float = 0.8,
        rarity: float = 0.25,
    ) -> None:
        super().__init__()
        self.n_items, self.newest, self.fade = n_items, newest, fade
        self.window, self.decay, self.rarity = window, decay, rarity
        self.register_buffer("offsets", torch.zeros(n_items + 1, dtype=torch.int64))
        self.register_buffer("items", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("weights", torch.zeros(0))
        self.offsets: Tensor
        self.items: Tensor
        self.weights: Tensor
        self._counts: Sparse | None = None  # the same, ready for use

    def _load_from_state_dict(self, *args: Any) -> None:
        self._counts = None
        super()._load_from_state_dict(*args)

    def count(self, sequences: Ragged, texts: Sparse | None = None) -> None:
        """Take the counts of ``sequences``: one row for each user, oldest first, items below N.

        texts: K [N, N] of `text_neighbors`, to add TEXT_SHARE K.
        """
        counts = self._pairs(sequences)
        if texts is not None:
            counts = counts + TEXT_SHARE * texts
        self._counts = None
        device = self.offsets.device
        self.offsets = torch.from_numpy(counts.indptr.astype(np.int64)).to(device)
        self.items = torch.from_numpy(counts.indices.astype(np.int32)).to(device)
        self.weights = torch.from_numpy(counts.data.astype(np.float32)).to(device)

    def _pairs(self, rows: Ragged) -> Sparse:
        """C of every pair within the window, both directions."""
        values, lengths = np.asarray(rows.values, dtype=np.int64), rows.lengths
        often = np.maximum(np.bincount(values, minlength=self.n_items), 1).astype(np.float64)
        near, far = often**-0.5, often**-self.rarity
        place = np.arange(len(values)) - np.repeat(rows.offsets[:-1], lengths)
        parts = []
        for distance in range(1, self.window + 1):
            later = np.flatnonzero(place >= distance)
            a, b = values[later - distance], values[later]
            weight = self.decay ** (distance - 1)
            parts += [(a, b, weight * near[a] * far[b]), (b, a, weight * near[b] * far[a])]
        first, second, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
        return _csr(weights, first, second, (self.n_items, self.n_items))

    def counts(self) -> Sparse:
        """C [N, N] float64."""
        from scipy import sparse

        if self._counts is None:
            arrays = (self.weights.double(), self.items, self.offsets)
            self._counts = sparse.csr_array(
                tuple(array.cpu().numpy() for array in arrays), shape=(self.n_items, self.n_items)
            )
        return self._counts

    def recall(self, histories: Ragged) -> Sparse:
        """m [B, N] float64. Items that came after training have no counts."""
        values = np.asarray(histories.values, dtype=np.int64)
        parts = []
        for k in range(self.newest):
            some = np.flatnonzero(histories.lengths > k)
            items = values[histories.offsets[some + 1] - 1 - k]
            known = items < self.n_items
            parts.append((some[known], items[known], np.full(int(known.sum()), self.fade**k)))
        rows, items, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
        return _csr(weights, rows, items, (len(histories), self.n_items)) @ self.counts()

    def dense(self, histories: Ragged, n_items: int) -> tuple[Tensor, Tensor]:
        """m float32 and what is in the history, bool: [B, n_items] each; n_items N or more."""
        device = self.offsets.device
        met = torch.zeros(len(histories), n_items, device=device)
        met[:, : self.n_items] = torch.from_numpy(self.recall(histories).toarray()).to(met)
        seen = torch.zeros(met.shape, dtype=torch.bool, device=device)
        rows = np.repeat(np.arange(len(histories)), histories.lengths)
        items = histories.values.astype(np.int64)
        seen[torch.from_numpy(rows).to(device), torch.from_numpy(items).to(device)] = True
        return met, seen


@dataclass(frozen=True)
class Weights:
    """near: w of what was met near the history. repeat: rho of what is in it."""

    near: float
    repeat: float = 0.0

    def added(self, met: Tensor, seen: Tensor) -> Tensor:
        """w m outside of the history and rho within it, for m and bool [B, N]."""
        return (self.near * met).masked_fill_(seen, self.repeat)


@torch.no_grad()
def text_neighbors(vectors: Tensor) -> Sparse:
    """K [N, N] float64: for each item the TEXT_NEIGHBORS others whose texts read most like its own,
    weighed by a softmax of cosine / TEXT_TEMPERATURE.

    vectors: [N, D] of the texts, centred and of unit length. Takes N^2 D operations.
    """
    n = len(vectors)
    k = min(TEXT_NEIGHBORS, n - 1)
    columns, weights = [], []
    size = max(1, 16 * BLOCK_SCORES // n)
    for start in range(0, n, size):
        cosines = vectors[start : start + size] @ vectors.T
        own = torch.arange(len(cosines), device=vectors.device)
        cosines[own, own + start] = -math.inf
        nearest = cosines.topk(k, dim=1)
        columns.append(nearest.indices.cpu().numpy())
        weights.append(torch.softmax(nearest.values.double() / TEXT_TEMPERATURE, 1).cpu().numpy())
    rows = np.repeat(np.arange(n), k)
    return _csr(np.concatenate(weights).ravel(), rows, np.concatenate(columns).ravel(), (n, n))


def choose(
    parts: Callable[[Ragged], tuple[Tensor, Tensor, Tensor]],
    n_items: int,
    histories: Ragged,
    targets: IntArray,
    tried: Sequence[Weights],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Weights:
    """The weights with the best mean NDCG@10; of equals the first.

    parts: histories -> scores without the counts, m, what is in the history, [B, N] each.
    progress: is told (done, of). Of more than CHOSEN_ON histories so many, drawn evenly.
    """
    some = np.unique(np.linspace(0, len(histories) - 1, CHOSEN_ON).astype(np.int64))
    totals = np.zeros(len(tried))
    size = max(1, BLOCK_SCORES // n_items)
    for start in range(0, len(some), size):
        rows = some[start : start + size]
        own, met, seen = parts(histories.take(rows))
        wanted = torch.from_numpy(targets[rows].astype(np.int64))
        for number, weights in enumerate(tried):
            ranks = expected_ranks(own + weights.added(met, seen), wanted).numpy()
            totals[number] += rank_values(ranks, "ndcg@10").sum()
        progress(start + len(rows), len(some))
    return tried[int(totals.argmax())]


def _csr(values: Floats, rows: IntArray, columns: IntArray, shape: tuple[int, int]) -> Sparse:
    from scipy import sparse

    made = sparse.coo_array((values, (rows, columns)), shape=shape).tocsr()
    made.sum_duplicates()
    return made
