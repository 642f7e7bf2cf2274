"""Chains have one right answer; the industrial log is what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from l2rec.data.prepare import prepare
from l2rec.data.synthetic import N_TEXTS, chain_dataset, industrial_log, simple_text
from l2rec.errors import DataError


def test_the_next_item_follows_from_this_one(tmp_path: Path) -> None:
    dataset = chain_dataset(tmp_path / "chain", n_users=30, n_items=12, length=9, seed=3)
    assert (dataset.n_users, dataset.n_items, dataset.n_events) == (30, 12, 270)
    rows = dataset.items.reshape(30, 9)
    pairs = np.unique(np.stack([rows[:, :-1].ravel(), rows[:, 1:].ravel()], axis=1), axis=0)
    assert len(pairs) == len(np.unique(pairs[:, 0])) == len(np.unique(pairs[:, 1])) == 12
    follow = dict(pairs.tolist())
    item, seen = 0, set()
    while item not in seen:
        seen.add(item)
        item = follow[item]
    assert len(seen) == 12  # one cycle through everything
    assert len(set(dataset.texts())) == 12
    assert dataset.meta["notes"] == []


def test_chains_depend_on_the_seed_alone(tmp_path: Path) -> None:
    prints = [
        chain_dataset(tmp_path / name, 5, 8, 4, seed).fingerprint
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert prints[0] == prints[1] != prints[2]


def test_items_nobody_met_stay_in_the_catalog(tmp_path: Path) -> None:
    assert chain_dataset(tmp_path / "a", 1, 50, 3, 0).n_items == 50


def test_texts_are_different() -> None:
    assert len({simple_text(code) for code in range(N_TEXTS)}) == N_TEXTS


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((0, 5, 5), "n_users=0 is less than 1"),
        ((5, 1, 5), "n_items=1 is less than 2"),
        ((5, 5, 0), "length=0 is less than 1"),
        ((5, N_TEXTS + 1, 5), "is more than the 30,000 texts there are"),
    ],
)
def test_impossible_chains(tmp_path: Path, sizes: tuple[int, int, int], says: str) -> None:
    with pytest.raises(DataError, match=says):
        chain_dataset(tmp_path / "x", *sizes, seed=0)


def test_industrial_log(tmp_path: Path) -> None:
    folder = industrial_log(tmp_path / "log", 5000, 200, 80, seed=0, chunk_events=1500)
    assert len(list(folder.glob("events-*.parquet"))) == 4
    dataset = prepare(folder, tmp_path / "out", progress=False)
    assert (dataset.n_users, dataset.n_items, dataset.n_events) == (200, 80, 5000)
    assert len(dataset.catalog.column_names) == 1 + 10 + 1
    types = dataset.describe()["event_types"]
    assert types["exposure"] > types["click"] > types["reply"] > 0
    counts = np.sort(np.bincount(dataset.items))[::-1]
    assert counts[:8].sum() > 0.3 * counts.sum()  # a tenth of the items has much of it
    with pytest.raises(DataError, match="is not empty; choose another folder"):
        industrial_log(folder, 10, 5, 5, seed=0)
