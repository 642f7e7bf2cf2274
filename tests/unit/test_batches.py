"""Plans hold every row once; batches hold what may be learned from and nothing later."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2rec.data.batches import PACK, Batch, TrainingBatches, plan_batches
from l2rec.data.ragged import Ragged
from l2rec.data.splits import leave_one_out

COSTS = st.lists(st.integers(0, 30), max_size=40)
SEQUENCES = st.lists(st.integers(0, 12), min_size=1, max_size=8)  # their lengths
SUPERVISION = st.sampled_from(["last", "all"])


@given(COSTS, st.one_of(st.none(), st.integers(0, 3)), st.integers(1, 6), st.integers(1, 60))
def test_a_plan_holds_every_row_once_within_its_budget(
    costs: list[int], seed: int | None, max_rows: int, max_cost: int
) -> None:
    rng = None if seed is None else np.random.default_rng(seed)
    plan = plan_batches(np.array(costs, dtype=int), rng, max_rows=max_rows, max_cost=max_cost)
    assert sorted(np.concatenate(plan).tolist() if plan else []) == list(range(len(costs)))
    for rows in plan:
        assert 1 <= len(rows) <= max_rows
        assert len(rows) == 1 or sum(costs[r] for r in rows) <= max_cost
    if seed is None:
        order = [costs[r] for rows in plan for r in rows]
        assert order == sorted(order, reverse=True)


def test_plans_mix_packs_of_like_length_and_follow_the_seed() -> None:
    costs = np.random.default_rng(5).integers(1, 40, 768)
    plans = [
        [rows.tolist() for rows in plan_batches(costs, rng, max_rows=64, max_cost=10**6)]
        for rng in map(np.random.default_rng, (0, 0, 1))
    ]
    assert plans[0] == plans[1] != plans[2]
    spread = [np.ptp(costs[rows]) for rows in plans[0]]
    assert min(spread) > 15, "every batch holds short and long rows"
    packs = [np.ptp(costs[rows[i : i + PACK]]) for rows in plans[0] for i in range(0, 64, PACK)]
    assert np.mean(packs) < 1, "side by side with their like"


def distinct(lengths: list[int]) -> Ragged:
    """Every event an item of its own, so that an item says where it stood."""
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return Ragged(np.arange(offsets[-1], dtype=np.int32), offsets)


def batches(sequences: Ragged, **options: Any) -> TrainingBatches:
    values: dict[str, Any] = {
        "supervision": "last",
        "max_items": 4,
        "negatives": 2,
        "item_costs": np.full(int(sequences.values.max(initial=0)) + 1, 3),
        "batch_users": 3,
        "batch_tokens": 40,
        "seed": 0,
        "epoch": 0,
    }
    return TrainingBatches(sequences, **values | options)


def same(a: Batch, b: Batch) -> bool:
    return all(
        np.array_equal(x, y)
        for x, y in (
            (a.users, b.users),
            (a.histories.values, b.histories.values),
            (a.histories.offsets, b.histories.offsets),
            (a.targets, b.targets),
            (a.negatives, b.negatives),
        )
    )


@given(SEQUENCES, SUPERVISION, st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
def test_inputs_are_followed_by_their_targets(
    lengths: list[int], supervision: str, max_items: int, window: int, per_user: int
) -> None:
    sequences = distinct(lengths)
    window = min(window, max_items)
    made = batches(
        sequences,
        supervision=supervision,
        max_items=max_items,
        window=window,
        targets_per_user=per_user,
    )
    rows: dict[int, list[tuple[list[int], list[int]]]] = {}
    for batch in made.iterate():
        targets = np.split(batch.targets, batch.histories.offsets[1:-1])
        if supervision == "last":
            targets = [np.array([t]) for t in batch.targets]
        for row, user in enumerate(batch.users):
            history = batch.histories[row].tolist()
            rows.setdefault(int(user), []).append((history, targets[row].tolist()))
            assert 1 <= len(history) <= max_items
    assert sorted(rows) == [u for u, n in enumerate(lengths) if n >= 2]
    for user, of_user in rows.items():
        sequence = sequences[user].tolist()
        supervised = []
        for history, goal in of_user:
            at = sequence.index(history[0])
            assert history == sequence[at : at + len(history)], "a run of the user's events"
            if supervision == "all":
                assert goal == sequence[at + 1 : at + 1 + len(history)], (
                    "each the next of its input"
                )
                supervised += goal[-window:]
            else:
                assert goal == [sequence[at + len(history)]]
                assert len(history) == min(sequence.index(goal[0]), max_items), "all before it"
            assert goal[-1] not in history, "an item is not predicted from itself"
        if supervision == "all":
            assert sorted(supervised) == sequence[1:], "every target once an epoch"
        else:
            assert len(of_user) == min(per_user, len(sequence) - 1)


@pytest.mark.parametrize("supervision", ["last", "all"])
def test_the_last_two_events_are_never_seen(supervision: str) -> None:
    lengths = [3, 7, 2, 12, 5]
    sequences = distinct(lengths)
    changed = sequences.values.copy()
    for end, n in zip(sequences.offsets[1:], lengths, strict=True):
        if n >= 3:
            changed[end - 2 : end] = [0, 1]
    held = {int(i) for u, n in enumerate(lengths) if n >= 3 for i in sequences[u][-2:]}
    costs = np.full(len(sequences.values), 3)
    for epoch in range(20):
        made, other = (
            batches(
                leave_one_out(Ragged(values, sequences.offsets)).train,
                supervision=supervision,
                epoch=epoch,
                item_costs=costs,
                negatives=0,
            )
            for values in (sequences.values, changed)
        )
        assert len(made) == len(other)
        for a, b in zip(made.iterate(), other.iterate(), strict=True):
            assert same(a, b)
            assert not held & {*a.histories.values.tolist(), *a.targets.tolist()}


def test_every_target_of_a_user_is_drawn_in_time() -> None:
    sequences = distinct([6])
    targets = {int(batches(sequences, epoch=e)[0].targets[0]) for e in range(60)}
    assert targets == {1, 2, 3, 4, 5}


@given(SEQUENCES.filter(lambda lengths: max(lengths) >= 2), SUPERVISION, st.integers(0, 4))
def test_entering_in_the_middle_is_iterating(
    lengths: list[int], supervision: str, start: int
) -> None:
    options = {"supervision": supervision, "epoch": 3, "seed": 5}
    whole = list(batches(distinct(lengths), **options).iterate())
    entered = list(batches(distinct(lengths), **options).iterate(start))
    assert len(entered) == max(0, len(whole) - start)
    assert all(same(a, b) for a, b in zip(whole[start:], entered, strict=True))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def run(seed: int, epoch: int) -> str:
        made = batches(distinct([9] * 30), seed=seed, epoch=epoch)
        return str([(b.users.tolist(), b.targets.tolist()) for b in made.iterate()])

    assert len({run(0, 0), run(0, 1), run(1, 0)}) == 3
    assert run(0, 0) == run(0, 0)


def test_negatives_cover_the_catalog_and_follow_the_seed() -> None:
    sequences = distinct([5] * 40)
    drawn = [b.negatives for b in batches(sequences, negatives=50).iterate()]
    assert all(n.shape[1] == 50 and n.dtype == np.int32 for n in drawn)
    values = np.concatenate([n.ravel() for n in drawn])
    assert set(values.tolist()) == set(range(200))
    assert len({n.tobytes() for n in drawn}) == len(drawn), "batches draw anew"


def test_the_budget_counts_tokens_of_the_input() -> None:
    sequences = distinct([4, 4, 4, 4])
    costs = np.ones(16, dtype=int)
    costs[4:8] = 100  # items of the second user
    made = batches(sequences, supervision="all", item_costs=costs, batch_users=4, batch_tokens=9)
    shapes = [sorted(b.users.tolist()) for b in made.iterate()]
    assert [1] in shapes, "a row above the budget is a batch of its own"
    assert sorted(user for shape in shapes for user in shape) == [0, 1, 2, 3]
    assert max(map(len, shapes)) <= 3, "three rows of three tokens are nine"


def test_nobody_to_learn_from() -> None:
    assert len(batches(distinct([1, 0, 1]))) == 0


def test_whole_sequences_have_no_targets_and_every_item_once() -> None:
    sequences = distinct([1, 2, 4, 9])
    made = batches(sequences, supervision="sequence", window=4)
    rows = [b.histories[i].tolist() for b in made.iterate() for i in range(len(b.histories))]
    assert all(len(b.targets) == 0 for b in made.iterate())
    assert sorted(item for row in rows for item in row) == list(range(1, 16)), (
        "a single event is nothing to hide"
    )
    assert max(map(len, rows)) == 4
