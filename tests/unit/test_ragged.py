"""Ragged against lists of lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.rows import rows_of

from l2rec.data.ragged import Ragged, flat_index

ROWS = st.lists(st.lists(st.integers(0, 99), max_size=6), max_size=6)


@given(ROWS)
def test_round_trip(rows: list[list[int]]) -> None:
    ragged = Ragged.from_rows(rows)
    assert rows_of(ragged) == rows
    assert ragged.lengths.tolist() == [len(row) for row in rows]
    assert len(ragged) == len(rows)
    assert ragged.values.dtype == np.int32
    assert ragged.offsets.dtype == np.int64


@given(ROWS)
def test_rows_are_counted_from_either_end(rows: list[list[int]]) -> None:
    ragged = Ragged.from_rows(rows)
    for n in range(1, len(rows) + 1):
        assert ragged[-n].tolist() == ragged[len(rows) - n].tolist() == rows[-n]
    for outside in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            ragged[outside]


@given(ROWS, st.integers(0, 7))
def test_tail(rows: list[list[int]], limit: int) -> None:
    expected = [row[len(row) - min(limit, len(row)) :] for row in rows]
    assert rows_of(Ragged.from_rows(rows).tail(limit)) == expected


@given(st.data(), ROWS.filter(bool))
def test_take(data: st.DataObject, rows: list[list[int]]) -> None:
    wanted = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8))
    taken = Ragged.from_rows(rows).take(np.array(wanted, dtype=np.int64))
    assert rows_of(taken) == [rows[i] for i in wanted]


def test_flat_index() -> None:
    assert flat_index(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert flat_index(np.array([], dtype=int), np.array([], dtype=int)).tolist() == []
