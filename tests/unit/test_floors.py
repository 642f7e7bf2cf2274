"""The floors on a log small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from l2rec.data.ragged import Ragged
from l2rec.errors import DataError
from l2rec.evaluation.ranking import evaluate
from l2rec.methods.floors import CoOccurrenceFloor, LastItemNeighbour, Popularity, TextNeighbour
from l2rec.protocols import Recommender

# Events: item 0 three times, 1 three times, 2 once, 3 once, 4 never.
# Transitions: 0->1 twice, 1->2, 3->1, 1->0; none from one row into the next.
TRAIN = Ragged.from_rows([[0, 1, 2], [], [0, 1], [3, 1, 0]])
N_ITEMS = 5
TIES = [3 / 6, 3 / 6, 1 / 6, 1 / 6, 0.0]  # counts / (2 x the greatest count)


def test_popularity_counts_events() -> None:
    floor = Popularity.from_sequences(TRAIN, N_ITEMS)
    scores = floor.scorer()(Ragged.from_rows([[4], []]))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[3, 3, 1, 1, 0], [3, 3, 1, 1, 0]]


def test_last_item_neighbour_counts_transitions() -> None:
    floor = LastItemNeighbour.from_sequences(TRAIN, N_ITEMS)
    scores = floor.scorer()(Ragged.from_rows([[3, 0], [0, 1], [4], [], [3]]))
    assert scores.dtype == torch.float32
    expected = [
        [TIES[0], 2 + TIES[1], TIES[2], TIES[3], TIES[4]],
        [1 + TIES[0], TIES[1], 1 + TIES[2], TIES[3], TIES[4]],
        TIES,
        TIES,
        [TIES[0], 1 + TIES[1], TIES[2], TIES[3], TIES[4]],
    ]
    torch.testing.assert_close(scores, torch.tensor(expected))


def test_last_item_neighbour_is_ranked_as_by_hand() -> None:
    floor = LastItemNeighbour.from_sequences(TRAIN, N_ITEMS)
    histories = Ragged.from_rows([[3, 0], [0, 1], [], [4]])
    result = evaluate(floor, histories, np.array([1, 2, 0, 3]))
    # [0, 1] -> 2: item 0 followed as often and is more popular, and is in the history.
    # [] -> 0: tied with item 1. [4] -> 3: below 0 and 1, tied with 2.
    assert result.ranks.tolist() == [1.0, 2.0, 1.5, 3.5]
    assert result.ranks_masked.tolist() == [1.0, 1.0, 1.5, 3.5]
    assert result.top[1].tolist() == [0, 2, 1, 3, 4]


def test_co_occurrence_fades_with_distance_and_age() -> None:
    floor = CoOccurrenceFloor.from_sequences(TRAIN, N_ITEMS)
    scores = floor.scorer()(Ragged.from_rows([[0], [2, 0], [], [4]]))
    assert scores.dtype == torch.float32
    ties = [1e-4, 1e-4, 1e-4 / 3, 1e-4 / 3, 0.0]
    # Near 0, which occurs three times: 1 beside it three times, 2 and 3 two away from it.
    near = torch.tensor([0.0, 3.0, 0.8, 0.8, 0.0]) / 3**0.5
    # Near 2, which occurs once: 1 beside it, 0 two away from it.
    older = torch.tensor([0.8, 1.0, 0.0, 0.0, 0.0])
    expected = torch.stack((near, near + 0.8 * older, 0 * near, 0 * near)) + torch.tensor(ties)
    torch.testing.assert_close(scores, expected)
    with pytest.raises(DataError, match="outside the catalog"):
        floor.scorer()(Ragged.from_rows([[N_ITEMS]]))


def test_popularity_never_hides_what_was_met_once() -> None:
    """Near an item of so many events that a pair with it says little."""
    users = [[0, *[3] * 9, 1], [0] * 60_000, [2] * 70_000]
    floor = CoOccurrenceFloor.from_sequences(Ragged.from_rows(users), 12)
    assert floor.scorer()(Ragged.from_rows([[5]])).argmax() == 2
    row = floor.scorer()(Ragged.from_rows([[0, *range(4, 12), 4]]))[0]
    assert row[1] > row[2] > row[4], "item 1 was ten away from the oldest that is looked at"


def test_popularity_never_reorders_counts() -> None:
    for count in (1, 1000, 2**22):
        followers = sparse.csr_array(np.array([[count, count + 1, count], [0, 0, 0], [0, 0, 0]]))
        floor = LastItemNeighbour(followers, np.array([10**9, 1, 0]))
        row = floor.scorer()(Ragged.from_rows([[0]]))[0]
        assert row[1] > row[0] > row[2]


def test_an_empty_training_set() -> None:
    nothing = Ragged.from_rows([])
    for floor in (Popularity, LastItemNeighbour, CoOccurrenceFloor):
        scores = floor.from_sequences(nothing, 3).scorer()(Ragged.from_rows([[1], []]))
        assert scores.tolist() == [[0.0] * 3] * 2


def test_a_large_catalog_stays_sparse() -> None:
    n_items = 600_000
    floor = LastItemNeighbour.from_sequences(Ragged.from_rows([[0, n_items - 1]]), n_items)
    scores = floor.scorer()(Ragged.from_rows([[5, 0]]))
    assert floor.followers.nnz == 1
    assert scores.shape == (1, n_items)
    assert scores.argmax().item() == n_items - 1


def test_text_neighbour_is_a_cosine() -> None:
    vectors = torch.tensor([[2.0, 0.0], [3.0, 4.0], [0.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    floor = TextNeighbour(vectors)
    scores = floor.scorer()(Ragged.from_rows([[1, 0], [], [1], [3]]))
    assert scores.dtype == torch.float32
    expected = [[1, 0.6, 0, 0], [0, 0, 0, 0], [0.6, 1, -0.8, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32))


def test_floors_are_recommenders() -> None:
    for floor in (
        Popularity.from_sequences(TRAIN, N_ITEMS),
        LastItemNeighbour.from_sequences(TRAIN, N_ITEMS),
        TextNeighbour(torch.eye(N_ITEMS)),
    ):
        assert isinstance(floor, Recommender)
        assert floor.n_items == N_ITEMS
        assert floor.scorer()(Ragged.from_rows([])).shape == (0, N_ITEMS)


def test_items_outside_the_catalog() -> None:
    for floor in (Popularity, LastItemNeighbour, CoOccurrenceFloor):
        with pytest.raises(DataError, match=r"item 3 is outside the catalog of 3 items \(0\.\.2\)"):
            floor.from_sequences(TRAIN, 3)
    outside = Ragged.from_rows([[9]])
    with pytest.raises(DataError, match="item 9 is outside"):
        LastItemNeighbour.from_sequences(TRAIN, N_ITEMS).scorer()(outside)
    with pytest.raises(DataError, match="item 9 is outside"):
        TextNeighbour(torch.eye(N_ITEMS)).scorer()(outside)
    with pytest.raises(DataError, match=r"\[3\]; pass \[N, D\]"):
        TextNeighbour(torch.ones(3))
