"""Splits against literal loops."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.rows import rows_of

from l2rec.data import splits
from l2rec.data.dataset import Dataset
from l2rec.data.ragged import Ragged
from l2rec.data.splits import Cases, leave_one_out, split_events, with_fewer_users
from l2rec.data.ties import EventOrder
from l2rec.errors import DataError

ROWS = st.lists(st.lists(st.integers(0, 9), max_size=7), max_size=8)
Timed = list[list[tuple[float, int]]]
"""Events (time, item) of each user, in order."""
TIMED = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=8).map(
        lambda row: sorted(row, key=lambda event: event[0])
    ),
    max_size=6,
)


def joined(parts: list[list[int]]) -> list[int]:
    return [item for part in parts for item in part]


def cases_of(cases: Cases) -> list[tuple[int, list[int], list[int]]]:
    """Return (user, history, targets) of each case."""
    return list(
        zip(cases.users.tolist(), rows_of(cases.histories), rows_of(cases.targets), strict=True)
    )


def timed(rows: Timed, given: list[list[int]] | None = None, unit: str = "seconds") -> Dataset:
    """Build a data set in memory. ``given``: the split of each event."""
    sequences = Ragged.from_rows([[item for _, item in row] for row in rows])
    order = EventOrder("file", unit, None, 0, 0, 0, 0, 0, 0, 0)
    return Dataset(
        path=Path("log"),
        name="log",
        offsets=sequences.offsets,
        items=sequences.values.astype(np.int32),
        timestamps=np.array([t for row in rows for t, _ in row], dtype=np.float64),
        event_types=None,
        splits=None if given is None else np.array(joined(given), dtype=np.int8),
        fingerprint="",
        meta={"order": order.to_json(), "items": 10, "splits": None if given is None else "given"},
    )


# ---------------------------------------------------------------- leave-one-out


@given(ROWS)
def test_leave_one_out_equals_the_loop(rows: list[list[int]]) -> None:
    split = leave_one_out(Ragged.from_rows(rows))
    users = [u for u, row in enumerate(rows) if len(row) >= 3]
    assert rows_of(split.train) == [row[:-2] if len(row) >= 3 else row for row in rows]
    assert cases_of(split.valid) == [(u, rows[u][:-2], [rows[u][-2]]) for u in users]
    assert cases_of(split.test) == [(u, rows[u][:-1], [rows[u][-1]]) for u in users]


@given(ROWS, st.none() | st.integers(0, 10))
def test_whole_sequences_have_no_cold_item(rows: list[list[int]], warm: int | None) -> None:
    split = replace(leave_one_out(Ragged.from_rows(rows)), warm=warm)
    known = [history + targets for _, history, targets in cases_of(split.test)]
    kept = [[item for item in row if warm is None or item < warm] for row in known]
    assert rows_of(split.whole()) == kept


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
    assert fewer.valid is split.valid and fewer.test is split.test
    assert rows_of(with_fewer_users(split, share, seed).train) == kept


def test_few_are_evaluated_and_all_trained_on() -> None:
    rows = [[(float(i), u + i) for i in range(4)] for u in range(9)]
    dataset = timed(rows)
    whole, few = split_events(dataset), split_events(dataset, users=4)
    assert rows_of(few.train) == rows_of(whole.train)
    for ours, theirs in ((few.valid, whole.valid), (few.test, whole.test)):
        assert ours.users.tolist() == [0, 2, 5, 8]
        kept = [case for case in cases_of(theirs) if case[0] in (0, 2, 5, 8)]
        assert cases_of(ours) == kept
    assert few.protocol == "leave-one-out; 4 of 9 cases of test"
    assert split_events(dataset, users=9).protocol == whole.protocol


def test_dtypes_are_those_promised() -> None:
    split = leave_one_out(Ragged.from_rows([[1, 2, 3], [4]]))
    assert split.test.users.dtype == np.int64
    assert split.valid.targets.values.dtype == split.test.targets.values.dtype == np.int32
    assert split.train.values.dtype == np.int32
    assert split.train.offsets.dtype == np.int64


# ---------------------------------------------------------------- tied-day


def groups_of(row: list[tuple[float, int]]) -> list[list[int]]:
    """Return the items of each time of a user, by the definition of docs/ties.md."""
    return [[item for _, item in same] for _, same in groupby(row, key=lambda event: event[0])]


@given(TIMED)
def test_tied_day_equals_the_loop(rows: Timed) -> None:
    train, valid, test = [], [], []
    for user, row in enumerate(rows):
        groups = groups_of(row)
        if len(groups) < 3:
            train.append(joined(groups))
            continue
        train.append(joined(groups[:-2]))
        valid.append((user, joined(groups[:-2]), list(dict.fromkeys(groups[-2]))))
        test.append((user, joined(groups[:-1]), list(dict.fromkeys(groups[-1]))))
    split = splits.tied_day(timed(rows))
    assert rows_of(split.train) == train
    assert cases_of(split.valid) == valid
    assert cases_of(split.test) == test


@given(TIMED)
def test_without_ties_tied_day_is_leave_one_out(rows: Timed) -> None:
    rows = [[(float(n), item) for n, (_, item) in enumerate(row)] for row in rows]
    ours, theirs = splits.tied_day(timed(rows)), leave_one_out(timed(rows).sequences)
    assert rows_of(ours.train) == rows_of(theirs.train)
    assert cases_of(ours.valid) == cases_of(theirs.valid)
    assert cases_of(ours.test) == cases_of(theirs.test)
    assert cases_of(splits.last_tied_day(timed(rows))) == cases_of(theirs.test)


@given(TIMED)
def test_last_tied_day_has_no_event_that_leave_one_out_trains_on(rows: Timed) -> None:
    expected = []
    for user, row in enumerate(rows):
        groups = groups_of(row)
        if len(row) >= 3 and len(groups) > 1 and len(groups[-1]) <= 2:
            expected.append((user, joined(groups[:-1]), list(dict.fromkeys(groups[-1]))))
    cases = splits.last_tied_day(timed(rows))
    assert cases_of(cases) == expected
    trained = leave_one_out(timed(rows).sequences).train
    for user, history, _ in expected:
        assert len(trained[user]) <= len(history)


# ---------------------------------------------------------------- time


@given(TIMED)
def test_global_time_equals_the_loop(rows: Timed) -> None:
    train, valid, test = [], [], []
    for user, row in enumerate(rows):
        first, second, third = (
            [i for t, i in row if low <= t < high] for low, high in ((0, 4), (4, 7), (7, 99))
        )
        train.append(first)
        if first and second:
            valid.append((user, first, [second[0]]))
        if (first or second) and third:
            test.append((user, first + second, [third[0]]))
    if not valid or not test:
        with pytest.raises(DataError, match="choose moments inside the log's time span"):
            splits.global_time(timed(rows), 4, 7)
        return
    split = splits.global_time(timed(rows), 4, 7)
    assert rows_of(split.train) == [row for row in train if row]
    assert cases_of(split.valid) == valid
    assert cases_of(split.test) == test


def test_moments_are_dates_numbers_or_shares() -> None:
    day = 86_400.0
    rows: Timed = [[(n * day, n) for n in range(10)]]
    by_share = split_events(timed(rows), "time")
    assert cases_of(by_share.valid) == [(0, list(range(8)), [8])]
    assert cases_of(by_share.test) == [(0, list(range(9)), [9])]
    assert "validation from 1970-01-09, test from 1970-01-10" in by_share.protocol
    for valid_from, test_from in (("1970-01-05", "1970-01-07"), (4 * day, "518400"), (0.4, 0.6)):
        split = split_events(timed(rows), "time", valid_from, test_from)
        assert cases_of(split.valid) == [(0, [0, 1, 2, 3], [4])]
        assert cases_of(split.test) == [(0, [0, 1, 2, 3, 4, 5], [6])]


@pytest.mark.parametrize(("unit", "per_second"), [("milliseconds", 1e3), ("nanoseconds", 1e9)])
def test_dates_are_in_the_unit_of_the_data(unit: str, per_second: float) -> None:
    day = 86_400.0
    rows: Timed = [[(n * day * per_second, n) for n in range(10)]]
    split = split_events(timed(rows, unit=unit), "time", "1970-01-05", str(6 * day * per_second))
    assert cases_of(split.valid) == [(0, [0, 1, 2, 3], [4])]
    assert cases_of(split.test) == [(0, [0, 1, 2, 3, 4, 5], [6])]
    assert "validation from 1970-01-05, test from 1970-01-07" in split.protocol


@pytest.mark.parametrize("unit", ["seconds", "unknown", "milliseconds"])
def test_other_moments_are_another_protocol(unit: str) -> None:
    dataset = timed([[(12_345_670.0 + n / 2, n) for n in range(10)]], unit=unit)
    protocols = {
        split_events(dataset, "time", 12_345_672.0, 12_345_672.5 + n).protocol for n in (0, 0.5, 1)
    }
    assert len(protocols) == 3


@pytest.mark.parametrize("moment", ["nan", "inf", float("nan"), float("-inf")])
def test_moments_are_finite(moment: str | float) -> None:
    with pytest.raises(DataError, match="is no time; write a date such as"):
        split_events(timed([[(0, 1), (1, 2), (2, 3)]]), "time", moment)
    with pytest.raises(DataError, match="choose moments inside the log's time span"):
        split_events(timed([[(0, 1), (1, 2), (2, 3)]]), "time", 1e300, 1e301)


def test_a_split_by_time_wants_times_in_order() -> None:
    with pytest.raises(DataError, match="has times of several units"):
        split_events(timed([[(0, 1), (1, 2), (2, 3)]], unit="mixed"), "time")
    with pytest.raises(DataError, match="test from 1970-01-01T00:00:04Z on, which is not later"):
        splits.global_time(timed([]), 7, 4)
    with pytest.raises(DataError, match="has positions instead of times"):
        split_events(timed([[(0, 1), (1, 2), (2, 3)]], unit="order only"), "time")


# ---------------------------------------------------------------- given


@given(TIMED, st.data())
@settings(max_examples=50)
def test_given_splits_equal_the_loop(rows: Timed, data: st.DataObject) -> None:
    marks = [
        sorted(data.draw(st.lists(st.integers(0, 2), min_size=len(row), max_size=len(row))))
        for row in rows
    ]
    if not any(1 in of_row for of_row in marks):  # then the last of several training events is
        for of_row in marks:
            if of_row.count(0) > 1:
                of_row[of_row.count(0) - 1] = 1
        given = [[0 if mark == 1 else mark for mark in of_row] for of_row in marks]
    else:
        given = marks
    expected: dict[int, list[Any]] = {1: [], 2: []}
    for user, (row, of_row) in enumerate(zip(rows, marks, strict=True)):
        items = [item for _, item in row]
        for at, mark in enumerate(of_row):
            if mark and at:
                expected[mark].append((user, items[:at], [items[at]]))
    if not expected[1] or not expected[2]:
        with pytest.raises(DataError, match="event with a history"):
            split_events(timed(rows, given))
        return
    split = split_events(timed(rows, given))
    assert split.kind == "given"
    train = [
        [item for (_, item), mark in zip(row, of_row, strict=True) if mark == 0]
        for row, of_row in zip(rows, marks, strict=True)
    ]
    assert rows_of(split.train) == [row for row in train if row]
    assert cases_of(split.valid) == expected[1]
    assert cases_of(split.test) == expected[2]


def test_what_cannot_be_split_is_refused() -> None:
    rows: Timed = [[(0, 1), (1, 2)]]
    with pytest.raises(DataError, match="no splits of its own; choose leave-one-out"):
        split_events(timed(rows), "given")
    with pytest.raises(DataError, match="no user has three events: one to learn from"):
        split_events(timed(rows))
    told = timed(rows)
    told.meta["splits"] = "leave-one-out"
    with pytest.raises(DataError, match="no user has three events: one to learn from"):
        split_events(told, "given")
    with pytest.raises(DataError, match="no user has events of three different times"):
        split_events(timed([[(0, 1), (0, 2), (0, 3)]]), "tied-day")


def test_pairs_have_a_row_for_each_target() -> None:
    cases = splits.tied_day(timed([[(0, 1), (1, 2), (1, 3), (2, 4), (2, 5)]])).test
    histories, targets = cases.pairs()
    assert rows_of(histories) == [[1, 2, 3], [1, 2, 3]]
    assert targets.tolist() == [4, 5]
    assert cases_of(cases.take(np.array([True]))) == [(0, [1, 2, 3], [4, 5])]
