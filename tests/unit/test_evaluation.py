"""The evaluator: exact, block by block, on disk and back, and the tests between runs."""

from __future__ import annotations

import math
import tracemalloc
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from l2rec.data.ragged import Ragged
from l2rec.errors import CheckpointError, ConfigError, DataError, TrainingError
from l2rec.evaluation.ranking import Evaluation, evaluate, evaluate_each, top_k
from l2rec.evaluation.ranks import Ranks, aligned, aligned_ranks, read_ranks, write_ranks
from l2rec.evaluation.significance import (
    by_segment,
    paired_test,
    paired_values_test,
    without_rounding,
)
from l2rec.metrics import expected_ranks, rank_values, ranking_metrics
from l2rec.protocols import Scorer


class Table:
    """Scores looked up by a user's last item: ``scores`` [N, N]. Remembers its calls."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores
        self.blocks: list[int] = []

    @property
    def n_items(self) -> int:
        return self.scores.shape[1]

    def scorer(self) -> Scorer:
        def score(histories: Ragged) -> Tensor:
            assert torch.is_inference_mode_enabled()
            self.blocks.append(len(histories))
            return self.scores[[int(histories[row][-1]) for row in range(len(histories))]]

        return score


def tied_table(n_items: int = 40, seed: int = 0) -> Table:
    generator = torch.Generator().manual_seed(seed)
    return Table(torch.randint(0, 12, (n_items, n_items), generator=generator).float())


def some_users(
    users: int = 100, n_items: int = 40, seed: int = 1
) -> tuple[Ragged, np.ndarray[Any, np.dtype[np.int64]]]:
    generator = np.random.default_rng(seed)
    rows = [generator.integers(0, n_items, generator.integers(1, 15)) for _ in range(users)]
    return Ragged.from_rows(rows), generator.integers(0, n_items, users)


def evaluation_of(ranks: Sequence[float], masked: Sequence[float] | None = None) -> Evaluation:
    """An Evaluation with the given ranks in a catalog of 100, one item listed for everyone."""
    count = len(ranks)
    return Evaluation(
        ranks=np.array(ranks, dtype=np.float64),
        ranks_masked=np.array(ranks if masked is None else masked, dtype=np.float64),
        users=np.arange(count),
        top=np.zeros((count, 20), dtype=np.int32),
        targets=np.arange(count) + 1,
        n_items=100,
    )


# -------------------------------------------------------------------------------- evaluate


def test_evaluate_ranks_every_user() -> None:
    table, (histories, targets) = tied_table(), some_users()
    result = evaluate(table, histories, targets, batch_size=16)
    last = [int(histories[row][-1]) for row in range(len(histories))]
    scores, wanted = table.scores[last], torch.from_numpy(targets)
    assert result.ranks.tolist() == expected_ranks(scores, wanted).tolist()
    assert result.ranks_masked.tolist() == expected_ranks(scores, wanted, histories).tolist()
    best = np.argsort(-scores.numpy(), axis=1, kind="stable")[:, :20]  # ties: lower item first
    assert np.array_equal(result.top, best)
    assert result.targets.tolist() == targets.tolist()
    assert result.users.tolist() == list(range(100))
    dtypes = [result.ranks.dtype, result.ranks_masked.dtype, result.users.dtype, result.top.dtype]
    assert dtypes == [np.float64, np.float64, np.int64, np.int32]


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_results_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    table, (histories, targets) = tied_table(), some_users()
    whole = evaluate(table, histories, targets, batch_size=100)
    other = evaluate(table, histories, targets, batch_size=batch_size)
    assert other.metrics() == whole.metrics()
    for name in ("ranks", "ranks_masked", "top"):
        assert np.array_equal(getattr(other, name), getattr(whole, name))


def test_the_scorer_never_sees_more_than_one_block() -> None:
    table, (histories, targets) = tied_table(), some_users()
    done: list[int] = []
    evaluate(table, histories, targets, batch_size=30, progress=done.append)
    assert table.blocks == [30, 30, 30, 10]
    assert done == [30, 60, 90, 100]


def test_a_constant_scorer_scores_at_chance() -> None:
    histories, targets = some_users()
    result = evaluate(Table(torch.ones((40, 40))), histories, targets)
    assert set(result.ranks.tolist()) == {20.5}
    distinct = [len(set(histories[row].tolist()) - {targets[row]}) for row in range(100)]
    assert result.ranks_masked.tolist() == [(40 - hidden + 1) / 2 for hidden in distinct]


def test_a_target_in_the_history_stays_in_the_masked_ranking() -> None:
    scores = torch.tensor([[9.0, 5.0, 7.0]] * 3)
    result = evaluate(Table(scores), Ragged.from_rows([[0, 0, 1, 0]]), np.array([1]))
    assert result.ranks.tolist() == [3.0]
    assert result.ranks_masked.tolist() == [2.0]  # item 0 once, item 2 never, item 1 kept


def test_a_catalog_smaller_than_the_list() -> None:
    result = evaluate(Table(torch.eye(3)), Ragged.from_rows([[2], [0]]), np.array([1, 0]))
    assert result.top.tolist() == [[2, 0, 1], [0, 1, 2]]
    assert result.metrics()["coverage@10"] == 1.0


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any tensor had."""

    largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor):
                self.largest = max(self.largest, one.numel())
        return out


class Products:
    """Scores by inner product; fails if an earlier block is still held."""

    def __init__(self, n_items: int) -> None:
        self.vectors = torch.randn((n_items, 4), generator=torch.Generator().manual_seed(0))
        self.n_items = n_items
        self.earlier: weakref.ref[Tensor] | None = None

    def scorer(self) -> Scorer:
        def score(histories: Ragged) -> Tensor:
            assert self.earlier is None or self.earlier() is None
            scores = self.vectors[histories.values[histories.offsets[1:] - 1]] @ self.vectors.T
            self.earlier = weakref.ref(scores)
            return scores

        return score


def test_memory_holds_one_block_never_users_by_items() -> None:
    users, n_items, batch_size = 3000, 2000, 50
    histories, targets = some_users(users, n_items)
    recommender = Products(n_items)

    def rank_all() -> None:
        evaluate(recommender, histories, targets, batch_size=batch_size)
        top_k(recommender, histories, 10, exclude=histories, batch_size=batch_size)

    with LargestTensor() as tensors:
        rank_all()
    assert tensors.largest == batch_size * n_items
    tracemalloc.start()  # sees what numpy allocates
    try:
        rank_all()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < users * n_items  # not even one byte for each user and item


def test_the_metrics_of_an_evaluation() -> None:
    result = evaluation_of([1, 4, 30], [1, 3, 6])
    got = result.metrics(ks=(5,))
    assert got.keys() == {
        "recall@5", "ndcg@5", "mrr", "recall@5_masked", "ndcg@5_masked", "mrr_masked",
        "coverage@10",
    }  # fmt: skip
    assert got["recall@5"] == pytest.approx(2 / 3)
    assert got["mrr_masked"] == pytest.approx((1 + 1 / 3 + 1 / 6) / 3)
    assert got["coverage@10"] == 1 / 100
    assert "ndcg@20_masked" in result.metrics()


def test_no_users() -> None:
    nothing = evaluate(tied_table(), Ragged.from_rows([]), np.array([], dtype=np.int64))
    assert len(nothing) == 0
    assert nothing.top.shape == (0, 20)
    with pytest.raises(ValueError, match="0 ranks"):
        nothing.metrics()


def test_inputs_that_do_not_fit() -> None:
    table, (histories, targets) = tied_table(), some_users()
    with pytest.raises(DataError, match="100 histories, 99 targets and 99 users"):
        evaluate(table, histories, targets[:-1])
    with pytest.raises(DataError, match="100 histories, 100 targets and 1 users"):
        evaluate(table, histories, targets, users=np.array([3]))
    with pytest.raises(DataError, match=r"target item 40 is outside the catalog of 40 items"):
        evaluate(table, histories, np.full(100, 40))
    with pytest.raises(DataError, match="history item -2 is outside"):
        evaluate(table, Ragged.from_rows([[-2]]), np.array([0]))
    with pytest.raises(ConfigError, match="batch_size=0"):
        evaluate(table, histories, targets, batch_size=0)


def test_scores_that_break_the_contract() -> None:
    histories, targets = some_users()
    scores = tied_table().scores
    scores[int(histories[57][-1]), 11] = torch.nan
    first = min(row for row in range(100) if histories[row][-1] == histories[57][-1])
    with pytest.raises(TrainingError, match=f"NaN among the scores of row {first}: "):
        evaluate(Table(scores), histories, targets, batch_size=8)
    with pytest.raises(ValueError, match=r"float64 for \[100, 40\] torch.float32"):
        evaluate(Table(torch.ones((40, 40), dtype=torch.float64)), histories, targets)
    short = Table(torch.ones((40, 39)))
    short.__class__ = type("Short", (Table,), {"n_items": 40})
    with pytest.raises(ValueError, match=r"returned \[100, 39\]"):
        evaluate(short, histories, targets)


# ----------------------------------------------------------------------------------- top_k


def fixed(rows: list[list[float]]) -> Scorer:
    """A bare scorer: a user's row is the history's only item."""
    scores = torch.tensor(rows, dtype=torch.float32)
    return lambda histories: scores[histories.values.astype(np.int64)]


def test_top_k_orders_ties_by_item() -> None:
    scorer = fixed([[1, 3, 3, 0, 3], [2, 2, 2, 2, 2], [4, 3, 2, 1, 0]])
    users = Ragged.from_rows([[0], [1], [2]])
    for k in range(1, 6):
        got = top_k(scorer, users, k)
        assert got.items.tolist() == [[1, 2, 4, 0, 3][:k], [0, 1, 2, 3, 4][:k], [0, 1, 2, 3, 4][:k]]
        assert got.scores[0].tolist() == [3, 3, 3, 1, 0][:k]
    assert (got.items.dtype, got.scores.dtype) == (np.int64, np.float32)


def test_top_k_fills_up_where_items_run_out() -> None:
    scorer, user = fixed([[1, 5, 4, 2]]), Ragged.from_rows([[0]])
    got = top_k(scorer, user, 3, exclude=Ragged.from_rows([[1, 0, 1]]))
    assert got.items.tolist() == [[2, 3, -1]]
    assert got.scores.tolist() == [[4, 2, -math.inf]]
    got = top_k(scorer, user, 4, candidates=np.array([3, 1, 3]))
    assert got.items.tolist() == [[1, 3, -1, -1]]
    got = top_k(scorer, user, 2, candidates=np.array([3, 1]), exclude=Ragged.from_rows([[1]]))
    assert got.items.tolist() == [[3, -1]]
    got = top_k(scorer, user, 2, candidates=np.array([], dtype=np.int64))
    assert got.items.tolist() == [[-1, -1]]
    assert top_k(fixed([[0.0, -math.inf]]), user, 2).items.tolist() == [[0, -1]]


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_top_k_equals_a_sort(data: st.DataObject) -> None:
    n_items = data.draw(st.integers(1, 10))
    item = st.integers(0, n_items - 1)
    row = st.lists(st.sampled_from([-1.0, 0.0, 0.5]), min_size=n_items, max_size=n_items)
    rows = data.draw(st.lists(row, min_size=1, max_size=6))
    exclude = [data.draw(st.lists(item, max_size=6)) for _ in rows]
    candidates = data.draw(st.none() | st.lists(item, max_size=8))
    k = data.draw(st.integers(1, n_items))
    got = top_k(
        fixed(rows),
        Ragged.from_rows([[user] for user in range(len(rows))]),
        k,
        exclude=Ragged.from_rows(exclude),
        candidates=None if candidates is None else np.array(candidates, dtype=np.int64),
        batch_size=data.draw(st.integers(1, 7)),
    )
    for user, scores in enumerate(rows):
        pool = set(range(n_items)) if candidates is None else set(candidates)
        best = sorted(pool - set(exclude[user]), key=lambda i: (-scores[i], i))[:k]
        assert got.items[user].tolist() == best + [-1] * (k - len(best))
        filled = [scores[i] for i in best] + [-math.inf] * (k - len(best))
        assert got.scores[user].tolist() == filled


def test_top_k_accepts_a_recommender_and_leaves_its_scores_alone() -> None:
    table, (histories, _) = tied_table(), some_users()
    before = table.scores.clone()
    got = top_k(table, histories, 7, exclude=histories, batch_size=33)
    assert table.blocks == [33, 33, 33, 1]
    assert torch.equal(table.scores, before)
    for row in range(len(histories)):
        assert not set(got.items[row].tolist()) & set(histories[row].tolist())
    callable_model = type("Model", (Table,), {"__call__": lambda self: 1 / 0})(before)
    assert np.array_equal(top_k(callable_model, histories, 7, exclude=histories).items, got.items)
    assert top_k(table, Ragged.from_rows([]), 7).items.shape == (0, 7)


def test_a_bare_scorer_is_asked_for_few_rows_until_its_catalog_is_known() -> None:
    table, (histories, _) = tied_table(), some_users()
    done: list[int] = []
    got = top_k(table.scorer(), histories, 7, progress=done.append)
    assert (table.blocks, done) == ([16, 84], [16, 100])
    assert np.array_equal(got.items, top_k(table, histories, 7).items)


def test_top_k_limits() -> None:
    table, user = tied_table(), Ragged.from_rows([[0]])
    for source in (table, table.scorer()):
        with pytest.raises(DataError, match="k=41; choose from 1 to 40, the number of items"):
            top_k(source, user, 41)
        with pytest.raises(DataError, match="k=0; choose from 1 to"):
            top_k(source, user, 0)
    with pytest.raises(DataError, match="2 rows to exclude for 1 histories"):
        top_k(table, user, 1, exclude=Ragged.from_rows([[], []]))
    with pytest.raises(DataError, match="excluded item 40 is outside"):
        top_k(table, user, 1, exclude=Ragged.from_rows([[40]]))
    with pytest.raises(DataError, match="candidate item -1 is outside"):
        top_k(table, user, 1, candidates=np.array([-1]))
    with pytest.raises(TrainingError, match="NaN among the scores of row 0"):
        top_k(fixed([[0.0, math.nan]]), user, 1)


# --------------------------------------------------------------------------- ranks on disk


def test_several_scorers_in_one_pass() -> None:
    tables = {"a": tied_table(), "b": Table(-tied_table().scores)}
    histories, targets = some_users()
    asked: list[tuple[str, int]] = []

    def noted(name: str) -> Scorer:
        scorer = tables[name].scorer()

        def score(rows: Ragged) -> torch.Tensor:
            asked.append((name, id(rows)))
            return scorer(rows)

        return score

    scorers = {name: partial(noted, name) for name in tables}
    found = evaluate_each(40, scorers, histories, targets, batch_size=60)
    for name, table in tables.items():
        alone = evaluate(table, histories, targets)
        assert np.array_equal(found[name].ranks, alone.ranks)
        assert np.array_equal(found[name].ranks_masked, alone.ranks_masked)
        assert np.array_equal(found[name].top, alone.top)
    assert [name for name, _ in asked] == ["a", "b", "a", "b"]
    assert asked[0][1] == asked[1][1], "both are given the same block"


def test_ranks_round_trip(tmp_path: Path) -> None:
    table, (histories, targets) = tied_table(), some_users()
    result = evaluate(table, histories, targets, users=np.arange(100)[::-1])
    path = tmp_path / "run" / "ranks.parquet"
    ids = [f"user {user}" for user in range(100)]
    write_ranks(path, result, ids, fingerprint="100/40:abc", protocol="test")
    back = read_ranks(path)
    assert back.users == ids[::-1]  # by dense user int, not by row
    assert np.array_equal(back.ranks, result.ranks)
    assert np.array_equal(back.ranks_masked, result.ranks_masked)
    assert np.array_equal(back.targets, targets)
    assert back.top is not None and back.top.dtype == np.int32
    assert np.array_equal(back.top, result.top)
    assert (back.fingerprint, back.protocol) == ("100/40:abc", "test")
    assert [entry.name for entry in path.parent.iterdir()] == ["ranks.parquet"]


def test_ranks_of_nobody_and_of_a_small_catalog(tmp_path: Path) -> None:
    path = tmp_path / "ranks.parquet"
    write_ranks(path, evaluation_of([]), [])
    top = read_ranks(path).top
    assert top is not None and top.shape == (0, 20)
    result = evaluate(Table(torch.eye(3)), Ragged.from_rows([[2], [0]]), np.array([1, 0]))
    write_ranks(path, result, ["a", "b"])
    top = read_ranks(path).top
    assert top is not None and top.tolist() == [[2, 0, 1], [0, 1, 2]]


def test_ranks_from_before_lists_were_kept(tmp_path: Path) -> None:
    path = tmp_path / "ranks.parquet"
    write_ranks(path, evaluation_of([1, 2]), ["a", "b"], fingerprint="x")
    pq.write_table(pq.read_table(path).drop_columns(["top"]), path)
    old = read_ranks(path)
    assert old.top is None and old.ranks.tolist() == [1, 2] and old.fingerprint == "x"
    assert aligned(old, old).top is None


def test_a_failed_write_leaves_the_old_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ranks.parquet"
    write_ranks(path, evaluation_of([1, 2]), ["a", "b"])

    def full_disk(table: pa.Table, where: Path) -> None:
        where.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(CheckpointError, match="disk is full; nothing was replaced"):
        write_ranks(path, evaluation_of([3, 4]), ["a", "b"])
    assert read_ranks(path).ranks.tolist() == [1, 2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["ranks.parquet"]


def test_users_without_an_id(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="user int 1 for 1 user ids"):
        write_ranks(tmp_path / "ranks.parquet", evaluation_of([1, 2]), ["a"])


def test_files_that_hold_no_ranks(tmp_path: Path) -> None:
    path = tmp_path / "ranks.parquet"
    with pytest.raises(CheckpointError, match="holds no ranks"):
        read_ranks(path)
    write_ranks(path, evaluation_of([1, 2]), ["a", "b"])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="evaluate the run again"):
        read_ranks(path)
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(CheckpointError, match="holds no ranks"):
        read_ranks(path)
    pq.write_table(
        pa.table({"user": ["a"], "rank": [1.0], "rank_masked": [1.0], "target": [0]}), path
    )
    with pytest.raises(CheckpointError, match="fingerprint"):
        read_ranks(path)


def test_two_runs_are_aligned_by_user(tmp_path: Path) -> None:
    first, second = tmp_path / "a.parquet", tmp_path / "b.parquet"
    write_ranks(first, evaluation_of([1, 2, 3], [1, 1, 2]), ["a", "b", "c"])
    shuffled = evaluation_of([10, 20, 30], [5, 6, 7]).take(np.array([2, 0, 1]))
    write_ranks(second, shuffled, ["a", "b", "c"])
    a, b = read_ranks(first), read_ranks(second)
    assert [values.tolist() for values in aligned_ranks(a, b)] == [[1, 2, 3], [10, 20, 30]]
    masked = aligned_ranks(a, b, masked=True)
    assert [values.tolist() for values in masked] == [[1, 1, 2], [5, 6, 7]]
    c = aligned(a, b)
    assert c.users == a.users and c.targets.tolist() == a.targets.tolist()
    assert c.top is not None and c.top.shape == (3, 20)


def test_runs_that_cannot_be_paired(tmp_path: Path) -> None:
    path = tmp_path / "ranks.parquet"

    def stored(ids: list[str], **named: str) -> Ranks:
        write_ranks(path, evaluation_of([1.0] * len(ids)), ids, **named)
        return read_ranks(path)

    base = stored(["a", "b"])
    with pytest.raises(DataError, match="fingerprint '' against 'x'"):
        aligned_ranks(base, stored(["a", "b"], fingerprint="x"))
    with pytest.raises(DataError, match="protocol"):
        aligned_ranks(base, stored(["a", "b"], protocol="x"))
    with pytest.raises(DataError, match="2 and 3 ranked users, 2 in common"):
        aligned_ranks(base, stored(["a", "b", "c"]))
    twice = evaluation_of([1, 2]).take(np.array([0, 0, 1]))
    write_ranks(path, twice, ["a", "b"])
    same = read_ranks(path)
    assert aligned(same, same) is same, "with given splits, a user is ranked as often as tested"
    with pytest.raises(DataError, match="ranked twice"):
        aligned(same, same.take(np.array([2, 0, 1])))


# ---------------------------------------------------------------------- tests and segments


@pytest.mark.parametrize("metric", ["recall@10", "ndcg@10", "ndcg@5", "mrr"])
def test_paired_test_equals_scipy(metric: str) -> None:
    generator = np.random.default_rng(3)
    a, b = generator.integers(1, 30, 200) / 1.0, generator.integers(1, 30, 200) + 0.5
    got = paired_test(a, b, metric)
    values_a, values_b = rank_values(a, metric), rank_values(b, metric)
    theirs = stats.ttest_rel(values_a, values_b)
    assert got.t == pytest.approx(theirs.statistic)
    assert got.p == pytest.approx(theirs.pvalue)
    assert got.mean_a == pytest.approx(ranking_metrics(a)[metric])
    assert got.difference == pytest.approx(got.mean_a - got.mean_b)
    assert got.standard_error == pytest.approx(stats.sem(values_a - values_b))
    swapped = paired_test(b, a, metric)
    assert (swapped.t, swapped.p) == pytest.approx((-got.t, got.p))


def test_identical_runs_do_not_differ() -> None:
    ranks = np.array([1.0, 7.0, 300.0])
    got = paired_test(ranks, ranks.copy())
    assert (got.difference, got.standard_error, got.t, got.p) == (0.0, 0.0, 0.0, 1.0)


def test_the_same_difference_for_everyone() -> None:
    got = paired_test(np.ones(5), np.full(5, 11.0), "recall@10")
    assert (got.difference, got.t, got.p) == (1.0, math.inf, 0.0)


def test_rounding_is_no_difference() -> None:
    """Of users whose values add up to the same, the mean of the differences is 5e-18."""
    each = np.random.default_rng(0).random((7, 3))
    a, b = each.ravel(), np.roll(each, 1, axis=1).ravel()
    users = np.repeat(np.arange(7), 3)
    assert (a - b).mean() != 0
    got = paired_values_test(a, b, users)
    assert (got.difference, got.standard_error, got.t, got.p) == (0.0, 0.0, 0.0, 1.0)
    third = np.full(20, 0.3)
    for sums in (np.full(20, 0.1) + 0.2, np.where(np.arange(20) < 9, 0.1 + 0.2, 0.3)):
        assert (sums != third).any()
        got = paired_values_test(sums, third)
        assert (got.difference, got.standard_error, got.t, got.p) == (0.0, 0.0, 0.0, 1.0)
    surely = paired_values_test(third + 1e-9, third)
    assert (surely.difference, surely.p) == (pytest.approx(1e-9), 0.0)
    same = [np.full(n, 0.1) for n in range(2, 40)]
    assert any(values.var() > 0 for values in same)
    assert all(without_rounding(values) == (0.1, 0.0) for values in same)
    some = np.array([0.1, 0.2, 0.4])
    assert without_rounding(some) == (some.mean(), some.var(ddof=1))
    assert without_rounding(np.zeros(3)) == (0.0, 0.0)


def test_ranks_that_cannot_be_paired() -> None:
    with pytest.raises(DataError, match="3 and 2 ranks"):
        paired_test(np.ones(3), np.ones(2))
    with pytest.raises(DataError, match="2 or more users"):
        paired_test(np.ones(1), np.ones(1))


def test_segments() -> None:
    result = evaluation_of([1, 2, 40, 4], [1, 2, 5, 4])
    got = by_segment(result, np.array(["new", "old", "new", "old"]), ks=(5,))
    assert list(got) == ["new", "old"]
    assert got["new"]["count"] == got["old"]["count"] == 2
    assert got["new"]["recall@5"] == 0.5
    assert got["new"]["recall@5_masked"] == got["old"]["recall@5"] == 1.0
    assert got["old"]["mrr"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    with pytest.raises(DataError, match=r"labels \[1\] for 4 users"):
        by_segment(result, ["x"])


def test_values_of_one_user_are_not_independent() -> None:
    """Repeat each user's value: nothing more is known, so nothing may become more certain."""
    rng = np.random.default_rng(0)
    a, b = rng.random(30), rng.random(30) - 0.1
    once = paired_values_test(a, b, np.arange(30))
    plain, shuffled = paired_values_test(a, b), rng.permutation(120)
    repeated = [np.repeat(values, 4)[shuffled] for values in (a, b, np.arange(30))]
    again = paired_values_test(repeated[0], repeated[1], repeated[2].astype(int))
    for test in (once, again):
        found = (test.difference, test.standard_error, test.t, test.p)
        assert found == pytest.approx((plain.difference, plain.standard_error, plain.t, plain.p))
    with pytest.raises(DataError, match="needs 2 or more users"):
        paired_values_test(a, b, np.zeros(30, dtype=int))


def test_an_item_that_scores_minus_infinity_is_in_no_list() -> None:
    scores = torch.full((30, 30), -torch.inf)
    scores[:, [4, 9, 2]] = torch.tensor([3.0, 2.0, 1.0])
    found = evaluate(Table(scores), Ragged.from_rows([[0], [4]]), np.array([9, 5]))
    assert found.top[:, :3].tolist() == [[4, 9, 2]] * 2
    assert (found.top[:, 3:] == -1).all()
    assert found.ranks.tolist() == [2.0, 3 + (27 + 1) / 2]
