"""Logs as a shop exports them: nothing is lost, doubled, reordered or renamed without a word."""

from __future__ import annotations

import datetime
import json
import uuid
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.support.errors import one_line
from tests.support.logs import catalog_of, events_of, lines, write

from l2rec.data.catalog import Catalog
from l2rec.data.dataset import Dataset
from l2rec.data.extend import extend
from l2rec.data.formats.columns import Columns
from l2rec.data.formats.open import open_source
from l2rec.data.prepare import PrepareConfig, prepare
from l2rec.errors import DataError
from l2rec.service.attributes import Attributes


def table(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({"user_id": ["u"], "item_id": ["i"], "timestamp": [1.0]} | columns), path
    )
    return path


def refused(path: Path, **columns: Any) -> str:
    with pytest.raises(DataError) as error:
        events_of(open_source(path, columns=Columns(**columns)))
    return one_line(error)


# -- times ---------------------------------------------------------------------------------------


def test_parts_of_a_log_have_times_of_one_form(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", timestamp=[datetime.datetime(2023, 1, 1)])
    table(tmp_path / "b.parquet", timestamp=[1_600_000_000_000])
    assert "b.parquet, row 1: timestamp 1600000000000 is a number, but" in refused(tmp_path)


def test_numbers_of_two_units_are_refused(tmp_path: Path) -> None:
    log = write(
        tmp_path / "log.csv",
        "user_id,item_id,timestamp\nu,a,1700000000000\nu,b,0\nu,c,1700000001\n",
    )
    message = refused(log)
    assert "'1700000001' (" in message and "line 4) looks like seconds" in message
    assert "'1700000000000' (" in message and message.endswith("write all in one")


def test_a_date_without_separators_is_no_number_of_milliseconds(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp\nu,a,20231128140500\n")
    assert "line 2: timestamp '20231128140500' looks like a date without sep" in refused(log)


def test_days_without_separators_are_no_seconds(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp\nu,a,20231128\nu,b,20231201\n")
    assert "line 2: timestamp '20231128' looks like a date without sep" in refused(log)
    table(
        tmp_path / "log.parquet",
        user_id=["u"] * 2,
        item_id=["a"] * 2,
        timestamp=[20231128, 19991231],
    )
    assert "row 1: timestamp 20231128 looks like a date" in refused(tmp_path / "log.parquet")
    counts = write(
        tmp_path / "counts.csv", "user_id,item_id,timestamp\nu,a,20231231\nu,b,20231232\n"
    )
    assert [time for _, _, time in events_of(open_source(counts))] == [20231231, 20231232]


@pytest.mark.parametrize("offset", ["+01", "+0100", "+01:00"])
def test_offsets_as_databases_write_them(tmp_path: Path, offset: str) -> None:
    log = write(
        tmp_path / "log.csv", f"user_id,item_id,timestamp\nu,a,2023-11-28 14:05:00{offset}\n"
    )
    [(_, _, time)] = events_of(open_source(log))
    assert time == datetime.datetime(2023, 11, 28, 13, 5, tzinfo=datetime.UTC).timestamp()


@pytest.mark.parametrize(
    "times",
    [
        pa.array([datetime.time(1, 2)]),
        pa.array([datetime.timedelta(1)]),
        pa.array([{"a": 1}]),
        pa.array([b"x"]),
    ],
)
def test_columns_that_are_no_times(tmp_path: Path, times: pa.Array) -> None:
    assert "log.parquet, row 1: timestamps of type" in refused(
        table(tmp_path / "log.parquet", timestamp=times)
    )


def test_dates_of_a_pandas_category(tmp_path: Path) -> None:
    times = pa.array(["2023-11-28"]).dictionary_encode()
    [(_, _, time)] = events_of(open_source(table(tmp_path / "log.parquet", timestamp=times)))
    assert time == datetime.datetime(2023, 11, 28, tzinfo=datetime.UTC).timestamp()


def test_a_date_limits_a_log_in_milliseconds(tmp_path: Path) -> None:
    days = [datetime.datetime(2024, 1, day, tzinfo=datetime.UTC) for day in (1, 2, 3, 4)]
    rows = "".join(f"u,{n},{1000 * int(day.timestamp())}\n" for n, day in enumerate(days))
    log = write(tmp_path / "log.csv", f"user_id,item_id,timestamp\n{rows}")
    for before in ("2024-01-03", str(1000 * days[2].timestamp())):
        config = PrepareConfig(before=before)  # type: ignore[arg-type]
        assert prepare(log, tmp_path / "out", config, progress=False).n_events == 2
    config = PrepareConfig(before="2024-01-03", timestamp=None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="--before needs times"):
        prepare(log, tmp_path / "other", config, progress=False)


def test_a_newer_log_in_another_unit_is_refused(tmp_path: Path) -> None:
    rows = [("u", item, 1_700_000_000 + n) for n, item in enumerate("abc")]
    columns = ["user_id", "item_id", "timestamp"]
    events = pl.DataFrame(rows, schema=columns, orient="row")
    base = Dataset.from_frames(events, out=tmp_path / "base", progress=False)
    events.with_columns(pl.col("timestamp") * 1000).write_csv(tmp_path / "later.csv")
    with pytest.raises(DataError, match=r"is in milliseconds, those of .* are in seconds"):
        extend(base, open_source(tmp_path / "later.csv"), tmp_path / "out", progress=False)


def test_a_newer_log_without_events_is_refused(tmp_path: Path) -> None:
    base = prepare(
        table(tmp_path / "a.parquet"), tmp_path / "base", PrepareConfig(), progress=False
    )
    write(tmp_path / "later.csv", "user_id,item_id,timestamp\n")
    with pytest.raises(DataError, match=r"later\.csv has no events"):
        extend(base, open_source(tmp_path / "later.csv"), tmp_path / "out", progress=False)


def test_a_newer_catalog_may_be_empty(tmp_path: Path) -> None:
    head = "user_id,item_id,timestamp\n"
    log = write(tmp_path / "log.csv", f"{head}u,a,1700000000\n")
    items = write(tmp_path / "items.csv", "item_id,title\na,A\n")
    base = prepare(log, tmp_path / "base", PrepareConfig(), items=items, progress=False)
    later = write(tmp_path / "later.csv", f"{head}u,a,1700000001\n")
    none = write(tmp_path / "none.csv", "item_id,title\n")
    grown = extend(base, open_source(later, items=none), tmp_path / "out", progress=False)
    assert (grown.n_events, grown.texts()) == (2, ["A"])


# -- files ---------------------------------------------------------------------------------------


def test_logs_in_subfolders_are_named(tmp_path: Path) -> None:
    table(tmp_path / "log" / "2024.parquet")
    table(tmp_path / "log" / "old" / "2023.parquet")
    table(tmp_path / "log" / "old" / "2022" / "a.parquet")
    source = open_source(tmp_path / "log")
    assert len(events_of(source)) == 1
    [note] = [note for note in source.notes if "not read" in note]
    assert "old/2022/a.parquet, old/2023.parquet" in note


def test_columns_that_nobody_chose_are_named(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp\nu,a,1\n")
    items = write(tmp_path / "items.csv", "item_id,title,price,picture\na,Red cup,3.5,1.jpg\n")
    told = prepare(log, tmp_path / "all", PrepareConfig(), items=items, progress=False)
    [note] = [note for note in told.meta["notes"] if "reads as" in note]
    assert note.startswith("an item reads as its columns title, price, picture, joined")
    config = PrepareConfig(text="{title}")
    chosen = prepare(log, tmp_path / "chosen", config, items=items, progress=False)
    assert chosen.texts() == ["Red cup"] and "reads as" not in str(chosen.meta["notes"])


@pytest.mark.parametrize("first", ["sep=;", "SEP=,"])
def test_a_line_for_a_spreadsheet_is_named(tmp_path: Path, first: str) -> None:
    log = write(tmp_path / "log.csv", f"{first}\nuser_id;item_id;timestamp\nu;a;1\n")
    assert f"line 1: '{first}' is a note to a spreadsheet" in refused(log)


def test_parts_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        table(tmp_path / f"part-{number}.parquet", item_id=[f"i{number}"])
    source = open_source(tmp_path, columns=Columns(timestamp=None))
    assert [item for _, item, _ in events_of(source)] == ["i1", "i2", "i10"]


# -- ids -----------------------------------------------------------------------------------------


def test_whole_numbers_that_come_as_floats_are_whole(tmp_path: Path) -> None:
    ids = {"user_id": [123456789012.0, 7.0], "item_id": [4006381333931.0, 8.0]}
    log = table(tmp_path / "log.parquet", **ids, timestamp=[1.0, 2.0])
    assert events_of(open_source(log)) == [
        ("123456789012", "4006381333931", 1.0),
        ("7", "8", 2.0),
    ]
    halves = table(tmp_path / "halves.parquet", item_id=[7.5])
    assert events_of(open_source(halves)) == [("u", "7.5", 1.0)]
    rows = [
        {"user_id": "u", "item_id": item, "timestamp": n} for n, item in enumerate([7, 7.0, "7"])
    ]
    log = lines(tmp_path / "log.jsonl", rows, json.dumps)
    assert [item for _, item, _ in events_of(open_source(log))] == ["7"] * 3


def test_uuids(tmp_path: Path) -> None:
    one = uuid.UUID(int=7)
    stored = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([one.bytes], pa.binary(16)))
    log = table(tmp_path / "log.parquet", user_id=stored)
    assert events_of(open_source(log)) == [(str(one), "i", 1.0)]


@pytest.mark.parametrize("ids", [pa.array([{"a": 1}]), pa.array([b"\xb5"])])
def test_ids_that_are_none(tmp_path: Path, ids: pa.Array) -> None:
    message = refused(table(tmp_path / "log.parquet", user_id=ids))
    assert "row 1: user ids of type" in message


def test_ids_inside_objects_are_named(tmp_path: Path) -> None:
    rows = [{"user_id": {"$oid": "abc"}, "item_id": "i", "timestamp": 1}]
    log = lines(tmp_path / "log.jsonl", rows, json.dumps)
    assert "line 1: the id 'user_id' is an object; name what is in it: user_id.$oid" in refused(log)
    assert events_of(open_source(log, columns=Columns(user="user_id.$oid"))) == [("abc", "i", 1.0)]


def test_a_catalog_of_flat_ids_beside_a_nested_log(tmp_path: Path) -> None:
    rows = [{"user_id": "u", "product": {"id": "i"}, "timestamp": 1}]
    log = lines(tmp_path / "log.jsonl", rows, json.dumps)
    items = lines(tmp_path / "shop.jsonl", [{"item_id": "i", "title": "hat"}], json.dumps)
    source = open_source(log, items=items, columns=Columns(item="product.id"))
    assert catalog_of(source) == {"i": {"title": "hat"}}
    assert "shop.jsonl: ids of items are read from 'item_id'" in source.notes


def test_zeros_that_were_lost_are_thought_of(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp\nu,1,1\nu,2,2\n")
    items = write(tmp_path / "items.csv", "item_id,title\n00001,hat\n")
    config = PrepareConfig(drop_unknown_items=True)
    with pytest.raises(DataError, match=r"no event is left: .*'1', '2'.*such as '00001' \(are zer"):
        prepare(log, tmp_path / "out", config, items=items, progress=False)


# -- the catalog ---------------------------------------------------------------------------------


def test_items_without_events_are_told(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp\nu,1,1\nu,2,2\n")
    items = write(tmp_path / "items.csv", "item_id,title\n1,a\n2,b\n3,c\n")
    notes = prepare(log, tmp_path / "out", items=items, progress=False).meta["notes"]
    assert any(note.startswith("1 items of the catalog without events") for note in notes)
    kept = prepare(
        log, tmp_path / "all", PrepareConfig(keep_all_items=True), items=items, progress=False
    )
    assert kept.n_items == 3 and not any("left out" in note for note in kept.meta["notes"])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_each_of_several_categories_is_a_value_to_filter_by(tmp_path: Path, kind: str) -> None:
    rows = [
        {"item_id": "1", "title": "boot", "categories": ["Damen", "Schuhe"]},
        {"item_id": "2", "title": "hat, red", "categories": ["Herren"]},
    ]
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp\nu,1,1\nu,2,2\n")
    items = tmp_path / f"shop.{kind}"
    if kind == "jsonl":
        lines(items, rows, json.dumps)
    else:
        pl.DataFrame(rows).write_parquet(items)
    data = prepare(log, tmp_path / "out", items=items, progress=False)
    attributes = Attributes.of_catalog(Catalog(data.catalog))
    found = attributes.mask({"categories": ["Schuhe"]})
    assert found is not None and found.tolist() == [True, False]
    whole = attributes.mask({"title": ["hat, red"]})
    assert whole is not None and whole.tolist() == [False, True]


def test_a_title_that_was_cut_inside_an_emoji(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp\nu,1,1\n")
    items = write(
        tmp_path / "shop.jsonl",
        '{"item_id": "1", "title": "hat \\ud83d"}\n{"item_id": "2", "title": "\\ud83d\\ude00"}\n',
    )
    assert catalog_of(open_source(log, items=items)) == {
        "1": {"title": "hat \N{REPLACEMENT CHARACTER}"},
        "2": {"title": "\N{GRINNING FACE}"},
    }
