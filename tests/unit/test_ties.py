"""Ties: facts and rules against literal loops over events; what a file's order must not decide."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.formats.source import Source
from l2rec.data.prepare import PrepareConfig, build, prepare
from l2rec.data.ties import EventOrder, Ties, item_ranks

Event = tuple[str, str, float, str]
"""User, item, time and type."""
Row = list[tuple[str, float, str]]
"""A user's events: item, time and type."""

ITEMS = ("10", "9", "007", "7", "b", "a", "é", "")
EVENTS = st.lists(
    st.tuples(
        st.sampled_from("uvw"),
        st.sampled_from(ITEMS[:-1]),
        st.integers(-2, 2).map(float),
        st.sampled_from(["show", "click"]),
    ),
    min_size=1,
    max_size=40,
)
in_a_folder = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def prepared(
    folder: Path, events: list[Event], config: PrepareConfig | None = None, chunk: int = 7
) -> Dataset:
    def read() -> Iterator[pa.RecordBatch]:
        names = ("user_id", "item_id", "timestamp", "event_type")
        columns = zip(*events, strict=True)
        yield pa.RecordBatch.from_pydict(
            {name: list(column) for name, column in zip(names, columns, strict=True)}
        )

    source = Source("test", (Path(__file__),), read)
    return build(
        source, folder / "out", config or PrepareConfig(), origin="test", chunk_events=chunk
    )


def rows_of(dataset: Dataset) -> dict[str, Row]:
    """Return what a data set holds, by user id."""
    ids, names = dataset.item_ids.to_pylist(), dataset.event_type_names
    assert dataset.event_types is not None
    types = [names[code] for code in dataset.event_types]
    rows = {}
    for number, user in enumerate(dataset.user_ids.to_pylist()):
        low, high = dataset.offsets[number], dataset.offsets[number + 1]
        items = [ids[i] for i in dataset.items[low:high]]
        rows[user] = list(
            zip(items, dataset.timestamps[low:high].tolist(), types[low:high], strict=True)
        )
    return rows


# ---------------------------------------------------------------- the literal reference


def by_id(item: str) -> tuple[bool, int, bytes]:
    number = item.isascii() and item.isdigit() and len(item) <= 18
    return not number, int(item) if number else 0, item.encode()


def mixed(word: int) -> int:
    wide = (1 << 64) - 1
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & wide
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & wide
    return word ^ word >> 31


def hashed(text: str, kind: bytes, seed: int) -> int:
    key = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=key, person=kind).digest()
    return int.from_bytes(digest, "little")


def literal_rows(events: list[Event], ties: str, seed: int) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for user, item, time, kind in events:
        rows.setdefault(user, []).append((item, time, kind))
    for user, row in rows.items():
        row.sort(key=lambda event: event[1])
        if ties == "item":
            row.sort(key=lambda event: (event[1], by_id(event[0])))
        if ties == "hash":
            row.sort(key=lambda event: event[1:])  # occurrences count by time, then type
            seen: Counter[str] = Counter()
            keyed = []
            for item, time, kind in row:
                place = (hashed(item, b"item", seed) + seen[item] * 0x9E3779B97F4A7C15) % (1 << 64)
                key = mixed(hashed(user, b"user", seed) ^ mixed(place))
                keyed.append((time, key, (item, time, kind)))
                seen[item] += 1
            rows[user] = [event for _, _, event in sorted(keyed)]
    return rows


def literal_facts(rows: dict[str, Row]) -> dict[str, Any]:
    facts = dict.fromkeys(
        ("neighbours", "tied", "tied_items", "ascending", "users", "last_two", "last_three"), 0
    )
    for row in rows.values():
        for (item, time, _), (following, later, _) in itertools.pairwise(row):
            facts["neighbours"] += 1
            if time == later:
                facts["tied"] += 1
                if item != following:
                    facts["tied_items"] += 1
                    facts["ascending"] += by_id(item) < by_id(following)
        if len(row) >= 3:
            facts["users"] += 1
            times = [time for _, time, _ in row]
            facts["last_two"] += times[-1] == times[-2]
            facts["last_three"] += times[-1] == times[-2] == times[-3]
    return facts


# ---------------------------------------------------------------- rules


@in_a_folder
@given(EVENTS, st.sampled_from(["file", "hash", "item"]), st.integers(0, 2), st.integers(1, 9))
def test_order_and_facts_equal_the_loop(
    tmp_path: Path, events: list[Event], ties: Ties, seed: int, chunk: int
) -> None:
    config = PrepareConfig(ties=ties, ties_seed=seed)
    dataset = prepared(tmp_path, events, config, chunk)
    expected = literal_rows(events, ties, seed)
    assert rows_of(dataset) == expected
    facts = dataset.order.to_json()
    wanted = literal_facts(expected)
    assert {name: facts[name] for name in wanted} == wanted
    assert dataset.meta["order"] == facts
    assert dataset.meta["options"]["ties"] == facts["ties"] == ties
    assert facts["tied_share"] == (
        wanted["tied"] / wanted["neighbours"] if wanted["neighbours"] else None
    )


@in_a_folder
@given(EVENTS, st.randoms(use_true_random=False), st.none() | st.integers(1, 4))
def test_hash_does_not_depend_on_the_order_of_the_file(
    tmp_path: Path, events: list[Event], random: random.Random, newest: int | None
) -> None:
    shuffled = list(events)
    random.shuffle(shuffled)
    config = PrepareConfig(ties="hash", max_history=newest)
    rows = rows_of(prepared(tmp_path, events, config))
    assert rows_of(prepared(tmp_path, shuffled, config)) == rows


def test_hash_does_not_depend_on_what_is_filtered(tmp_path: Path) -> None:
    rng = random.Random(0)
    events = [(rng.choice("uvwxyz"), str(rng.randrange(12)), 0.0, "show") for _ in range(60)]
    events.append(("rare", "rare", 0.0, "show"))
    whole = rows_of(prepared(tmp_path, events, PrepareConfig(ties="hash")))
    left = rows_of(prepared(tmp_path, events, PrepareConfig(ties="hash", k_core=5)))
    assert 0 < len(left) < len(whole)
    for user, row in left.items():
        items = {item for item, _, _ in row}
        assert [event for event in whole[user] if event[0] in items] == row


def test_a_seed_is_an_order_of_its_own(tmp_path: Path) -> None:
    events = [(user, str(n), 0.0, "show") for user in "uv" for n in range(30)]
    orders = []
    for seed in (0, 1, (1 << 64) - 1):
        rows = rows_of(prepared(tmp_path, events, PrepareConfig(ties="hash", ties_seed=seed)))
        orders += [[item for item, _, _ in rows[user]] for user in "uv"]
    assert len({tuple(order) for order in orders}) == 6
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_ids_that_are_numbers_come_first_as_numbers() -> None:
    ids = [*ITEMS, "9" * 18, "9" * 19, "-1", "1.0", "٣"]
    ranks = item_ranks(pa.array(ids, pa.large_string()))
    order = [ids[i] for i in np.argsort(ranks)]
    assert order == sorted(ids, key=by_id)
    assert order[:5] == ["007", "7", "9", "10", "9" * 18]


# ---------------------------------------------------------------- what is older than the option

TIED = [
    *[("u", "b", 86400.0, "show"), ("u", "10", 86400.0, "click"), ("v", "a", 0.0, "show")],
    *[("u", "9", 86400.0, "show"), ("u", "b", 86400.0, "click"), ("v", "10", 0.0, "show")],
    *[("u", "a", 0.0, "show"), ("v", "b", 172800.0, "click"), ("u", "b", 172800.0, "show")],
    ("u", "9", 172800.0, "show"),
]


def test_file_is_the_default_and_keeps_earlier_fingerprints(tmp_path: Path) -> None:
    # Written by the version before the option.
    earlier = "3635ba7ac9a21bd5"
    assert prepared(tmp_path, TIED).fingerprint == earlier
    prints = {
        ties: prepared(tmp_path, TIED, PrepareConfig(ties=ties)).fingerprint
        for ties in ("file", "hash", "item")
    }
    # Theirs must not change either.
    expected = {"file": earlier, "hash": "44a3da9bef283e8b", "item": "3288ca5c47143e16"}
    assert prints == expected


def test_facts_of_a_data_set_that_has_none(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, TIED)
    recorded = dataset.describe()["order"]
    meta = {name: value for name, value in dataset.meta.items() if name != "order"}
    del meta["options"]["ties"], meta["options"]["ties_seed"]
    (dataset.path / "dataset.json").write_text(json.dumps(meta))
    measured = open_dataset(dataset.path)
    assert "order" not in measured.meta
    assert measured.describe()["order"] == recorded


def test_an_earlier_folder_is_described() -> None:
    earlier = open_dataset(Path(__file__).parents[1] / "compat" / "earlier" / "data")
    order = earlier.describe()["order"]
    assert (order["unit"], order["neighbours"], order["tied"]) == ("order only", 48 * 7, 0)


@pytest.mark.slow
@pytest.mark.skipif("L2REC_RAW_DATA" not in os.environ, reason="no folder of raw data sets named")
def test_scientific_keeps_its_fingerprint(tmp_path: Path) -> None:
    raw = Path(os.environ["L2REC_RAW_DATA"]) / "scientific"
    for ties in ("file", "hash"):
        config = PrepareConfig(ties=ties)
        dataset = prepare(raw, tmp_path / "out", config, progress=False)
        assert dataset.fingerprint == "579cb741cd0bdfdd"
        assert dataset.order.unit == "order only"


# ---------------------------------------------------------------- time


DAY = 86_400


@pytest.mark.parametrize(
    ("times", "unit", "resolution"),
    [
        ([0, 1, 2, 3], "order only", None),
        ([1, 3], "unknown", "whole numbers"),  # no position in a log of two
        ([1, 2], "order only", None),
        ([0, 0.5, 1], "unknown", "fractions"),
        ([0, 1, 1, 2], "unknown", "whole numbers"),
        ([-1, 0, 1], "unknown", "whole numbers"),
        ([DAY * 15_000, DAY * 15_001], "seconds", "days"),
        ([DAY * 15_000 + 18_000, DAY * 15_001 + 18_000], "seconds", "days"),  # midnight elsewhere
        ([DAY * 15_000, DAY * 15_000 + 7_200], "seconds", "hours"),
        ([DAY * 15_000, DAY * 15_000 + 60], "seconds", "minutes"),
        ([DAY * 15_000, DAY * 15_000 + 1], "seconds", "seconds"),
        ([DAY * 15_000, DAY * 15_000 + 0.25], "seconds", "fractions"),
        ([DAY * 15e6, DAY * 15e6 + 1000], "milliseconds", "seconds"),
        ([DAY * 15e6, DAY * 15e6 + 1], "milliseconds", "milliseconds"),
        ([DAY * 15e9, DAY * 16e9], "microseconds", "days"),
        ([DAY * 15e12, DAY * 15e12 + 6e10], "nanoseconds", "minutes"),
        ([DAY * (15_000 + n) for n in range(200)] + [DAY * 15_000.5], "seconds", "days"),
    ],
)
def test_unit_and_resolution(
    tmp_path: Path, times: list[float], unit: str, resolution: str | None
) -> None:
    events = [("u", str(n), float(time), "show") for n, time in enumerate(times)]
    order = prepared(tmp_path, events).order
    assert (order.unit, order.resolution) == (unit, resolution)


def test_positions_are_order_only_after_filtering(tmp_path: Path) -> None:
    events = [("u", str(n % 2 or n), float(n), "show") for n in range(9)]
    order = prepared(tmp_path, events, PrepareConfig(k_core=2)).order
    assert (order.unit, order.neighbours) == ("order only", 3)  # events 1, 3, 5 and 7


def test_the_order_of_the_file_is_order_only(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("user_id,item_id,at\n" + "".join(f"u{n % 3},i{n % 4},9\n" for n in range(24)))
    config = PrepareConfig(timestamp=None)
    dataset = prepare(log, tmp_path / "out", config, progress=False)
    assert dataset.order.lines() == ["time: order only; no two events of a user have equal time"]


# ---------------------------------------------------------------- words


def order_of(**changes: Any) -> EventOrder:
    facts: dict[str, Any] = {
        **{"ties": "file", "unit": "seconds", "resolution": "days", "neighbours": 1000},
        **{"tied": 400, "tied_items": 300, "ascending": 181, "users": 90},
        **{"last_two": 45, "last_three": 9},
    }
    return EventOrder(**facts | changes)


def test_lines() -> None:
    assert order_of(ascending=150).lines() == [
        "time: unit seconds, resolution days; 40.0% of neighbouring events of a user have equal "
        "time (ties: file)",
        "ties: 50.0% of users end on two events of equal time, 10.0% on three; 50.0% of tied "
        "neighbours ascend by item id",
    ]
    assert order_of().lines()[2] == (
        "warning: 60.3% of tied neighbours ascend by item id: the order inside ties looks like an "
        "artefact of how the file was made, and scores of models that learn transitions may be "
        "inflated; check with --ties hash"
    )


def test_a_warning_needs_many_ties_more_than_chance_and_no_rule() -> None:
    assert order_of().warning is not None
    assert order_of(ascending=180).warning is None
    assert order_of(tied_items=299, ascending=299).warning is None
    assert order_of(ascending=300, ties="item").warning is None
    assert order_of(tied=0, tied_items=0, ascending=0).warning is None


def test_a_warning_of_a_log_that_is_there_twice() -> None:
    warning = order_of(tied_items=0, ascending=0).warning
    assert warning is not None and warning.startswith("40.0% of events repeat the one before them")
    assert order_of(tied=200, tied_items=0, ascending=0).warning is None, "some buy two of a thing"


def test_facts_add_up() -> None:
    both = order_of() + order_of(ties="hash", tied=1, ascending=0)
    assert (both.ties, both.unit, both.resolution) == ("mixed", "seconds", "days")
    assert (both.neighbours, both.tied, both.ascending) == (2000, 401, 181)
    assert EventOrder.of_json(json.loads(json.dumps(both.to_json()))) == both
