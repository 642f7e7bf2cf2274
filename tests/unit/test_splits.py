"""Splits against a literal loop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.rows import rows_of

from l2rec.data.dataset import Dataset
from l2rec.data.ragged import Ragged
from l2rec.data.splits import global_time, leave_one_out, with_fewer_users
from l2rec.errors import DataError

ROWS = st.lists(st.lists(st.integers(0, 9), max_size=7), max_size=8)


@given(ROWS)
def test_leave_one_out_equals_the_loop(rows: list[list[int]]) -> None:
    split = leave_one_out(Ragged.from_rows(rows))
    users = [u for u, row in enumerate(rows) if len(row) >= 3]
    assert rows_of(split.train) == [row[:-2] if len(row) >= 3 else row for row in rows]
    assert split.users.tolist() == users
    assert rows_of(split.valid_histories) == [rows[u][:-2] for u in users]
    assert split.valid_targets.tolist() == [rows[u][-2] for u in users]
    assert rows_of(split.test_histories) == [rows[u][:-1] for u in users]
    assert split.test_targets.tolist() == [rows[u][-1] for u in users]


@given(ROWS, st.floats(0.01, 1.0), st.integers(0, 99))
def test_fewer_users_are_trained_on_and_all_evaluated(
    rows: list[list[int]], share: float, seed: int
) -> None:
    split = leave_one_out(Ragged.from_rows(rows))
    fewer = with_fewer_users(split, share, seed)
    kept, every = rows_of(fewer.train), rows_of(split.train)
    assert len(kept) == min(len(rows), max(1, round(share * len(rows))))
    rest = iter(every)
    assert all(row in rest for row in kept), "rows of the split, in their order"
    assert fewer.users is split.users and fewer.test_histories is split.test_histories
    assert rows_of(with_fewer_users(split, share, seed).train) == kept


def test_dtypes_are_those_promised() -> None:
    split = leave_one_out(Ragged.from_rows([[1, 2, 3], [4]]))
    assert split.users.dtype == np.int64
    assert split.valid_targets.dtype == split.test_targets.dtype == np.int32
    assert split.train.values.dtype == np.int32
    assert split.train.offsets.dtype == np.int64


def timed(rows: list[list[tuple[float, int]]]) -> Dataset:
    sequences = Ragged.from_rows([[item for _, item in row] for row in rows])
    times = np.array([t for row in rows for t, _ in row], dtype=np.float64)
    fake = SimpleNamespace(
        sequences=sequences,
        offsets=sequences.offsets,
        timestamps=times,
        n_users=len(rows),
        n_events=len(times),
    )
    return cast(Dataset, fake)


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=8), max_size=6))
def test_global_time_equals_the_loop(rows: list[list[Any]]) -> None:
    rows = [sorted(row, key=lambda event: event[0]) for row in rows]
    expected = []
    for user, row in enumerate(rows):
        train = [i for t, i in row if t < 4]
        valid = [i for t, i in row if 4 <= t < 7]
        test = [i for t, i in row if t >= 7]
        if train and valid and test:
            expected.append((user, train, valid[0], train + valid, test[0]))
    if not expected:
        with pytest.raises(DataError, match="choose moments inside the log's time span"):
            global_time(timed(rows), 4, 7)
        return
    split = global_time(timed(rows), 4, 7)
    assert rows_of(split.train) == [[i for t, i in row if t < 4] for row in rows]
    assert split.users.tolist() == [e[0] for e in expected]
    assert rows_of(split.valid_histories) == [e[1] for e in expected]
    assert split.valid_targets.tolist() == [e[2] for e in expected]
    assert rows_of(split.test_histories) == [e[3] for e in expected]
    assert split.test_targets.tolist() == [e[4] for e in expected]


def test_global_time_wants_two_moments_in_order() -> None:
    with pytest.raises(DataError, match="valid_from=7 is not before test_from=4"):
        global_time(timed([]), 7, 4)
