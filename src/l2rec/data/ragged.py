"""Rows of different length in two flat arrays (CSR): the one shape of histories everywhere."""

from __future__ import annotations

__all__ = ["Ragged", "flat_index"]

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer]


def flat_index(starts: IntArray, lengths: IntArray) -> npt.NDArray[np.int64]:
    """Concatenate positions ``starts[i], ..., starts[i] + lengths[i] - 1`` of all rows, int64."""
    lengths = np.asarray(lengths, dtype=np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    shift = np.asarray(starts, dtype=np.int64) - (ends - lengths)
    index: npt.NDArray[np.int64] = np.arange(total, dtype=np.int64) + np.repeat(shift, lengths)
    return index


@dataclass(frozen=True)
class Ragged:
    """Rows of different length: row i is ``values[offsets[i]:offsets[i + 1]]``.

    values: [total] ints. offsets: [rows + 1] int64.
    """

    values: npt.NDArray[np.integer]
    offsets: npt.NDArray[np.int64]

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[int] | IntArray]) -> Ragged:
        arrays = [np.asarray(row, dtype=np.int32) for row in rows]
        offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in arrays], out=offsets[1:])
        values = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)
        return cls(values, offsets)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Lengths of the rows: [rows] int64."""
        return np.diff(self.offsets)

    def lengths_of(self, rows: IntArray | slice) -> npt.NDArray[np.int64]:
        """Lengths of the given rows, [n] int64, without those of all others."""
        lengths: npt.NDArray[np.int64] = self.offsets[1:][rows] - self.offsets[:-1][rows]
        return lengths

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> npt.NDArray[np.integer]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def take(self, rows: IntArray) -> Ragged:
        """Copy the given rows, in the given order."""
        return self.gather(self.offsets[:-1][rows], self.lengths_of(rows))

    def tail(self, limit: int) -> Ragged:
        """Cut each row to its newest (last) ``limit`` values."""
        lengths = np.minimum(self.lengths, limit)
        return self.gather(self.offsets[1:] - lengths, lengths)

    def head(self, limit: int) -> Ragged:
        """Cut each row to its first ``limit`` values."""
        return self.gather(self.offsets[:-1], np.minimum(self.lengths, limit))

    def gather(self, starts: IntArray, lengths: IntArray) -> Ragged:
        """Copy rows of ``lengths`` values that start at ``starts`` (positions in ``values``)."""
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return Ragged(np.asarray(self.values[flat_index(starts, lengths)]), offsets)
