"""Rows of item ints as plain lists."""

from __future__ import annotations

from l2rec.data.ragged import Ragged


def rows_of(ragged: Ragged) -> list[list[int]]:
    """Return every row as a list."""
    return [ragged[i].tolist() for i in range(len(ragged))]
