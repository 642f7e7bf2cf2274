"""Which items are bought near each other: counts of pairs in training sequences.

    C[i, j]   = sum over pairs (i at p, j at p + d), 0 < |d| <= window, of decay^(|d| - 1),
                divided by the square root of how often i occurs: what is rare says more
    m[u, j]   = sum over the ``newest`` items i of u's history, k = 0 the newest, of fade^k C[i, j]

Before and after count alike: in logs of purchases the order within a day says little.

In small data these counts say what no embedding of the same data has learned to say. Used alone
they are a floor (`l2rec.methods.floors`); as a term of a method's logits they leave to it what they
do not know. Where they enter a training loss, a user's own sequence must not be counted:
`held_out`.

Rows of sparse matrices throughout; nothing of size N x N or P x N is made dense here.
"""

from __future__ import annotations

__all__ = ["CoOccurrence"]

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from l2rec.data.ragged import IntArray, Ragged

Sparse = Any
"""scipy.sparse.csr_array; scipy is slow to import and only needed here."""
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
ROUNDING = 1e-4
"""Below the smallest evidence of another user; what is less is left of float32 counts."""


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
        fade: float = 0.85,
    ) -> None:
        super().__init__()
        self.n_items, self.newest, self.fade = n_items, newest, fade
        self.window, self.decay = window, decay
        self.register_buffer("offsets", torch.zeros(n_items + 1, dtype=torch.int64))
        self.register_buffer("items", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("weights", torch.zeros(0))
        self.offsets: Tensor
        self.items: Tensor
        self.weights: Tensor
        self._sequences: Ragged | None = None
        self._scale = np.ones(n_items)  # 1 / sqrt(events of i), while there are sequences

    def count(self, sequences: Ragged) -> None:
        """Take the counts of ``sequences``: one row for each user, oldest first, items below N."""
        if self._sequences is sequences:
            return
        events = np.bincount(sequences.values, minlength=self.n_items)
        self._scale = 1 / np.sqrt(np.maximum(events, 1))
        _, first, second, weight = self._pairs(sequences)
        counts = _csr(weight, first, second, (self.n_items, self.n_items))
        device = self.offsets.device
        self.offsets = torch.from_numpy(counts.indptr.astype(np.int64)).to(device)
        self.items = torch.from_numpy(counts.indices.astype(np.int32)).to(device)
        self.weights = torch.from_numpy(counts.data.astype(np.float32)).to(device)
        self._sequences = sequences

    def counts(self) -> Sparse:
        """C [N, N] float64."""
        from scipy import sparse

        arrays = (self.weights.double(), self.items, self.offsets)
        return sparse.csr_array(
            tuple(array.cpu().numpy() for array in arrays), shape=(self.n_items, self.n_items)
        )

    def _pairs(self, rows: Ragged) -> tuple[Ints, Ints, Ints, Floats]:
        """(row, i, j, weight) of every pair within the window, both directions."""
        values, lengths = np.asarray(rows.values, dtype=np.int64), rows.lengths
        row_of = np.repeat(np.arange(len(rows)), lengths)
        place = np.arange(len(values)) - np.repeat(rows.offsets[:-1], lengths)
        parts = []
        for distance in range(1, self.window + 1):
            later = np.flatnonzero(place >= distance)
            a, b, row = values[later - distance], values[later], row_of[later]
            weight = np.full(len(later), self.decay ** (distance - 1))
            parts += [(row, a, b, weight * self._scale[a]), (row, b, a, weight * self._scale[b])]
        row, a, b, weight = (np.concatenate(column) for column in zip(*parts, strict=True))
        return row, a, b, weight

    def _faded(self, histories: Ragged, ends: IntArray) -> tuple[Ints, Ints, Floats]:
        """(prediction, item, fade^k) of the newest items up to each of ``ends`` [P], positions in
        the flat items of ``histories``. Items that came after training have no counts.
        """
        starts = histories.offsets[:-1]
        first = starts[np.searchsorted(histories.offsets, ends, side="right") - 1]
        values = np.asarray(histories.values, dtype=np.int64)
        parts = []
        for k in range(self.newest):
            some = np.flatnonzero(ends - k >= first)
            some = some[values[ends[some] - k] < self.n_items]
            parts.append((some, values[ends[some] - k], np.full(len(some), self.fade**k)))
        some, items, weight = (np.concatenate(column) for column in zip(*parts, strict=True))
        return some, items, weight

    def recall(self, histories: Ragged, ends: IntArray | None = None) -> Sparse:
        """m [P, N] float64 for the prefix of ``histories`` up to each flat position in ``ends``
        [P]; by default of each row as a whole.
        """
        at = histories.offsets[1:] - 1 if ends is None else np.asarray(ends, dtype=np.int64)
        prediction, items, weight = self._faded(histories, at)
        return _csr(weight, prediction, items, (len(at), self.n_items)) @ self.counts()

    def held_out(self, histories: Ragged, ends: IntArray, users: IntArray) -> Sparse:
        """As `recall`, without what the user's own sequence added to the counts.

        ``users``: [P] rows of the counted sequences. What is left comes from other users alone, as
        it does for a user who was never seen: no target is among its own evidence.
        """
        assert self._sequences is not None, "held_out needs the sequences that were counted"
        ends = np.asarray(ends, dtype=np.int64)
        prediction, items, weight = self._faded(histories, ends)
        distinct, local = np.unique(np.asarray(users, dtype=np.int64), return_inverse=True)
        row, first, second, own = self._pairs(self._sequences.take(distinct))
        # (user, item) pairs in place of items: each user reads its own counts alone.
        wanted, column = np.unique(
            np.concatenate((local[prediction] * self.n_items + items, row * self.n_items + first)),
            return_inverse=True,
        )
        read = _csr(weight, prediction, column[: len(items)], (len(ends), len(wanted)))
        mine = _csr(own, column[len(items) :], second, (len(wanted), self.n_items))
        everyone = _csr(weight, prediction, items, (len(ends), self.n_items)) @ self.counts()
        rest = (everyone - read @ mine).tocsr()
        rest.data[rest.data < ROUNDING] = 0.0
        rest.eliminate_zeros()
        return rest


def _csr(values: Floats, rows: IntArray, columns: IntArray, shape: tuple[int, int]) -> Sparse:
    from scipy import sparse

    made = sparse.coo_array((values, (rows, columns)), shape=shape).tocsr()
    made.sum_duplicates()
    return made
