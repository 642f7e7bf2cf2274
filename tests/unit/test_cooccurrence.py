"""Counts of pairs against a loop over every pair, and nothing of one's own in them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from l2rec.data.ragged import Ragged
from l2rec.methods.blocks.cooccurrence import CoOccurrence

N = 9
OPTIONS: dict[str, Any] = {"window": 3, "decay": 0.5, "newest": 2, "fade": 0.5}


def counted(rows: list[list[int]]) -> CoOccurrence:
    found = CoOccurrence(N, **OPTIONS)
    found.count(Ragged.from_rows(rows))
    return found


def random_rows(seed: int, users: int = 12) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(N, size=rng.integers(0, 8)).tolist() for _ in range(users)]


def literal_counts(rows: list[list[int]]) -> np.ndarray:
    counts = np.zeros((N, N))
    for row in rows:
        for p, i in enumerate(row):
            for q, j in enumerate(row):
                d = abs(q - p)
                if 0 < d <= OPTIONS["window"]:
                    counts[i, j] += OPTIONS["decay"] ** (d - 1)
    return counts


def often(rows: list[list[int]]) -> np.ndarray:
    """[N, 1] sqrt of how often each item occurs."""
    return np.sqrt([[max(1, sum(row.count(i) for row in rows))] for i in range(N)])


def literal_recall(history: list[int], counts: np.ndarray) -> np.ndarray:
    total = np.zeros(N)
    for k, item in enumerate(history[::-1][: (OPTIONS["newest"])]):
        total += OPTIONS["fade"] ** k * counts[item]
    return total


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_counts_and_recall_are_what_a_loop_counts(seed: int) -> None:
    rows = random_rows(seed)
    found = counted(rows)
    counts = literal_counts(rows) / often(rows)
    np.testing.assert_allclose(found.counts().toarray(), counts, rtol=1e-6)
    histories = [row for row in random_rows(seed + 10) if row]
    recalled = found.recall(Ragged.from_rows(histories)).toarray()
    np.testing.assert_allclose(recalled, [literal_recall(h, counts) for h in histories], rtol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_held_out_is_as_if_the_user_had_never_been(seed: int) -> None:
    """The windows of a training batch, every position: the counts of all the other users."""
    rows = random_rows(seed)
    found = counted(rows)
    users = np.array([u for u, row in enumerate(rows) if len(row) >= 3] * 2)
    inputs = [rows[u][:-1] for u in users]  # all but the newest target
    batch = Ragged.from_rows(inputs)
    ends = np.arange(len(batch.values))
    whose = np.repeat(users, batch.lengths)
    held_out = found.held_out(batch, ends, whose).toarray()
    expected = []
    for user, history in zip(users, inputs, strict=True):
        others = literal_counts([row for u, row in enumerate(rows) if u != user]) / often(rows)
        expected += [literal_recall(history[: t + 1], others) for t in range(len(history))]
    np.testing.assert_allclose(held_out, expected, atol=1e-6)


def test_a_target_only_its_user_has_is_never_its_own_evidence() -> None:
    rows = [[0, 1, 2], [3, 4, 5]]  # no pair occurs with two users
    found = counted(rows)
    batch = Ragged.from_rows([[0, 1], [3, 4]])
    assert found.recall(batch).nnz > 0
    assert found.held_out(batch, np.arange(4), np.array([0, 0, 1, 1])).nnz == 0


def test_nothing_is_recalled_before_anything_is_counted_or_for_an_item_that_came_later() -> None:
    histories = Ragged.from_rows([[1, 2], [N + 3]])
    assert CoOccurrence(N, **OPTIONS).recall(histories).nnz == 0
    later = counted([[1, 2, 3]]).recall(Ragged.from_rows([[N + 3], [2, N + 3]])).toarray()
    assert not later[0].any()
    np.testing.assert_allclose(later[1][[1, 3]], [0.5, 0.5], rtol=1e-6)
