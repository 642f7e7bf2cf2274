"""Co-occurrence: which items are near each other in the training sequences, as a term of scores.

    C[i, j]   = sum over pairs (i at p, j at p + d), 0 < |d| <= window, of decay^(|d| - 1),
                divided by n_i^(1/2) n_j^rarity, with n how often each occurs: what is rare says
                more; rarity > 0 where another term of the score knows already what is popular
    m[u, j]   = sum over the ``newest`` items i of u's history, k = 0 the newest, of fade^k C[i, j]

Before and after count alike: in logs of purchases the order within a day says little.

With texts, C + TEXT_SHARE K takes the place of C: K[i, j] is a softmax over the items that read
most like i (`text_neighbors`). Its rows sum to 1 and those of C grow with the events of i, so that
texts speak for what is rare or new, and counts for the rest.

In small data these counts say what no embedding of the same data has learned to say. Used alone
they are a floor (`l2rec.methods.floors`). Beside a method's scores they are a term that knows what
the method does not (`Blend`, for any method): a method is trained without them, or it would leave
to the counts what it could learn; their weight is chosen on validation.

Rows of sparse matrices throughout; nothing of size N x N is made dense here.
"""

from __future__ import annotations

__all__ = [
    "NEAR",
    "Blend",
    "CoOccurrence",
    "Weights",
    "choose",
    "reached",
    "standardised",
    "text_neighbors",
]

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from l2rec.data.ragged import IntArray, Ragged
from l2rec.metrics import rank_values, reject_nan
from l2rec.protocols import Recommender, Scorer

Sparse = Any
"""scipy.sparse.csr_array; scipy is slow to import and only needed here."""
Floats = npt.NDArray[np.float64]
NEAR = (0.0, *(2.0 ** (k / 2) for k in range(-2, 17)))
"""Values of w to choose from, up to 256: m is smaller where items occur more often."""
CHOSEN_ON = 10_000
"""Most users that `choose` looks at. The best weights differ by about one percent in NDCG@10, which
is within the noise of two thousand users."""
BLOCK_SCORES = 1 << 20
"""Scores that `choose` computes at once; on a GPU, which wants few and large blocks, 16 times."""
SAME = 1e-6
"""Deviation up to which the scores that a search reached are one score."""
REPEATS = (-8.0, 0.0, 2.0)
"""Values of rho for `Blend`, whose scores have deviation 1: -8 never recommends a repeat."""
TEXT_SHARE = 0.2
TEXT_NEIGHBORS = 20
TEXT_TEMPERATURE = 0.05
TEXT_ROWS = 256
"""Texts that are compared with all others at once, at least: products of few rows are slow."""


class CoOccurrence(nn.Module):
    """Counts C of pairs: the three arrays of a sparse matrix as buffers, so that a run saves them.

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
        self._counts: Sparse | None = None  # the same as a sparse matrix

    def _load_from_state_dict(self, *args: Any) -> None:
        self._counts = None
        super()._load_from_state_dict(*args)

    def count(self, sequences: Ragged, texts: Sparse | None = None) -> None:
        """Count ``sequences``: one row for each user, oldest first, items below N.

        texts: K [N, N] of `text_neighbors`; TEXT_SHARE K is added.
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
        """Return C of every pair within the window, both directions."""
        values, lengths = np.asarray(rows.values, dtype=np.int64), rows.lengths
        often = np.maximum(np.bincount(values, minlength=self.n_items), 1).astype(np.float64)
        near, far = often**-0.5, often**-self.rarity
        place = np.arange(len(values)) - np.repeat(rows.offsets[:-1], lengths)
        distances = range(1, self.window + 1)
        total = 2 * sum(int(np.count_nonzero(place >= distance)) for distance in distances)
        # Numbers as narrow as scipy has them, which would copy others.
        first, second = np.empty(total, np.int32), np.empty(total, np.int32)
        weights, end = np.empty(total), 0
        for distance in distances:
            later = np.flatnonzero(place >= distance)
            a, b = values[later - distance], values[later]
            weight = self.decay ** (distance - 1)
            for i, j in ((a, b), (b, a)):
                at = slice(end, end + len(later))
                first[at], second[at], weights[at] = i, j, weight * near[i] * far[j]
                end = at.stop
        return _csr(weights, first, second, (self.n_items, self.n_items))

    def counts(self) -> Sparse:
        """Return C [N, N] float64."""
        from scipy import sparse

        if self._counts is None:
            arrays = (self.weights.double(), self.items, self.offsets)
            self._counts = sparse.csr_array(
                tuple(array.cpu().numpy() for array in arrays), shape=(self.n_items, self.n_items)
            )
        return self._counts

    def recall(self, histories: Ragged) -> Sparse:
        """Return m [B, N] float64. Items added after training have no counts."""
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
        """Return m float32 and the items of the history, bool: [B, n_items] each, n_items >= N."""
        met = torch.zeros(len(histories), n_items, device=self.offsets.device)
        met[:, : self.n_items] = torch.from_numpy(self.recall(histories).toarray()).to(met)
        return met, seen_items(histories, n_items, met.device)


def seen_items(histories: Ragged, n_items: int, device: torch.device | str) -> Tensor:
    """Mark the items of each history: [B, n_items] bool."""
    seen = torch.zeros(len(histories), n_items, dtype=torch.bool, device=device)
    rows = np.repeat(np.arange(len(histories)), histories.lengths)
    items = histories.values.astype(np.int64)
    seen[torch.from_numpy(rows).to(device), torch.from_numpy(items).to(device)] = True
    return seen


@dataclass(frozen=True)
class Weights:
    """Weights of the term. near: w of co-occurrence. repeat: rho of items of the history."""

    near: float
    repeat: float = 0.0

    def added(self, met: Tensor, seen: Tensor) -> Tensor:
        """Return w m outside of the history and rho within it, [B, N], for m and bool [B, N]."""
        return (self.near * met).masked_fill_(seen, self.repeat)


@torch.no_grad()
def text_neighbors(vectors: Tensor) -> Sparse:
    """Return K [N, N] float64: for each item the TEXT_NEIGHBORS others whose texts are most alike,
    weighed by a softmax of cosine / TEXT_TEMPERATURE.

    vectors: [N, D] of the texts, centred and of unit length. Takes N^2 D operations.
    """
    n = len(vectors)
    k = min(TEXT_NEIGHBORS, n - 1)
    columns, weights = [], []
    size = max(TEXT_ROWS, 16 * _block_scores() // n)
    for start in range(0, n, size):
        cosines = vectors[start : start + size] @ vectors.T
        own = torch.arange(len(cosines), device=vectors.device)
        cosines[own, own + start] = -math.inf
        nearest = cosines.topk(k, dim=1)
        columns.append(nearest.indices.cpu().numpy())
        weights.append(torch.softmax(nearest.values.double() / TEXT_TEMPERATURE, 1).cpu().numpy())
    rows = np.repeat(np.arange(n), k)
    return _csr(np.concatenate(weights).ravel(), rows, np.concatenate(columns).ravel(), (n, n))


def _block_scores() -> int:
    """Return how many scores are computed at once on this machine."""
    return 16 * BLOCK_SCORES if torch.cuda.is_available() else BLOCK_SCORES


def choose(
    parts: Callable[[Ragged], tuple[Tensor, Tensor, Tensor]],
    n_items: int,
    histories: Ragged,
    targets: IntArray,
    tried: Sequence[Weights],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Weights:
    """Choose the weights with the best mean NDCG@10; of equals the first.

    parts: histories -> scores without the term, m, what is in the history, [B, N] each.
    progress: called with (users done, users in all). Of more than CHOSEN_ON histories so many are
    looked at, evenly spread.
    """
    some = np.unique(np.linspace(0, len(histories) - 1, CHOSEN_ON).astype(np.int64))
    totals = np.zeros(len(tried))
    size = max(1, _block_scores() // n_items)
    for start in range(0, len(some), size):
        rows = some[start : start + size]
        own, met, seen = parts(histories.take(rows))
        wanted = torch.from_numpy(targets[rows].astype(np.int64))
        for number, ranks in enumerate(_ranks(own, met, seen, wanted.to(own.device), tried)):
            totals[number] += rank_values(ranks.numpy(), "ndcg@10").sum()
        progress(start + len(rows), len(some))
    return tried[int(totals.argmax())]


def _ranks(
    own: Tensor, met: Tensor, seen: Tensor, wanted: Tensor, tried: Sequence[Weights]
) -> Iterator[Tensor]:
    """Yield for each of the weights what `expected_ranks` says of own + added: [B] float64, CPU.

    Cells that no weight moves, most of them, are sorted once; only the others are added up for
    each of the weights. own: [B, N], finite. wanted: [B] int64, columns of the targets.

    Raises:
        ValueError: NaN scores.
    """
    reject_nan(own)
    moved = ((met != 0) | seen).scatter_(
        1, wanted[:, None], True
    )  # the target: never with the rest
    rest = own.masked_fill(moved, -math.inf)
    if rest.device.type == "cpu":  # numpy sorts three times as fast as torch
        rest = torch.from_numpy(np.sort(rest.numpy()))
    else:
        rest = rest.sort(1).values
    row, column = moved.nonzero(as_tuple=True)
    own, met, seen = own[row, column], met[row, column], seen[row, column]
    target = (column == wanted[row]).nonzero()[:, 0]
    counts = moved.sum(1)
    last = counts.cumsum(0) - 1
    for weights in tried:
        scores = own + weights.added(met, seen)
        goal = scores[target, None]
        limit = scores[target].repeat_interleave(counts)
        ahead = ((scores > limit).to(torch.int8) + (scores >= limit)).cumsum(0)[last]
        ahead = ahead.diff(prepend=ahead.new_zeros(1))
        for right in (False, True):
            ahead += rest.shape[1] - torch.searchsorted(rest, goal, right=right)[:, 0]
        # Twice those above and once those level, as in `items_ahead`; the target is level itself.
        yield 1.0 + (ahead - 1).double().cpu() / 2.0


class Blend(nn.Module):
    """Co-occurrence and repeats beside the scores of any method, weighed on validation.

        s = z + w m [i not in history] + rho [i in history]

    z: the method's scores, centred and scaled to deviation 1 for each user: those of the items that
    a search among tokens reached, of which the last stands for all others. Nothing is trained, so
    every method can wear it: its worth shows in what it adds to the counts. A run has it in a file
    of its own, beside a model that knows nothing of it.

    n_items: N, items of the catalog that was counted.
    """

    sized_by_data = frozenset(f"together.{name}" for name in CoOccurrence.sized_by_data)

    def __init__(self, n_items: int) -> None:
        super().__init__()
        self.together = CoOccurrence(n_items)
        self.register_buffer("near", torch.tensor(0.0))
        self.register_buffer("repeat", torch.tensor(0.0))
        self.near: Tensor
        self.repeat: Tensor

    @property
    def weights(self) -> Weights:
        """w and rho."""
        return Weights(float(self.near), float(self.repeat))

    def _term(self, histories: Ragged, scores: Tensor) -> Tensor:
        """Return w m and rho [B, N], on the device of the scores [B, N]."""
        met, seen = self.together.dense(histories, scores.shape[1])
        return self.weights.added(met.to(scores), seen.to(scores.device))

    def scorer(self, method: Recommender) -> Scorer:
        """Return the scorer of s."""
        score = method.scorer()

        def blended(histories: Ragged) -> Tensor:
            z = standardised(score(histories).float(), self.together.n_items)
            return z + self._term(histories, z)

        return blended

    def prior(self, scores: Tensor, histories: Ragged) -> Tensor:
        """Return what to add to scores [B, N] so that they rank as s does: sigma (s - z), with
        sigma each user's deviation.
        """
        return _spread(scores, self.together.n_items) * self._term(histories, scores)

    @torch.no_grad()
    def calibrate(
        self,
        scorer: Scorer,
        sequences: Ragged,
        histories: Ragged,
        targets: IntArray,
        *,
        texts: Sparse | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Count the training ``sequences``; choose w and rho on histories and targets [B].

        scorer: of the method. texts: K [N, N] of `text_neighbors`, None without texts.
        """
        self.together.count(sequences, texts)

        def parts(rows: Ragged) -> tuple[Tensor, Tensor, Tensor]:
            z = standardised(scorer(rows).float(), self.together.n_items)
            met, seen = self.together.dense(rows, z.shape[1])
            return z, met.to(z), seen.to(z.device)

        tried = [Weights(near, repeat) for repeat in REPEATS for near in NEAR]
        best = choose(parts, self.together.n_items, histories, targets, tried, progress)
        self.near.fill_(best.near)
        self.repeat.fill_(best.repeat)


def standardised(scores: Tensor, n_items: int) -> Tensor:
    """Return scores [B, N], of each user centred and scaled to deviation 1 over the first
    ``n_items``, so that items added later change nothing; over those reached, where not all were.
    """
    if not scores.isneginf().any():
        mean = scores[:, :n_items].mean(1, keepdim=True)
        return (scores - mean) / _spread(scores, n_items)
    found = ~scores.isneginf()
    count = found.sum(1, keepdim=True).clamp(min=1)
    apart = reached(scores) - torch.where(found, scores, 0.0).sum(1, keepdim=True) / count
    spread = (torch.where(found, apart, 0.0).square().sum(1, keepdim=True) / count).sqrt()
    return torch.where(spread > SAME, apart / spread.clamp(min=SAME), 0.0)


def _spread(scores: Tensor, n_items: int) -> Tensor:
    """Return each user's deviation [B, 1] of scores over the first ``n_items``."""
    return scores[:, :n_items].std(1, keepdim=True).clamp(min=1e-12)


def reached(scores: Tensor) -> Tensor:
    """Return scores [B, N] with each -inf in the place of the lowest that is none."""
    lowest = scores.masked_fill(scores.isneginf(), math.inf).amin(1, keepdim=True)
    return torch.maximum(scores, lowest)


def _csr(values: Floats, rows: IntArray, columns: IntArray, shape: tuple[int, int]) -> Sparse:
    from scipy import sparse

    made = sparse.coo_array((values, (rows, columns)), shape=shape).tocsr()
    made.sum_duplicates()
    return made
