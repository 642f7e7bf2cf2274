"""Counts of pairs against a loop over every pair, and the choice of their weights."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from l2rec.data.ragged import Ragged
from l2rec.metrics import expected_ranks
from l2rec.modules import cooccurrence
from l2rec.modules.cooccurrence import CoOccurrence, Weights, choose, text_neighbors

N = 9
OPTIONS: dict[str, Any] = {"window": 3, "decay": 0.5, "newest": 2, "fade": 0.5, "rarity": 0.3}


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
    """[N, N] what counts are divided by."""
    n = np.array([max(1, sum(row.count(i) for row in rows)) for i in range(N)])
    return n[:, None] ** 0.5 * n[None, :] ** OPTIONS["rarity"]


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


def test_pairs_take_little_more_memory_than_their_numbers() -> None:
    """As docs/scaling.md says it: 31 bytes a pair."""
    users, length, n = 3000, 30, 20_000
    items = np.random.default_rng(0).integers(n, size=users * length, dtype=np.int32)
    rows = Ragged(items, np.arange(0, len(items) + 1, length, dtype=np.int64))
    pairs = 2 * users * sum(length - distance for distance in range(1, 11))
    found = CoOccurrence(n)
    found.count(Ragged.from_rows([[0, 1]]))  # imports what it needs
    tracemalloc.start()  # sees what numpy allocates
    try:
        found.count(rows)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found.items) > pairs / 2
    assert peak < 36 * pairs


def test_nothing_is_recalled_before_anything_is_counted_or_for_an_item_that_came_later() -> None:
    histories = Ragged.from_rows([[1, 2], [N + 3]])
    assert CoOccurrence(N, **OPTIONS).recall(histories).nnz == 0
    later = counted([[1, 2, 3]]).recall(Ragged.from_rows([[N + 3], [2, N + 3]])).toarray()
    assert not later[0].any()
    np.testing.assert_allclose(later[1][[1, 3]], [0.5, 0.5], rtol=1e-6)


def test_counts_follow_what_is_counted_and_what_is_loaded() -> None:
    first, second = random_rows(1), random_rows(2)
    found, histories = counted(first), Ragged.from_rows([[1, 2], [3]])
    before = found.recall(histories).toarray()
    found.count(Ragged.from_rows(second))
    after = found.recall(histories).toarray()
    np.testing.assert_array_equal(after, counted(second).recall(histories).toarray())
    assert not np.allclose(before, after)
    saved = counted(first)
    for name in found.sized_by_data:
        setattr(found, name, torch.empty_like(getattr(saved, name)))
    found.load_state_dict(saved.state_dict())
    np.testing.assert_array_equal(found.recall(histories).toarray(), before)


@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize("most", [3, 20])
def test_text_neighbors_are_what_a_loop_finds(
    most: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cooccurrence, "TEXT_NEIGHBORS", most)
    monkeypatch.setattr(cooccurrence, "BLOCK_SCORES", block)
    monkeypatch.setattr(cooccurrence, "TEXT_ROWS", 2)
    vectors = torch.nn.functional.normalize(torch.randn(N, 4, dtype=torch.float64), dim=-1)
    found = text_neighbors(vectors).toarray()
    for i in range(N):
        others = sorted(
            (j for j in range(N) if j != i), key=lambda j: -float(vectors[i] @ vectors[j])
        )
        kept = others[:most]
        each = [math.exp(float(vectors[i] @ vectors[j]) / 0.05) for j in kept]
        expected = np.zeros(N)
        expected[kept] = np.array(each) / sum(each)
        np.testing.assert_allclose(found[i], expected, rtol=1e-9)


def test_texts_speak_for_an_item_that_was_never_seen() -> None:
    """C + 0.2 K; without counts K alone, in both directions."""
    rows = [[0, 1, 2], [2, 3], [1, 4]]
    vectors = torch.nn.functional.normalize(torch.randn(N, 4), dim=-1)
    alike = text_neighbors(vectors)
    found = CoOccurrence(N, **OPTIONS)
    found.count(Ragged.from_rows(rows), alike)
    expected = literal_counts(rows) / often(rows) + 0.2 * alike.toarray()
    np.testing.assert_allclose(found.counts().toarray(), expected, rtol=1e-6)
    recalled = found.recall(Ragged.from_rows([[N - 1]])).toarray()[0]
    np.testing.assert_allclose(recalled, 0.2 * alike.toarray()[N - 1], rtol=1e-6)
    assert recalled.sum() == pytest.approx(0.2)


@pytest.mark.parametrize("weights", [Weights(0.7, -3.0), Weights(0.0), Weights(2.0)])
def test_what_is_added(weights: Weights) -> None:
    met = torch.tensor([[0.0, 1.5, 0.2], [3.0, 0.0, 0.1]])
    seen = torch.tensor([[True, False, False], [False, False, True]])
    found = weights.added(met, seen)
    for row in range(2):
        for item in range(3):
            near = weights.near * float(met[row, item])
            expected = weights.repeat if seen[row, item] else near
            assert float(found[row, item]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("block", [1, 3 * N, 10**6])
def test_the_best_weights_are_chosen(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the blocks: what a loop over users and weights finds."""
    monkeypatch.setattr("l2rec.modules.cooccurrence.BLOCK_SCORES", block)
    rng = np.random.default_rng(3)
    users = 40
    histories = Ragged.from_rows(rng.integers(N, size=(users, 1)))
    own = torch.from_numpy(rng.normal(size=(users, N)))
    met = torch.from_numpy(rng.exponential(size=(users, N)))
    seen = torch.zeros(users, N, dtype=torch.bool)
    seen[:, 0] = True
    own[:, 0] = -9.0
    # What is sought stands out of both together, and is never in the history.
    targets = (own + 2 * met).argmax(1).numpy()
    tried = [Weights(0.0), Weights(2.0), Weights(50.0), Weights(2.0, repeat=9.0)]
    at, told = iter(range(users)), []

    def parts(rows: Ragged) -> tuple[Tensor, Tensor, Tensor]:
        some = [next(at) for _ in range(len(rows))]
        return own[some], met[some], seen[some]

    best = choose(
        parts, N, histories, targets, tried, lambda done, total: told.append((done, total))
    )
    assert told[-1] == (users, users)

    def ndcg(weights: Weights) -> float:
        total = 0.0
        for user in range(users):
            scores = own[user] + weights.added(met[user], seen[user])
            rank = 1 + int((scores > scores[targets[user]]).sum())
            total += 1 / math.log2(1 + rank) if rank <= 10 else 0.0
        return total

    assert best == max(tried, key=ndcg) == Weights(2.0)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_cells_that_no_weight_moves_are_ranked_once(share: float) -> None:
    """Ranks are those of the dense sum, ties and all, whatever share of the cells is moved."""
    made = torch.Generator().manual_seed(7)
    users, items = 9, 50
    own = torch.randint(6, (users, items), generator=made).float()
    own[4] = 1.0
    met = torch.randint(1, 4, (users, items), generator=made).float() / 2
    met *= torch.rand(users, items, generator=made) < share
    seen = torch.rand(users, items, generator=made) < share / 2
    wanted = torch.randint(items, (users,), generator=made)
    tried = [Weights(near, repeat) for repeat in (-8.0, 0.0, 2.0) for near in (0.0, 0.5, 2.0)]
    found = list(cooccurrence._ranks(own, met, seen, wanted, tried))
    for weights, ranks in zip(tried, found, strict=True):
        dense = expected_ranks(own + weights.added(met, seen), wanted)
        assert torch.equal(ranks, dense) and ranks.dtype == dense.dtype
    with pytest.raises(ValueError, match="NaN among the scores of row 2"):
        next(
            cooccurrence._ranks(
                own.index_fill(0, torch.tensor(2), math.nan), met, seen, wanted, tried
            )
        )


def test_of_many_users_some_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cooccurrence, "CHOSEN_ON", 3)
    histories = Ragged.from_rows([[user] for user in range(11)])
    looked: list[int] = []

    def parts(rows: Ragged) -> tuple[Tensor, Tensor, Tensor]:
        looked.extend(rows.values.tolist())
        scores = torch.zeros(len(rows), 11)
        return scores, scores, torch.zeros_like(scores, dtype=torch.bool)

    choose(parts, 11, histories, np.zeros(11, dtype=np.int64), [Weights(1.0)])
    assert looked == [0, 5, 10]
