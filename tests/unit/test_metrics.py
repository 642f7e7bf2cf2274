"""Metrics against a literal reference, against ranx, and against numbers worked out by hand."""

from __future__ import annotations

import math
import warnings

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l2rec import metrics as module
from l2rec.data.ragged import Ragged
from l2rec.metrics import (
    average_popularity,
    coverage,
    expected_ranks,
    items_ahead_among,
    novelty,
    popularity_bias,
    rank_values,
    ranking_metrics,
)


def reference_rank(scores: list[float], target: int, exclude: list[int]) -> float:
    """The definition, one item at a time."""
    rank = 1.0
    for item, score in enumerate(scores):
        if item == target or item in exclude:
            continue
        if score > scores[target]:
            rank += 1.0
        elif score == scores[target]:
            rank += 0.5
    return rank


@st.composite
def rankings(draw: st.DrawFn) -> tuple[list[list[float]], list[int], list[list[int]]]:
    n_items = draw(st.integers(1, 12))
    rows = draw(st.integers(1, 9))
    # Few distinct values: ties everywhere. Infinite ones are what blocked items score.
    value = st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 0.25, 1e-42, 3.0, math.inf])
    item = st.integers(0, n_items - 1)
    scores = [draw(st.lists(value, min_size=n_items, max_size=n_items)) for _ in range(rows)]
    targets = [draw(item) for _ in range(rows)]
    histories = [draw(st.lists(item, max_size=15)) for _ in range(rows)]  # with repeats
    return scores, targets, histories


@given(rankings())
@settings(deadline=None, max_examples=300)
def test_expected_ranks_equal_the_definition(
    case: tuple[list[list[float]], list[int], list[list[int]]],
) -> None:
    rows, targets, histories = case
    scores = torch.tensor(rows, dtype=torch.float32)
    plain = expected_ranks(scores, torch.tensor(targets))
    masked = expected_ranks(scores, torch.tensor(targets), Ragged.from_rows(histories))
    exact = [row.tolist() for row in scores]
    assert plain.dtype == masked.dtype == torch.float64
    assert plain.tolist() == [
        reference_rank(row, target, []) for row, target in zip(exact, targets, strict=True)
    ]
    assert masked.tolist() == [
        reference_rank(row, target, history)
        for row, target, history in zip(exact, targets, histories, strict=True)
    ]


def test_counting_on_the_processor_equals_counting_on_a_device() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 30, (37, 101), generator=generator).float()
    limits = scores.gather(1, torch.randint(0, 101, (37, 1), generator=generator))
    here, there = module._at_least_and_above_cpu, module._at_least_and_above
    assert torch.equal(here(scores, limits), there(scores, limits))
    assert torch.equal(here(scores.T[:37], limits), there(scores.T[:37], limits))


def test_a_constant_scorer_ranks_at_chance() -> None:
    for n_items in (1, 2, 7, 1000):
        scores = torch.full((5, n_items), 0.3)
        targets = torch.arange(5) % n_items
        assert expected_ranks(scores, targets).tolist() == [(n_items + 1) / 2] * 5


def test_views_and_gradients_are_accepted() -> None:
    row = torch.tensor([3.0, 1.0, 2.0], requires_grad=True)
    ranks = expected_ranks(row.expand(3, -1), torch.tensor([0, 1, 2]))
    assert ranks.tolist() == [1.0, 3.0, 2.0]
    assert expected_ranks(row.detach()[:, None].T, torch.tensor([1])).tolist() == [3.0]


def test_masking_keeps_the_target_and_counts_repeats_once() -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0, 2.0]])
    target = torch.tensor([3])
    assert expected_ranks(scores, target).item() == 4.5
    assert expected_ranks(scores, target, Ragged.from_rows([[0, 0, 0]])).item() == 3.5
    assert expected_ranks(scores, target, Ragged.from_rows([[3, 0, 3]])).item() == 3.5
    assert expected_ranks(scores, target, Ragged.from_rows([[4, 0, 1, 2]])).item() == 1.0
    assert expected_ranks(scores, target, Ragged.from_rows([[]])).item() == 4.5


def test_no_rows() -> None:
    empty, none = torch.empty((0, 4)), torch.empty(0, dtype=torch.int64)
    assert expected_ranks(empty, none, Ragged.from_rows([])).shape == (0,)


def test_nan_is_reported_with_its_row() -> None:
    scores = torch.zeros((4, 6))
    scores[2, 5] = torch.nan
    with pytest.raises(ValueError, match="NaN among the scores of row 2"):
        expected_ranks(scores, torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("targets", "exclude", "message"),
    [
        ([0], None, r"scores \[2, 3\] and targets \[1\]"),
        ([0, 3], None, r"target 3 is outside the 3 scored items \(0\.\.2\)"),
        ([-1, 0], None, "target -1 is outside"),
        ([0, 0], [[1]], "1 rows of items for 2 rows"),
        ([0, 0], [[1], [7]], "item 7 is outside"),
    ],
)
def test_inputs_that_do_not_fit(
    targets: list[int], exclude: list[list[int]] | None, message: str
) -> None:
    ragged = None if exclude is None else Ragged.from_rows(exclude)
    with pytest.raises(ValueError, match=message):
        expected_ranks(torch.zeros((2, 3)), torch.tensor(targets), ragged)


def test_items_ahead_among_reads_listed_items_only() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]])
    items = Ragged.from_rows([[2, 1, 2], [0, 1, 2]])
    assert items_ahead_among(scores, torch.tensor([0, 1]), items).tolist() == [2.0, 1.0]


def test_metrics_equal_ranx() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it and its compiler import is not ours to judge
        import ranx
    generator = np.random.default_rng(7)
    users, n_items = 80, 60
    scores = np.stack([generator.permutation(n_items) for _ in range(users)]).astype(np.float32)
    targets = generator.integers(0, n_items, users)
    histories = [generator.integers(0, n_items, generator.integers(0, 12)) for _ in range(users)]
    names = [f"{name}@{k}" for name in ("recall", "ndcg") for k in (1, 5, 10, 20)] + ["mrr"]
    qrels = ranx.Qrels({f"u{row}": {str(target): 1} for row, target in enumerate(targets)})
    for masked in (False, True):
        runs = {}
        for row in range(users):
            hidden = set(histories[row].tolist()) - {int(targets[row])} if masked else set()
            kept = {str(i): float(s) for i, s in enumerate(scores[row]) if i not in hidden}
            runs[f"u{row}"] = kept
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = ranx.evaluate(qrels, ranx.Run(runs), names)
        ranks = expected_ranks(
            torch.from_numpy(scores),
            torch.from_numpy(targets),
            Ragged.from_rows(histories) if masked else None,
        ).numpy()
        ours = ranking_metrics(ranks, ks=(1, 5, 10, 20))
        assert ours.keys() == set(names)
        assert ours == pytest.approx({name: float(theirs[name]) for name in names}, abs=1e-12)


def test_ranking_metrics_by_hand() -> None:
    # log2(2) = 1, log2(4) = 2; 5.5 is beyond the cut at 5 and within it at 10.
    got = ranking_metrics(np.array([1.0, 3.0, 5.5, 50.0]), ks=(5, 10))
    assert got == pytest.approx(
        {
            "recall@5": 2 / 4,
            "recall@10": 3 / 4,
            "ndcg@5": (1 + 1 / 2) / 4,
            "ndcg@10": (1 + 1 / 2 + 1 / math.log2(6.5)) / 4,
            "mrr": (1 + 1 / 3 + 1 / 5.5 + 1 / 50) / 4,
        }
    )


@pytest.mark.parametrize("metric", ["recall", "recall@", "recall@0", "ndcg@-1", "map@10", "mrr@5"])
def test_unknown_metrics(metric: str) -> None:
    with pytest.raises(ValueError, match="unknown metric"):
        rank_values(np.array([1.0]), metric)


@pytest.mark.parametrize("rank", [0.0, 0.5, -3.0, math.nan])
def test_ranks_count_from_one(rank: float) -> None:
    with pytest.raises(ValueError, match="at row 1: ranks count from 1"):
        rank_values(np.array([1.0, rank]), "mrr")


def test_no_ranks_have_no_mean() -> None:
    with pytest.raises(ValueError, match="0 ranks have no mean"):
        ranking_metrics(np.array([]))


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 0, 3], "row 0 has no relevant item"),
        ([0, 2, 2, 3], "row 1 has no relevant item"),
        ([0, 2, 1, 3], "row 1 has no relevant item"),
        ([0, 3, 3], "row 1 has no relevant item"),
        ([1, 3], "from 0 to the 3 ranks"),
        ([0, 2], "from 0 to the 3 ranks"),
        ([0, 4], "from 0 to the 3 ranks"),
        ([], "from 0 to the 3 ranks"),
    ],
)
def test_every_user_needs_a_relevant_item(offsets: list[int], message: str) -> None:
    ranks, given = np.array([1.0, 4.0, 2.0]), np.array(offsets, dtype=np.int64)
    for metric in ("mrr", "ndcg@10", "recall@10"):
        with pytest.raises(ValueError, match=message):
            rank_values(ranks, metric, given)
    with pytest.raises(ValueError, match=message):
        ranking_metrics(ranks, offsets=given)


def test_lists_by_hand() -> None:
    top, counts = np.array([[0, 1], [0, -1]]), np.array([4, 2, 0, 2])
    assert coverage(top, 4) == 0.5
    assert novelty(top, counts) == pytest.approx((1 + 2 + 1) / 3)
    # Never seen counts as seen once: log2(8) = 3 bits, not infinitely many.
    assert novelty(np.array([[2]]), counts) == pytest.approx(3.0)
    assert coverage(np.full((3, 2), -1), 4) == 0.0


def test_lists_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="n_items=0"):
        coverage(np.array([[0]]), 0)
    with pytest.raises(ValueError, match="item 4 is outside"):
        coverage(np.array([[4]]), 4)
    with pytest.raises(ValueError, match="0 listed items"):
        novelty(np.array([[-1]]), np.array([1]))
    with pytest.raises(ValueError, match="0 training events"):
        novelty(np.array([[0]]), np.array([0]))
    with pytest.raises(ValueError, match="item 1 is outside"):
        novelty(np.array([[1]]), np.array([3]))


def test_popularity_by_hand() -> None:
    counts = np.array([4, 2, 0, 2])
    histories = Ragged.from_rows([[1, 3, 1], [2, 3]])  # means 2 and 1
    assert average_popularity(histories, counts) == 1.5
    top = np.array([[0, 1], [0, -1]])  # means 3 and 4
    assert popularity_bias(top, histories, counts) == pytest.approx(3.5 / 1.5 - 1)
    same = np.array([[1, 3], [3, 2]])
    assert popularity_bias(same, histories, counts) == 0.0
    assert popularity_bias(np.array([[2], [2]]), histories, counts) == -1.0


def test_popularity_equals_a_table_of_events() -> None:
    """A second opinion: grouped means of one long table, as a data frame computes them."""
    generator = np.random.default_rng(5)
    counts = generator.integers(0, 50, 40)
    top = generator.integers(0, 40, (30, 10))
    rows = [generator.integers(0, 40, generator.integers(1, 20)) for _ in range(30)]

    def mean_of_means(user: list[int], item: list[int]) -> float:
        events = pl.DataFrame({"user": user, "events": counts[item]})
        of_users = events.group_by("user").agg(pl.col("events").mean())
        return float(of_users["events"].mean())

    listed = mean_of_means(np.repeat(np.arange(30), 10).tolist(), top.reshape(-1).tolist())
    users = [user for user, row in enumerate(rows) for _ in row]
    chosen = mean_of_means(users, np.concatenate(rows).tolist())
    assert average_popularity(Ragged.from_rows(top), counts) == pytest.approx(listed)
    got = popularity_bias(top, Ragged.from_rows(rows), counts)
    assert got == pytest.approx(listed / chosen - 1)


def test_popularity_that_has_no_mean() -> None:
    counts, rows = np.array([1, 0]), Ragged.from_rows([[0], [1]])
    with pytest.raises(ValueError, match="0 lists, 0 of them empty"):
        average_popularity(Ragged.from_rows([]), counts)
    with pytest.raises(ValueError, match="2 lists, 1 of them empty"):
        popularity_bias(np.array([[0], [-1]]), rows, counts)
    with pytest.raises(ValueError, match="item 2 is outside"):
        average_popularity(Ragged.from_rows([[2]]), counts)
    with pytest.raises(ValueError, match="1 lists for 2 histories"):
        popularity_bias(np.array([[0]]), rows, counts)
    with pytest.raises(ValueError, match="with 0 training events an item"):
        popularity_bias(np.array([[0]]), Ragged.from_rows([[1]]), counts)
