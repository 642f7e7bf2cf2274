"""Preparing: filters, order and text against literal loops; bounded memory; every refusal."""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.support.errors import one_line

from l2rec.data import prepare as prepare_module
from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset
from l2rec.data.formats.source import Source
from l2rec.data.preparation import sequences
from l2rec.data.preparation.events import Ids
from l2rec.data.preparation.filtering import core
from l2rec.data.preparation.state import Report
from l2rec.data.preparation.texts import item_text
from l2rec.data.prepare import PrepareConfig, build, prepare
from l2rec.errors import DataError

Event = tuple[str, str, float]
LOG = "user_id:token\titem_id:token\ttimestamp:float\n"


def write(folder: Path, events: str, items: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "x.inter").write_text(LOG + events, encoding="utf-8")
    if items is not None:
        (folder / "x.item").write_text(items, encoding="utf-8")
    return folder


ITEMS = (
    "item_id:token\ttitle:token_seq\tbrand:token\tprice:float\n"
    "c\tCup\tACME\t3\na\tApple\t\t1\nz\tZebra\tZoo\t9\nb\t\t\t2\n"
)
EVENTS = "v\tb\t5\nu\ta\t3\nu\tc\t1\nv\ta\t5\nu\tb\t3\nw\ta\t1\n"


def rows_of(dataset: Dataset) -> dict[str, list[str]]:
    items = dataset.item_ids.to_pylist()
    users = dataset.user_ids.to_pylist()
    return {u: [items[i] for i in dataset.sequences[n]] for n, u in enumerate(users)}


def make(tmp_path: Path, **options: Any) -> Dataset:
    source = write(tmp_path / "source", EVENTS, ITEMS)
    return prepare(source, tmp_path / "out", PrepareConfig(**options), progress=False)


def test_order_ints_and_counters(tmp_path: Path) -> None:
    dataset = make(tmp_path)
    # Users by first appearance, items by catalog, ties in time by file order.
    assert list(rows_of(dataset).items()) == [
        ("v", ["b", "a"]),
        ("u", ["c", "a", "b"]),
        ("w", ["a"]),
    ]
    assert dataset.item_ids.to_pylist() == ["c", "a", "b"]
    assert dataset.timestamps.tolist() == [5, 5, 1, 3, 3, 1]
    assert dataset.meta["counters"]["items_dropped"] == 1
    assert dataset.meta["notes"] == [
        "1 items of the catalog without events (after filtering) are left out; --keep-all-items "
        "keeps them, to serve them by their texts",
        "2 users have fewer than 3 events; they are trained on but cannot be evaluated",
        "1 items have no text; they can be read in a history but only their id is known; "
        "use --drop-textless to drop them",
    ]
    assert dataset.catalog.column_names == ["item_id", "title", "brand", "text"]
    assert dataset.texts() == ["Cup. ACME", "Apple", ""]


def test_the_whole_catalog_may_stay(tmp_path: Path) -> None:
    dataset = make(tmp_path, keep_all_items=True)
    assert dataset.item_ids.to_pylist() == ["c", "a", "z", "b"]
    note = "1 items without events are kept; --no-keep-all-items leaves them out"
    assert note in dataset.meta["notes"]
    assert rows_of(dataset)["u"] == ["c", "a", "b"]
    dataset = make(tmp_path, keep_all_items=True, k_core=2)
    assert dataset.item_ids.to_pylist() == ["a", "z", "b"]  # of c there was one event


def test_template_fills_fields_and_may_name_numbers(tmp_path: Path) -> None:
    dataset = make(tmp_path, text="{title} by {brand}: {price}")
    assert dataset.texts() == ["Cup by ACME: 3", "Apple: 1", "2"]
    assert "price" in dataset.catalog.column_names


def test_template_of_empty_fields_is_no_text(tmp_path: Path) -> None:
    assert make(tmp_path, text="{title}. {brand}.").texts() == ["Cup. ACME.", "Apple.", ""]


@pytest.mark.parametrize(
    ("template", "values", "text"),
    [
        ("{a}. {b}", "AB", "A. B"),
        ("{a}. {b}", "-B", "B"),
        ("{a}. {b}", "A-", "A"),
        ("{a}. {b}", "--", ""),
        ("{a} costs {b}", "-B", "B"),
        *(("{a}, {b}: {c}", values, text) for values, text in [
            ("ABC", "A, B: C"), ("AB-", "A, B"), ("A-C", "A: C"), ("-BC", "B: C"),
            ("A--", "A"), ("-B-", "B"), ("--C", "C"), ("---", ""),
        ]),
        ("Title: {a}", "A", "Title: A"),
        ("Title: {a}", "-", ""),
        ("Title: {a}, {b} now", "-B", "Title: B now"),
        ("Title: {a}, {b} now", "A-", "Title: A now"),
        # Fields in brackets are one part.
        ("{a} ({b}), {c}", "ABC", "A (B), C"),
        ("{a} ({b}), {c}", "A-C", "A, C"),
        ("{a} ({b})", "A-", "A"),
        ("{a} ({b})", "-B", "(B)"),
        ("{a} (by {b}, {c})", "ABC", "A (by B, C)"),
        ("{a} (by {b}, {c})", "A-C", "A (by C)"),
        ("{a} (by {b}, {c})", "A--", "A"),
        ("{a} [{b} ({c})]", "AB-", "A [B]"),
        ("{a} (new), {b}", "-B", "B"),
        ("{a} (new), {b}", "AB", "A (new), B"),
        ("{a}) ({b}", "AB", "A) (B"),
        ("{a}) ({b}", "-B", "B"),
    ],
)  # fmt: skip
def test_an_empty_field_goes_with_what_joins_it(template: str, values: str, text: str) -> None:
    row = {name: value.replace("-", " ") for name, value in zip("abc", values, strict=False)}
    found = pl.DataFrame(row).select(item_text(template, [*row], [*row]).alias("text"))
    assert found["text"].to_list() == [text]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{titel}", "names the field 'titel', .* did you mean 'title'"),
        ("title", "names no field; write fields as"),
        ("{title", "is not a template"),
        ("{title!r}", "has a field that is not a plain name"),
        ("{}", "names no field"),
    ],
)
def test_bad_templates(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        make(tmp_path, text=text)


def test_template_without_catalog(tmp_path: Path) -> None:
    write(tmp_path / "s", EVENTS)
    with pytest.raises(DataError, match=r"needs a catalog, but x\.inter comes without one"):
        prepare(tmp_path / "s", tmp_path / "out", PrepareConfig(text="{title}"), progress=False)


def test_a_field_called_text_that_is_the_text_is_one_column(tmp_path: Path) -> None:
    source = write(tmp_path / "s", "u\ta\t1\n", "item_id:token\ttext:token_seq\na\t hello \n")
    dataset = prepare(source, tmp_path / "out", progress=False)
    assert dataset.catalog.to_pylist() == [{"item_id": "a", "text": "hello"}]
    assert dataset.meta["fields"] == []


def test_a_field_called_text_steps_aside(tmp_path: Path) -> None:
    items = "item_id:token\traw_text:token\ttext:token\na\told\thello\n"
    source = write(tmp_path / "s", "u\ta\t1\n", items)
    dataset = prepare(source, tmp_path / "out", progress=False)
    row = {"item_id": "a", "raw_text": "old", "raw_raw_text": "hello", "text": "old. hello"}
    assert dataset.catalog.to_pylist() == [row]
    assert dataset.meta["fields"] == ["raw_text", "raw_raw_text"]


def test_fields_of_several_values_say_what_stands_between_them(tmp_path: Path) -> None:
    source = write(
        tmp_path / "s",
        "u\ta\t1\n",
        "item_id:token\ttitle:token\tclass:token_seq\na\tBig Cat\tComedy Drama\n",
    )
    dataset = prepare(source, tmp_path / "out", progress=False)
    assert dataset.texts() == ["Big Cat. Comedy Drama"]
    assert Catalog(dataset.catalog).separators == {"class": " "}
    assert dataset.catalog["class"].to_pylist() == ["Comedy Drama"]


def test_without_catalog_items_have_no_text(tmp_path: Path) -> None:
    source = write(tmp_path / "s", EVENTS)
    dataset = prepare(source, tmp_path / "out", progress=False)
    assert dataset.item_ids.to_pylist() == ["b", "a", "c"]
    assert dataset.texts() == ["", "", ""]
    assert dataset.meta["notes"][0].startswith("no catalog: items have no text")


def test_drop_textless(tmp_path: Path) -> None:
    dataset = make(tmp_path, drop_textless=True)
    assert rows_of(dataset) == {"v": ["a"], "u": ["c", "a"], "w": ["a"]}
    assert dataset.meta["counters"]["textless_items_dropped"] == 1


def test_max_history_keeps_the_newest_and_renumbers(tmp_path: Path) -> None:
    dataset = make(tmp_path, max_history=2)
    assert rows_of(dataset) == {"v": ["b", "a"], "u": ["a", "b"], "w": ["a"]}
    assert dataset.item_ids.to_pylist() == ["a", "b"]
    assert dataset.timestamps.tolist() == [5, 5, 3, 3, 1]


def test_min_history(tmp_path: Path) -> None:
    assert list(rows_of(make(tmp_path, min_history=2))) == ["v", "u"]


def test_event_types_travel_with_their_events(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text(
        "user_id,item_id,timestamp,event_type\nu,a,2,click\nv,a,1,show\nu,b,1,show\nu,c,3,\n"
    )
    dataset = prepare(log, tmp_path / "out", progress=False)
    assert dataset.event_types is not None
    assert dataset.event_type_names == ["click", "show", ""]
    assert dataset.event_types.tolist() == [1, 0, 2, 1]
    assert dataset.describe()["event_types"] == {"click": 1, "show": 2, "": 1}


# ---------------------------------------------------------------- against the literal loops


def literal_core(events: list[Event], user_min: int, item_min: int) -> list[Event]:
    while True:
        users, items = Counter(e[0] for e in events), Counter(e[1] for e in events)
        left = [e for e in events if users[e[0]] >= user_min and items[e[1]] >= item_min]
        if len(left) == len(events):
            return left
        events = left


def source_of(events: list[Event], batch: int) -> Source:
    def read() -> Iterator[pa.RecordBatch]:
        for at in range(0, len(events), batch):
            users, items, times = zip(*events[at : at + batch], strict=True)
            columns = {"user_id": users, "item_id": items, "timestamp": map(float, times)}
            yield pa.RecordBatch.from_pydict({k: list(v) for k, v in columns.items()})

    def catalog(fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
        ids = [str(i) for i in range(10)]
        yield pa.RecordBatch.from_pydict({"item_id": ids, "title": [f"item {i}" for i in ids]})

    return Source("test", (Path(__file__),), read, catalog, ("title",))


EVENT_LISTS = st.lists(
    st.tuples(st.sampled_from("uvwxy"), st.sampled_from("0123456789"), st.integers(-3, 3)),
    min_size=1,
    max_size=40,
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    EVENT_LISTS,
    st.integers(0, 3),
    st.integers(0, 3),
    st.none() | st.integers(1, 4),
    st.integers(1, 9),
)
def test_prepare_equals_the_loop(
    tmp_path: Path,
    events: list[Event],
    k_core: int,
    min_history: int,
    max_history: int | None,
    chunk: int,
) -> None:
    config = PrepareConfig(k_core=k_core, min_history=min_history, max_history=max_history)
    left = literal_core(events, max(k_core, min_history), k_core)
    expected: dict[str, list[Event]] = {}
    for event in left:
        expected.setdefault(event[0], []).append(event)
    users = [u for u in dict.fromkeys(e[0] for e in events) if u in expected]
    rows = {u: sorted(expected[u], key=lambda e: e[2])[-(max_history or 99) :] for u in users}

    def run() -> Dataset:
        return build(
            source_of(events, 3), tmp_path / "out", config, origin="test", chunk_events=chunk
        )

    if not left:
        with pytest.raises(DataError, match=f"no event is left .* k_core={k_core}"):
            run()
        return
    dataset = run()
    assert list(rows_of(dataset).items()) == [(u, [e[1] for e in rows[u]]) for u in users]
    assert dataset.timestamps.tolist() == [e[2] for u in users for e in rows[u]]
    assert dataset.item_ids.to_pylist() == sorted({e[1] for row in rows.values() for e in row})


@settings(max_examples=60, deadline=None)
@given(EVENT_LISTS, st.integers(1, 4), st.integers(1, 4), st.integers(1, 50))
def test_core_equals_the_loop(
    events: list[Event], user_min: int, item_min: int, chunk: int
) -> None:
    users = np.array(["uvwxy".index(e[0]) for e in events], dtype=np.int32)
    items = np.array([int(e[1]) for e in events], dtype=np.int32)
    ok = np.array([True] * 10 + [False])
    kept = core(users, items, ok, n_users=5, user_min=user_min, item_min=item_min, chunk=chunk)
    alive = kept.users[users] & kept.items[items]
    left = literal_core(events, user_min, item_min)
    assert [e for e, a in zip(events, alive, strict=True) if a] == left
    assert kept.counts.tolist() == [sum(e[0] == u for e in left) for u in "uvwxy"]


def test_chunks_do_not_change_a_byte(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    drawn = rng.integers((40, 10, 50), size=(5000, 3)).tolist()
    events = [(f"u{u}", str(i), float(t)) for u, i, t in drawn]
    config = PrepareConfig(k_core=5, max_history=100)
    for batch, chunk in ((7, 1000), (5000, 1 << 20)):
        build(
            source_of(events, batch),
            tmp_path / str(chunk) / "out",
            config,
            origin="test",
            chunk_events=chunk,
        )
    one, other = tmp_path / "1000" / "out", tmp_path / str(1 << 20) / "out"
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_ids_are_looked_up_more_rarely_where_there_are_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time is as much work as there are ids."""
    sizes: list[int] = []
    encode = Ids.encode

    def encoded(ids: Ids, column: pa.Array) -> np.ndarray:
        sizes.extend([len(column)] * (not ids.closed))
        return encode(ids, column)

    monkeypatch.setattr(Ids, "encode", encoded)
    events = [(f"u{n}", str(n % 10), float(n)) for n in range(250)]
    config = PrepareConfig()
    dataset = build(source_of(events, 7), tmp_path / "out", config, origin="test", chunk_events=10)
    assert sizes == [10, 10, 20, 40, 80, 80, 10]
    assert rows_of(dataset) == {user: [item] for user, item, _ in events}


def test_counts_of_all_users_are_not_added_up_for_a_few_events(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events, users = 600, 300
    drawn = np.random.default_rng(0).integers(users, size=(2, events), dtype=np.int32)
    ok = np.array([True] * users + [False])
    calls: list[int] = []
    count = np.bincount

    def counted(values: np.ndarray, **options: Any) -> np.ndarray:
        calls.append(len(values))
        return count(values, **options)

    monkeypatch.setattr(np, "bincount", counted)
    kept = core(*drawn, ok, n_users=users, user_min=1, item_min=0, chunk=1)
    assert kept.counts.sum() == events and calls == [301, 299]


# ---------------------------------------------------------------- refusals


def refuse(tmp_path: Path, events: str, items: str | None = ITEMS, **options: Any) -> str:
    source = write(tmp_path / "source", events, items)
    with pytest.raises(DataError) as error:
        prepare(source, tmp_path / "out", PrepareConfig(**options), progress=False)
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    return one_line(error)


def test_events_of_unknown_items(tmp_path: Path) -> None:
    events = EVENTS + "u\tq\t9\nu\tq\t9\nu\tr\t9\n"
    message = refuse(tmp_path, events)
    assert "3 of 9 events are of items that the catalog x.item does not have" in message
    assert "(such as 'q', 'r'); complete the catalog or pass --drop-unknown-items" in message
    config = PrepareConfig(drop_unknown_items=True)
    dataset = prepare(tmp_path / "source", tmp_path / "out", config, progress=False)
    assert dataset.n_events == 6
    assert dataset.meta["counters"]["events_of_unknown_items"] == 3
    assert "3 of 9 events were dropped" in dataset.meta["notes"][0]


def test_two_items_with_one_id(tmp_path: Path) -> None:
    message = refuse(tmp_path, EVENTS, ITEMS + "a\tAlmond\t\t1\n")
    assert "1 item ids have different rows in the catalog, the first is 'a'" in message
    config = PrepareConfig(duplicate_items="first")
    dataset = prepare(tmp_path / "source", tmp_path / "out", config, progress=False)
    assert dataset.texts() == ["Cup. ACME", "Apple", ""]


def test_identical_rows_are_one(tmp_path: Path) -> None:
    source = write(tmp_path / "source", EVENTS, ITEMS + "a\tApple\t\t1\n")
    dataset = prepare(source, tmp_path / "out", progress=False)
    assert dataset.n_items == 3
    assert "1 repeated catalog rows were left out" in dataset.meta["notes"]


def test_log_without_events(tmp_path: Path) -> None:
    assert "x.inter has no events; give a log with at least one" in refuse(tmp_path, "")


def test_catalog_without_items(tmp_path: Path) -> None:
    message = refuse(tmp_path, EVENTS, "item_id:token\ttitle:token_seq\n")
    assert "the catalog of x.item has no rows" in message


def test_limits_that_leave_nothing(tmp_path: Path) -> None:
    message = refuse(tmp_path, EVENTS, k_core=9)
    assert "no event is left of 6 after filtering with k_core=9, min_history=0" in message


TYPED = (
    "user_id,item_id,timestamp,event_type\n"
    "u,a,86400,exposure\nu,a,86401,click\nu,b,172800,exposure\nv,b,172801,click\n"
)


def typed(tmp_path: Path, **options: Any) -> Dataset:
    (tmp_path / "log.csv").write_text(TYPED)
    config = PrepareConfig(event_type="event_type", **options)
    return prepare(tmp_path / "log.csv", tmp_path / "out", config, progress=False)


def test_only_and_before_choose_events(tmp_path: Path) -> None:
    clicks = typed(tmp_path, only=("click",))
    assert rows_of(clicks) == {"u": ["a"], "v": ["b"]}
    assert clicks.event_type_names == ["click"]
    assert clicks.meta["counters"]["events_left_out"] == 2
    assert "2 of 4 events are left out by only=click" in clicks.meta["notes"]
    early = typed(tmp_path, before="1970-01-03")  # the second of midnight is out
    assert rows_of(early) == {"u": ["a", "a"]}
    assert early.meta["options"]["before"] == 172800.0
    assert rows_of(typed(tmp_path, before=172801.0)) == {"u": ["a", "a", "b"]}
    assert rows_of(typed(tmp_path, only=("click",), before="172801")) == {"u": ["a"]}


def test_only_and_before_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"only=clik: .*did you mean 'click'\?; there are exposure"):
        typed(tmp_path, only=("clik",))
    with pytest.raises(DataError, match=r"none of the 4 events is kept by only=click before=5\.0"):
        typed(tmp_path, only=("click",), before=5)
    with pytest.raises(ValidationError, match="'soon' is no time; write a date such as"):
        typed(tmp_path, before="soon")
    assert "the log has no event types; name their column" in refuse(
        tmp_path / "untyped", EVENTS, only=("click",)
    )


def test_too_many_event_types(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    rows = "".join(f"u,i,{n},type{n}\n" for n in range(200))
    log.write_text("user_id,item_id,timestamp,event_type\n" + rows)
    with pytest.raises(DataError, match="event_type has more than 127 different values"):
        prepare(log, tmp_path / "out", progress=False)


def test_out_is_somebody_elses_folder(tmp_path: Path) -> None:
    source = write(tmp_path / "source", EVENTS, ITEMS)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="exists and is not a prepared data set, so it is not"):
        prepare(source, out, progress=False)
    assert (out / "thesis.tex").read_text() == "years of work"
    with pytest.raises(DataError, match="is a file, not a folder"):
        prepare(source, out / "thesis.tex", progress=False)


def test_out_with_a_foreign_dataset_json(tmp_path: Path) -> None:
    source = write(tmp_path / "source", EVENTS, ITEMS)
    out = tmp_path / "out"
    out.mkdir()
    (out / "dataset.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(DataError, match="is not overwritten"):
        prepare(source, out, progress=False)


def test_an_empty_folder_and_a_data_set_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    first = make(tmp_path)
    second = make(tmp_path, k_core=2)
    assert second.fingerprint != first.fingerprint
    assert make(tmp_path).fingerprint == first.fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_a_failed_run_leaves_the_old_data_set(tmp_path: Path) -> None:
    before = make(tmp_path).fingerprint
    with pytest.raises(DataError):
        make(tmp_path, k_core=9)
    assert make(tmp_path).fingerprint == before


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sequences, "_reserve", full)
    message = refuse(tmp_path, EVENTS)
    assert "the disk is full; nothing was replaced, free some space" in message


def test_a_kill_leaves_nothing_under_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "_write_meta", killed)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_config_is_closed_and_frozen() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        PrepareConfig.model_validate({"kcore": 5})
    with pytest.raises(ValidationError):
        PrepareConfig(k_core=-1)
    assert PrepareConfig.model_validate({"timestamp": "none"}).timestamp is None


def test_progress_goes_to_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Report, "SECONDS_BETWEEN_LINES", 0.0)
    source = write(tmp_path / "source", EVENTS, ITEMS)
    prepare(source, tmp_path / "out")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "events: 6 (" in captured.err
    assert "note: 2 users have fewer than 3 events" in captured.err
