"""Splits that a log comes with: kept with their events, leave-one-out told, leaks refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.formats.source import Source
from l2rec.data.merge import merge
from l2rec.data.prepare import PrepareConfig, build
from l2rec.data.splits import split_events
from l2rec.errors import DataError

TRAIN, VALID, TEST = range(3)
Event = tuple[str, str, float, int]
"""User, item, time and split."""


def prepared(events: Sequence[Event], out: Path, chunk: int = 3, **options: Any) -> Dataset:
    """Prepare a log whose files say the split of each event."""

    def batches() -> Iterator[pa.RecordBatch]:
        for at in range(0, len(events), 2):
            users, items, times, splits = zip(*events[at : at + 2], strict=True)
            yield pa.RecordBatch.from_pydict(
                {
                    "user_id": pa.array(users, pa.string()),
                    "item_id": pa.array(items, pa.string()),
                    "timestamp": pa.array(times, pa.float64()),
                    "split": pa.array(splits, pa.int8()),
                }
            )

    source = Source("test", (Path(__file__),), batches)
    return build(source, out, PrepareConfig(**options), origin="log", chunk_events=chunk)


def marks(dataset: Dataset) -> dict[str, list[tuple[str, int]]]:
    """Return the items of each user with their splits."""
    assert dataset.splits is not None
    items, splits, bounds = dataset.item_ids.to_pylist(), dataset.splits, dataset.offsets
    return {
        user: [(items[dataset.items[n]], int(splits[n])) for n in range(bounds[u], bounds[u + 1])]
        for u, user in enumerate(dataset.user_ids.to_pylist())
    }


LOG: list[Event] = [
    ("u", "a", 1, TRAIN),
    ("v", "b", 1, TRAIN),
    ("u", "b", 2, TRAIN),
    ("v", "a", 2, VALID),
    ("u", "c", 3, VALID),
    ("u", "d", 4, TEST),
    ("u", "e", 5, TEST),
    ("w", "a", 6, TEST),
]


def test_splits_travel_with_their_events(tmp_path: Path) -> None:
    dataset = prepared(LOG, tmp_path / "d")
    assert marks(dataset) == {
        "u": [("a", TRAIN), ("b", TRAIN), ("c", VALID), ("d", TEST), ("e", TEST)],
        "v": [("b", TRAIN), ("a", VALID)],
        "w": [("a", TEST)],
    }
    assert dataset.describe()["splits"] == "given"
    split = split_events(open_dataset(dataset.path))
    ids, users = dataset.item_ids.to_pylist(), dataset.user_ids.to_pylist()
    cases = {
        name: [
            (users[user], "".join(ids[i] for i in history), ids[int(target[0])])
            for user, history, target in zip(
                part.users.tolist(),
                (part.histories[n] for n in range(len(part))),
                (part.targets[n] for n in range(len(part))),
                strict=True,
            )
        ]
        for name, part in (("valid", split.valid), ("test", split.test))
    }
    assert cases["valid"] == [("u", "ab", "c"), ("v", "b", "a")]
    assert cases["test"] == [("u", "abc", "d"), ("u", "abcd", "e")], "w has no history"


def test_filters_keep_the_splits_of_what_is_left(tmp_path: Path) -> None:
    newest = prepared(LOG, tmp_path / "newest", max_history=2)
    assert marks(newest)["u"] == [("d", TEST), ("e", TEST)]
    core = prepared(LOG, tmp_path / "core", min_history=3)
    assert marks(core) == {
        "u": [("a", TRAIN), ("b", TRAIN), ("c", VALID), ("d", TEST), ("e", TEST)]
    }
    earlier = prepared(LOG, tmp_path / "earlier", before=4.5)
    assert marks(earlier)["u"][-1] == ("d", TEST)


def test_splits_can_be_left_aside(tmp_path: Path) -> None:
    dataset = prepared(LOG, tmp_path / "none", splits="none")
    assert dataset.splits is None and dataset.meta["splits"] is None
    assert split_events(dataset).kind == "leave-one-out"
    assert dataset.meta["notes"][-1].startswith("the splits that the log came with are left aside")
    assert "left aside" not in str(prepared(LOG, tmp_path / "given").meta["notes"])


def test_leave_one_out_is_told_and_nothing_more_is_stored(tmp_path: Path) -> None:
    log: list[Event] = [("u", item, n, TRAIN) for n, item in enumerate("abcd")]
    log += [("u", "e", 5, VALID), ("u", "f", 6, TEST), ("v", "a", 1, TRAIN), ("v", "b", 2, TRAIN)]
    dataset = prepared(log, tmp_path / "told")
    plain = prepared(log, tmp_path / "plain", splits="none")
    assert dataset.meta["splits"] == "leave-one-out" and dataset.splits is None
    assert not (dataset.path / "splits.npy").exists()
    assert dataset.fingerprint == plain.fingerprint
    assert split_events(dataset, "given").protocol == "leave-one-out"
    given_otherwise = prepared([*log[:6], ("v", "a", 1, TEST)], tmp_path / "other")
    assert given_otherwise.meta["splits"] == "given"


def test_the_fingerprint_covers_the_splits(tmp_path: Path) -> None:
    other = [(u, i, t, TRAIN if (u, i) == ("u", "c") else s) for u, i, t, s in LOG]
    fingerprints = {
        prepared(log, tmp_path / name).fingerprint for name, log in (("a", LOG), ("b", other))
    }
    assert len(fingerprints) == 2


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_splits_that_do_not_follow_time_are_refused(tmp_path: Path, chunk: int) -> None:
    log: list[Event] = [*LOG, ("v", "c", 3, TRAIN)]
    with pytest.raises(DataError, match=r"user 'v' has an event of valid before one of train"):
        prepared(log, tmp_path / "d", chunk)
    assert not (tmp_path / "d").exists()
    assert prepared(log, tmp_path / "d", splits="none").n_events == len(log), "as it says"


@given(
    st.lists(
        st.tuples(
            st.sampled_from("uvw"), st.sampled_from("abcd"), st.integers(0, 3), st.integers(0, 2)
        ),
        min_size=1,
        max_size=14,
    ),
    st.sampled_from(["file", "hash", "item"]),
    st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_ties_are_broken_within_a_split(
    events: list[tuple[str, str, int, int]], ties: str, chunk: int
) -> None:
    import tempfile

    # Times that never contradict the splits.
    log = [(u, i, float(10 * s + t), s) for u, i, t, s in events]
    log = [(u, i, 10.0 * (t >= 10) if t < 20 else t, s) for u, i, t, s in log]
    log.sort(key=lambda event: event[3])
    with tempfile.TemporaryDirectory() as folder:
        dataset = prepared(log, Path(folder) / "d", chunk, ties=ties)
        if dataset.splits is None:
            assert dataset.meta["splits"] == "leave-one-out"
            return
        for user, found in marks(dataset).items():
            wanted = sorted((i, s) for u, i, _, s in log if u == user)
            assert sorted(found) == wanted
            splits = [s for _, s in found]
            assert splits == sorted(splits)


def test_merged_data_keeps_the_splits(tmp_path: Path) -> None:
    """Merge with data without splits: trained on whole, its test would be seen."""
    marked = prepared(LOG, tmp_path / "marked")
    plain = prepared([*LOG[:3], ("u", "c", 3.0, TRAIN)], tmp_path / "plain", splits="none")
    both = merge([marked.path, plain.path], tmp_path / "both", progress=False)
    found = marks(both)
    assert [s for _, s in found["marked/u"]] == [s for _, s in marks(marked)["u"]]
    assert [s for _, s in found["plain/u"]] == [TRAIN, VALID, TEST]
    assert [s for _, s in found["plain/v"]] == [TRAIN]
    assert np.all(np.diff([s for _, s in found["plain/u"]]) >= 0)
