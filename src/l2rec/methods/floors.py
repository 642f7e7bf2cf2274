"""Floor baselines: what a trained model has to beat. No training, no parameters.

``Popularity`` knows no user, ``LastItemNeighbour`` which item followed which, ``CoOccurrenceFloor``
which items are near each other, and ``TextNeighbour`` only the item texts: it is the untrained
backbone's own ranking. Fit them on training prefixes only: an event that is validated or tested
must not be counted. Of data with cold items they know the others alone, as whatever is trained.
"""

from __future__ import annotations

__all__ = ["CoOccurrenceFloor", "LastItemNeighbour", "Popularity", "TextNeighbour", "floors_of"]

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from l2rec.data.ragged import IntArray, Ragged, flat_index
from l2rec.errors import DataError
from l2rec.modules.cooccurrence import CoOccurrence
from l2rec.protocols import Recommender, Scorer

if TYPE_CHECKING:
    from scipy import sparse


@dataclass(frozen=True)
class Popularity:
    """The same ranking for everyone: training events per item. ``counts``: [N] int64."""

    counts: npt.NDArray[np.int64]

    @classmethod
    def from_sequences(cls, train: Ragged, n_items: int) -> Popularity:
        """Count ``train``, item ints below ``n_items``; ``DataError`` for any other."""
        return cls(_event_counts(train, n_items))

    @property
    def n_items(self) -> int:
        """N."""
        return len(self.counts)

    def scorer(self) -> Scorer:
        """Return histories of B users -> [B, N] float32, one row of memory seen B times."""
        row = torch.from_numpy(self.counts.astype(np.float32))
        return lambda histories: row.expand(len(histories), -1)


@dataclass(frozen=True)
class LastItemNeighbour:
    """How often each item followed the user's last item in training.

    Equal counts, and so all items that never followed, are ordered by popularity; an empty
    history and a last item that nothing followed get the popularity ranking.

    ``followers``: [N, N] CSR int64, row = item, column = the item right after it.
    ``counts``: [N] int64, training events of each item.
    """

    followers: sparse.csr_array
    counts: npt.NDArray[np.int64]

    @classmethod
    def from_sequences(cls, train: Ragged, n_items: int) -> LastItemNeighbour:
        """Count the transitions of ``train``, item ints below ``n_items``; else ``DataError``."""
        from scipy import sparse  # slow to import, and only training has floors

        counts = _event_counts(train, n_items)
        lengths = np.maximum(train.lengths - 1, 0)  # transitions of each row
        before = flat_index(train.offsets[:-1], lengths)
        pairs = (train.values[before], train.values[before + 1])
        ones = np.ones(len(before), dtype=np.int64)
        followers = sparse.coo_array((ones, pairs), shape=(n_items, n_items)).tocsr()
        followers.sum_duplicates()
        return cls(followers, counts)

    @property
    def n_items(self) -> int:
        """N."""
        return len(self.counts)

    def scorer(self) -> Scorer:
        """Return histories of B users -> [B, N] float32; only these B rows are made dense.

        Raises ``DataError`` for a last item outside the catalog.
        """
        # At most one half: a count plus this never reaches the next count, even when rounded to
        # float32, so popularity orders equal counts and never reorders different ones.
        tie_break = (self.counts / max(2 * int(self.counts.max(initial=0)), 1)).astype(np.float32)
        starts, lengths = self.followers.indptr[:-1], np.diff(self.followers.indptr)
        columns, times = self.followers.indices, self.followers.data.astype(np.float32)

        def score(histories: Ragged) -> Tensor:
            users, last = _last_items(histories, self.n_items)
            scores = np.tile(tie_break, (len(histories), 1))
            cells = flat_index(starts[last], lengths[last])
            # Columns are distinct within a row, so the in-place addition meets each cell once.
            scores[np.repeat(users, lengths[last]), columns[cells]] += times[cells]
            return torch.from_numpy(scores)

        return score


@dataclass(frozen=True)
class CoOccurrenceFloor:
    """Co-occurrence of each item with the newest items of the user.

    The faded counts of `l2rec.modules.cooccurrence`; equal counts, and all items without any, are
    ordered by popularity. ``counts``: [N] int64, training events.
    """

    together: CoOccurrence
    counts: npt.NDArray[np.int64]

    @classmethod
    def from_sequences(cls, train: Ragged, n_items: int) -> CoOccurrenceFloor:
        """Count the pairs of ``train``, item ints below ``n_items``; else ``DataError``."""
        counts = _event_counts(train, n_items)
        together = CoOccurrence(n_items, rarity=0.0)  # nothing else here knows what is popular
        together.count(train)
        return cls(together, counts)

    @property
    def n_items(self) -> int:
        """N."""
        return len(self.counts)

    def scorer(self) -> Scorer:
        """Return histories of B users -> [B, N] float32; ``DataError`` for an item out of range."""
        # Below the smallest faded count: that of a pair at the window's end, with the most frequent
        # item, which is the oldest that is looked at. Popularity orders equal counts alone.
        met, most = self.together, max(int(self.counts.max(initial=0)), 1)
        smallest = (
            met.decay ** (met.window - 1)
            * met.fade ** (met.newest - 1)
            / most ** (0.5 + met.rarity)
        )
        tie_break = (min(1e-4, smallest / 2) * self.counts / most).astype("f4")

        def score(histories: Ragged) -> Tensor:
            _check_range(histories.values, self.n_items)
            some = np.flatnonzero(histories.lengths > 0)
            scores = np.tile(tie_break, (len(histories), 1))
            found = self.together.recall(histories.take(some)).tocoo()
            scores[some[found.row], found.col] += found.data.astype(np.float32)
            return torch.from_numpy(scores)

        return score


class TextNeighbour:
    """Cosine similarity of every item's vector to that of the user's last item.

    ``item_vectors``: [N, D] floats, for instance the item texts encoded by an untrained backbone.
    A zero vector is similar to nothing; an empty history scores zero everywhere. The last item
    itself scores 1 and leads its own ranking unless histories are masked.
    """

    def __init__(self, item_vectors: Tensor) -> None:
        if item_vectors.ndim != 2:
            raise DataError(f"item vectors of shape {list(item_vectors.shape)}; pass [N, D]")
        self.item_vectors = torch.nn.functional.normalize(item_vectors.detach().float(), dim=1)

    @property
    def n_items(self) -> int:
        """N."""
        return len(self.item_vectors)

    def scorer(self) -> Scorer:
        """Return histories of B users -> [B, N] float32; ``DataError`` for an item out of range."""
        vectors = self.item_vectors

        def score(histories: Ragged) -> Tensor:
            users, last = _last_items(histories, self.n_items)
            queries = vectors.new_zeros((len(histories), vectors.shape[1]))
            queries[torch.from_numpy(users)] = vectors[torch.from_numpy(last)]
            return queries @ vectors.T

        return score


def floors_of(train: Ragged, n_items: int) -> dict[str, Recommender]:
    """Fit the floors that follow from training events alone; by the names that reports use."""
    return {
        "popularity": Popularity.from_sequences(train, n_items),
        "last item neighbour": LastItemNeighbour.from_sequences(train, n_items),
        "co-occurrence": CoOccurrenceFloor.from_sequences(train, n_items),
    }


def _event_counts(train: Ragged, n_items: int) -> npt.NDArray[np.int64]:
    """Count events per item: [N] int64."""
    _check_range(train.values, n_items)
    return np.bincount(train.values, minlength=n_items).astype(np.int64, copy=False)


def _last_items(
    histories: Ragged, n_items: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the rows that have a history and their newest item, both [rows] int64."""
    users = np.flatnonzero(histories.lengths > 0)
    last = histories.values[histories.offsets[1:][users] - 1].astype(np.int64)
    _check_range(last, n_items)
    return users, last


def _check_range(items: IntArray, n_items: int) -> None:
    if len(items) and (int(items.min()) < 0 or int(items.max()) >= n_items):
        bad = int(items.min()) if int(items.min()) < 0 else int(items.max())
        raise DataError(f"item {bad} is outside the catalog of {n_items} items (0..{n_items - 1})")
