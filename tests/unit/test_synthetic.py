"""Chains have one right answer; the industrial log is what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from l2rec.data.catalog import Catalog
from l2rec.data.prepare import prepare
from l2rec.data.synthetic import (
    N_TEXTS,
    TOPICS,
    chain_dataset,
    industrial_log,
    simple_text,
    simulated_exposures,
)
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


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulated_exposures(tmp_path_factory.mktemp("feed") / "log", 300, 200, 6, seed=1)


def test_simulated_feed(feed: Path, tmp_path: Path) -> None:
    assert len(list(feed.glob("events-*.parquet"))) == 6
    dataset = prepare(feed, tmp_path / "out", progress=False)
    types = dataset.describe()["event_types"]
    assert types["exposure"] > 5 * types["click"] > 5 * types["reply"] > 0
    assert Catalog(dataset.catalog).fields == ["title", "category", "creator"]
    log = pl.read_parquet(feed / "events-*.parquet")
    assert log["timestamp"].is_sorted()  # files in order of time
    shown = log.filter(pl.col("event_type") == "exposure")
    kinds = {kind: log.filter(pl.col("event_type") == kind) for kind in ("click", "reply")}
    pair = ["user_id", "item_id"]
    assert kinds["click"].join(shown, on=pair, how="anti").is_empty()
    assert kinds["reply"].join(kinds["click"], on=pair, how="anti").is_empty()


def test_simulated_clicks_follow_what_was_planted(feed: Path) -> None:
    log = pl.read_parquet(feed / "events-*.parquet").with_columns(
        pl.col("event_type").cast(pl.String)
    )
    items = pl.read_parquet(feed / "items.parquet").with_row_index("row")
    log = log.join(items, on="item_id")
    # Taste: the category that a user clicks most in the first days is clicked most afterwards too.
    middle = log["timestamp"].min() + 3 * 86_400  # type: ignore[operator]
    clicks = log.filter(pl.col("event_type") == "click")
    early, late = (
        clicks.filter((pl.col("timestamp") < middle) == first) for first in (True, False)
    )
    mode = early.group_by("user_id").agg(pl.col("category").mode().sort().first().alias("liked"))
    both = late.join(mode, on="user_id")
    assert (both["liked"] == both["category"]).mean() > 0.2  # 0.1 by chance
    # Items appear in the course of time.
    first = log.group_by("item_id").agg(pl.col("timestamp").min())["timestamp"]
    assert 0.1 < ((first - log["timestamp"].min()) > 86_400).mean() < 0.7  # type: ignore[operator]


def test_texts_name_the_topics_and_categories_do_not(feed: Path) -> None:
    items = pl.read_parquet(feed / "items.parquet")
    topic_of = {
        word: (category, topic)
        for category, topics in TOPICS.items()
        for topic, words in topics.items()
        for word in words.split()
    }
    assert len(topic_of) == sum(len(t) for t in TOPICS.values()) * 6  # no word of two topics
    for title, category in items.select("title", "category").iter_rows():
        found = [topic_of[w] for w in title.replace(",", "").split() if w in topic_of]
        assert len(found) == 4 and found[0] == found[1] == found[2]
        assert found[0][0] == category


def test_simulations_depend_on_the_seed_alone(tmp_path: Path) -> None:
    logs = [
        pl.read_parquet(simulated_exposures(tmp_path / n, 20, 50, 2, s) / "events-*.parquet")
        for n, s in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert logs[0].equals(logs[1]) and not logs[0].equals(logs[2])


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"n_users": 0}, "n_users=0 is less than 1"),
        ({"n_items": 39}, "n_items=39 is less than 40"),
        ({"days": 0}, "days=0 is less than 1"),
        ({"sessions": 0.0}, "sessions=0.0 is not above 0"),
    ],
)
def test_impossible_simulations(tmp_path: Path, sizes: dict[str, float], says: str) -> None:
    with pytest.raises(DataError, match=says):
        simulated_exposures(
            tmp_path / "x", **({"n_users": 5, "n_items": 40, "days": 1, "seed": 0} | sizes)
        )  # type: ignore[arg-type]


def test_a_simulation_overwrites_nothing(feed: Path) -> None:
    with pytest.raises(DataError, match="is not empty; choose another folder"):
        simulated_exposures(feed, 5, 40, 1, seed=0)
