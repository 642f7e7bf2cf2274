"""Tables in memory as a data set: the same as from files, with the same checks."""

from __future__ import annotations

import datetime
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.errors import one_line

import l2rec
from l2rec.data.dataset import Dataset
from l2rec.data.formats.dates import MILLISECONDS_FROM
from l2rec.data.prepare import prepare
from l2rec.errors import ConfigError, DataError, L2RecError

EVENTS: dict[str, list[Any]] = {
    "user_id": ["ann", "bob", "ann", "ann", "bob"],
    "item_id": ["b1", "b3", "b2", "b1", "b1"],
    "timestamp": [1, 1, 3, 2, 9],
}
ITEMS: dict[str, list[Any]] = {
    "item_id": ["b1", "b2", "b3"],
    "title": ["red cup", None, "a lamp"],
    "tags": [["kitchen", "red"], ["bath"], []],
    "price": [1.5, 2.0, None],
}


def as_polars(columns: dict[str, list[Any]]) -> Any:
    return pl.DataFrame(columns)


def as_lazy(columns: dict[str, list[Any]]) -> Any:
    return pl.LazyFrame(columns)


def as_pandas(columns: dict[str, list[Any]]) -> Any:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(columns)
    return frame[frame.index >= 0]  # an index that is no plain range


def as_arrow(columns: dict[str, list[Any]]) -> Any:
    return pa.table(columns)


def as_batch(columns: dict[str, list[Any]]) -> Any:
    return pa.RecordBatch.from_pydict(columns)


class Stream:
    """A table of a library that l2rec has never heard of."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self._table = pa.table(columns)

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self._table.__arrow_c_stream__(requested_schema)


KINDS = [as_polars, as_lazy, as_pandas, as_arrow, as_batch, Stream]


def build(events: Any, items: Any = None, out: Any = None, **options: Any) -> Dataset:
    return Dataset.from_frames(events, items, out, progress=False, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_data_set_as_from_files(
    kind: Callable[[dict[str, list[Any]]], Any], tmp_path: Path
) -> None:
    pq.write_table(pa.table(EVENTS), tmp_path / "log.parquet")
    pq.write_table(pa.table(ITEMS), tmp_path / "goods.parquet")
    theirs = prepare(
        tmp_path / "log.parquet",
        tmp_path / "theirs",
        items=tmp_path / "goods.parquet",
        progress=False,
    )
    ours = build(kind(EVENTS), kind(ITEMS), tmp_path / "ours")
    assert ours.fingerprint == theirs.fingerprint
    assert ours.texts() == ["red cup. kitchen, red", "bath", "a lamp"]
    assert [list(row) for row in ours.sequences] == [[0, 0, 1], [2, 0]]
    assert (ours.name, ours.path) == ("ours", tmp_path / "ours")
    assert (ours.meta["source"]["origin"], ours.meta["source"]["format"]) == ("frames", "frames")
    assert l2rec.load_dataset(tmp_path / "ours").fingerprint == ours.fingerprint
    assert l2rec.load_dataset is l2rec.open_dataset


def rows(times: st.SearchStrategy[int]) -> st.SearchStrategy[list[tuple[str, str, int]]]:
    users = st.text("ab,\"'é ", min_size=1, max_size=3)
    items = st.text("xy;\t\n1", min_size=1, max_size=3)
    return st.lists(st.tuples(users, items, times), min_size=1, max_size=30)


# A log's times are of one unit: numbers that look like seconds and like milliseconds are refused.
in_seconds = st.integers(-(2**40), int(MILLISECONDS_FROM) - 1)
in_milliseconds = st.integers(int(MILLISECONDS_FROM), 2**40)


@settings(max_examples=25, deadline=None)
@given(rows(in_seconds) | rows(in_milliseconds))
def test_any_log_reads_back(rows: list[tuple[str, str, int]]) -> None:
    columns = dict(zip(EVENTS, map(list, zip(*rows, strict=True)), strict=True))
    ours = build(pa.table(columns))
    assert ours.fingerprint == build(pl.DataFrame(columns)).fingerprint
    expected: dict[str, list[tuple[int, str]]] = {}
    for user, item, time in rows:
        expected.setdefault(user, []).append((time, item))
    ids = ours.item_ids.to_pylist()
    for number, user in enumerate(ours.user_ids.to_pylist()):
        items = [item for _, item in sorted(expected[user], key=lambda event: event[0])]
        assert [ids[item] for item in ours.sequences[number]] == items


def test_a_temporary_data_set_lives_as_long_as_it_is_used() -> None:
    dataset = build(pl.DataFrame(EVENTS))
    path = dataset.path
    assert dataset.name == "frames" and dataset.meta["notes"][0].startswith("no catalog")
    assert pickle.loads(pickle.dumps(dataset)).fingerprint == dataset.fingerprint
    items = dataset.items
    del dataset
    gc.collect()
    assert not path.parent.exists()
    assert items.tolist() == [0, 0, 2, 1, 0]  # an array that was taken from it stays


def test_notes_name_arguments() -> None:
    notes = build(pl.DataFrame(EVENTS), pl.DataFrame(ITEMS).select("item_id", "title")).meta[
        "notes"
    ]
    assert any(note.endswith("use drop_textless to drop them") for note in notes)
    assert not any("--" in note for note in notes)


def test_types_of_columns() -> None:
    """Numbers, categories and dates are read as those of a Parquet file are."""
    day = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
    events = pl.DataFrame(
        {
            "who": pl.Series([7, 7, 12], dtype=pl.Int32),
            "what": pl.Series(["x", "y", "x"], dtype=pl.Categorical),
            "when": [day, day + datetime.timedelta(days=1), day],
            "kind": ["click", "buy", "click"],
        }
    )
    names = {"user": "who", "item": "what", "timestamp": "when", "event_type": "kind"}
    dataset = build(events, **names)
    assert dataset.user_ids.to_pylist() == ["7", "12"]
    assert dataset.item_ids.to_pylist() == ["x", "y"]
    assert np.array_equal(np.diff(dataset.timestamps[:2]), [86400])
    assert dataset.event_type_names == ["click", "buy"]
    assert build(events, **names, only=("buy",)).n_events == 1
    assert build(events, **(names | {"timestamp": None})).timestamps.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("events", "items", "options", "message"),
    [
        (EVENTS, None, {}, "events cannot be read as a table: it is a dict; give a polars, pandas"),
        (pl.Series([1]), None, {}, "events cannot be read as a table: "),
        (pl.DataFrame(EVENTS), [1], {}, "items cannot be read as a table: it is a list"),
        (
            pl.DataFrame({"user_id": [object()]}),
            None,
            {},
            "events cannot be read as a table: its column 'user_id' holds Python objects",
        ),
        (
            pa.table([[1], [2]], names=["user_id", "user_id"]),
            None,
            {},
            "events cannot be read as a table: two columns are called 'user_id'",
        ),
        (
            pl.DataFrame({"user": ["u"]}),
            None,
            {},
            r"^events has no column 'user_id', it has user.*; pass user COLUMN",
        ),
        (pl.DataFrame(EVENTS)[:0], None, {}, "^events has no events"),
        (
            pl.DataFrame({**EVENTS, "user_id": ["a", "b", None, "c", "d"]}),
            None,
            {},
            "^events, row 3 has no user id",
        ),
        (
            pl.DataFrame({**EVENTS, "timestamp": [1.0, 2.0, 3.0, float("nan"), 4.0]}),
            None,
            {},
            "^events, row 4: timestamp nan",
        ),
        (pl.DataFrame(EVENTS), pl.DataFrame({"id": ["b1"]}), {}, "^items has no column 'item_id'"),
        (pl.DataFrame(EVENTS), pl.DataFrame(ITEMS)[:2], {}, "b3.*pass drop_unknown_items"),
        (
            pl.DataFrame(EVENTS),
            pl.DataFrame({"item_id": ["b1", "b1"], "title": ["a", "b"]}),
            {},
            "pass duplicate_items first",
        ),
        (pl.DataFrame(EVENTS), None, {"k_cor": 2}, "from_frames has no option 'k_cor'.*'k_core'"),
        (pl.DataFrame(EVENTS), None, {"k_core": -1}, "k_core=-1: Input should be greater"),
        (pl.DataFrame(EVENTS), None, {"text": "{title}"}, "needs a catalog, but events comes"),
    ],
)
def test_what_is_refused(
    events: Any, items: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    kind = ConfigError if "k_co" in message else DataError
    with pytest.raises(kind, match=message) as error:
        build(events, items, tmp_path / "out", **options)
    line = one_line(error)
    assert ".parquet" not in line and "/l2rec-" not in line and "--" not in line
    assert not (tmp_path / "out").exists()


EXTRA: dict[str, Callable[[], Any]] = {
    "interval": lambda: _pandas().cut([1, 2, 3, 4, 5], 2),
    "period": lambda: _pandas().period_range("2024", "2028", freq="Y"),
    "mixed": lambda: [1, "a", None, 2.0, "b"],
    "objects": lambda: [object()] * 5,
    "complex": lambda: np.ones(5, complex),
    "empty objects": lambda: [{}] * 5,
}


def _pandas() -> Any:
    return pytest.importorskip("pandas")


def with_extra(columns: dict[str, list[Any]], kind: str) -> Any:
    """Return a table with one more column, ``x``."""
    frame = as_pandas(columns).reset_index(drop=True)
    return frame.assign(x=EXTRA[kind]()[: len(frame)])


@pytest.mark.parametrize("kind", EXTRA)
def test_columns_that_nobody_reads_may_hold_anything(kind: str) -> None:
    plain, items = build(pl.DataFrame(EVENTS)), {name: ITEMS[name] for name in ("item_id", "title")}
    assert build(with_extra(EVENTS, kind)).fingerprint == plain.fingerprint
    ours = build(pl.DataFrame(EVENTS), with_extra(items, kind))
    assert ours.fingerprint == build(pl.DataFrame(EVENTS), pl.DataFrame(items)).fingerprint
    left = [note for note in ours.meta["notes"] if note.startswith("items: left out, ")]
    assert left == ([] if kind == "period" else [left[0]]) and all("'x'" in n for n in left)


def test_columns_of_polars_and_arrow_that_nobody_reads() -> None:
    plain, log = build(pl.DataFrame(EVENTS)).fingerprint, pa.table(EVENTS)
    objects = pl.Series("x", [object()] * 5, dtype=pl.Object)
    assert build(pl.DataFrame(EVENTS).with_columns(objects)).fingerprint == plain
    two = log.append_column("x", pa.array([1] * 5)).append_column("x", pa.array([2] * 5))
    assert build(two).fingerprint == plain
    assert build(Stream({**EVENTS, "x": [{}] * 5})).fingerprint == plain
    frame = as_pandas({**EVENTS, "x": [1] * 5, "y": [2] * 5}).rename(columns={"y": "x"})
    assert build(frame).fingerprint == plain


@pytest.mark.parametrize("kind", EXTRA)
@pytest.mark.parametrize("column", ["user_id", "item_id", "timestamp", "event_type"])
def test_columns_that_are_read_may_not(column: str, kind: str) -> None:
    frame = with_extra(EVENTS, kind).drop(columns=column, errors="ignore")
    with pytest.raises(DataError) as error:
        build(frame.rename(columns={"x": column}))
    one_line(error)


@pytest.mark.parametrize("kind", EXTRA)
def test_columns_that_a_text_names_are_not_left_out(kind: str) -> None:
    with pytest.raises(DataError, match=r"'x'|\bx\b|items cannot be read") as error:
        build(pl.DataFrame(EVENTS), with_extra(ITEMS, kind), text="{title} {x}")
    one_line(error)


def test_pandas_columns_of_mixed_types_are_refused() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({**EVENTS, "user_id": [1, "bob", 2, 3, 4]})
    with pytest.raises(DataError, match=r"events cannot be read as a table: .*user_id") as error:
        build(frame)
    one_line(error)


def test_nothing_temporary_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for events in (EVENTS, pl.DataFrame(EVENTS)[:0]):
        with pytest.raises(L2RecError):
            build(events)
    build(pl.DataFrame(EVENTS))
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_every_public_name_is_there() -> None:
    for name in l2rec.__all__:
        assert getattr(l2rec, name) is not None
    assert dir(l2rec) == sorted(l2rec.__all__)
