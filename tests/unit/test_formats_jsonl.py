"""JSON Lines of any keys, and catalogs of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.errors import one_line
from tests.support.logs import catalog_of, events_of, lines, write

from l2rec.data.formats.columns import Columns
from l2rec.data.formats.open import open_source
from l2rec.data.prepare import PrepareConfig, prepare
from l2rec.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"who": "u", "what": {"id": 7}, "at": 1.5, "kind": "play"},
    {"who": "u", "what": {"id": 8}, "at": 2, "kind": "skip"},
    {"who": "v", "what": {"id": 7}, "at": 3, "kind": "play"},
]
COLUMNS = Columns(user="who", item="what.id", timestamp="at", event_type="kind")
EVENTS = [("u", "7", 1.5), ("u", "8", 2.0), ("v", "7", 3.0)]


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        source = open_source(path, columns=Columns(**options.pop("columns", {})), **options)
        events_of(source)
        catalog_of(source)
    return one_line(error)


@pytest.mark.parametrize("name", ["log.jsonl", "log.json", "log.ndjson", "log.jsonl.gz"])
@pytest.mark.parametrize("write_row", [json.dumps, repr])
@pytest.mark.parametrize("block_bytes", [30, 1 << 20])
def test_options_name_the_keys(tmp_path: Path, name: str, write_row: Any, block_bytes: int) -> None:
    file = lines(tmp_path / name, ROWS, write_row)
    for path, format in ((file, None), (tmp_path, None), (file, "jsonl")):
        source = open_source(path, format=format, columns=COLUMNS, block_bytes=block_bytes)
        assert source.format == "jsonl"
        assert events_of(source) == events_of(source) == EVENTS
        types = [r["event_type"] for b in source.events() for r in b.to_pylist()]
        assert types == ["play", "skip", "play"]


def test_keys_as_csv_has_them_need_no_options(tmp_path: Path) -> None:
    rows = [
        {"user_id": 1, "item_id": "a", "timestamp": "2009-05-04", "event_type": True},
        {"user_id": 1, "item_id": "b", "timestamp": "2009-05-04T00:00:01Z", "event_type": False},
    ]
    source = open_source(lines(tmp_path / "log.jsonl", rows, json.dumps))
    assert events_of(source) == [("1", "a", 1241395200.0), ("1", "b", 1241395201.0)]
    types = [r["event_type"] for b in source.events() for r in b.to_pylist()]
    assert types == ["true", "false"]
    source = open_source(tmp_path, columns=Columns(timestamp=None), block_bytes=20)
    assert events_of(source) == [("1", "a", 0.0), ("1", "b", 1.0)]


def test_a_key_with_a_dot_is_looked_up_as_it_is(tmp_path: Path) -> None:
    rows = [{"user.id": "u", "user": {"id": "x"}, "item_id": "a", "timestamp": 1}]
    file = lines(tmp_path / "log.jsonl", rows, json.dumps)
    assert events_of(open_source(file, columns=Columns(user="user.id"))) == [("u", "a", 1.0)]


@pytest.mark.parametrize("block_bytes", [10, 1 << 20])
def test_ids_of_mixed_kinds_stay_as_they_are(tmp_path: Path, block_bytes: int) -> None:
    ids = [7, "7", "007", 2**70, "null"]
    rows = [{"user_id": "u", "item_id": i, "timestamp": n} for n, i in enumerate(ids)]
    source = open_source(lines(tmp_path / "x.jsonl", rows, json.dumps), block_bytes=block_bytes)
    assert [item for _, item, _ in events_of(source)] == ["7", "7", "007", str(2**70), "null"]


def test_a_catalog_has_texts_and_numbers(tmp_path: Path) -> None:
    log = lines(tmp_path / "log.jsonl", [{"user_id": 1, "sku": 7, "timestamp": 1}], json.dumps)
    goods: list[dict[str, Any]] = [
        {"sku": 7, "title": "A <b>", "tags": ["x", "y"], "price": 1.5, "new": True, "at": {"a": 1}},
        {"sku": 8, "title": None, "tags": [], "price": None, "shop": "S", "who": [{"a": 1}]},
    ]
    lines(tmp_path / "items.jsonl", goods, json.dumps)
    for items in (None, tmp_path / "items.jsonl"):
        path = log if items else tmp_path
        source = open_source(path, items=items, columns=Columns(item="sku"))
        assert (source.fields, source.more_fields) == (("title", "tags", "shop"), ("price", "new"))
        assert catalog_of(source, "title", "tags", "price", "new", "shop") == {
            "7": {"title": "A <b>", "tags": "x, y", "price": "1.5", "new": "true", "shop": ""},
            "8": {"title": "", "tags": "", "price": "", "new": "", "shop": "S"},
        }
        assert source.notes == ["items.jsonl: not read, as they hold objects: 'at', 'who'"]


def test_the_same_log_as_csv_and_as_json_lines(tmp_path: Path) -> None:
    write(tmp_path / "c" / "log.csv", "user_id,item_id,timestamp\nu,7,1\nv,7,2\n")
    write(tmp_path / "c" / "items.csv", "item_id,title\n7,T\n")
    rows = [{"user_id": u, "item_id": 7, "timestamp": t} for u, t in (("u", 1), ("v", 2))]
    lines(tmp_path / "j" / "log.jsonl", rows, json.dumps)
    lines(tmp_path / "j" / "items.jsonl", [{"item_id": 7, "title": "T"}], json.dumps)
    found = {
        prepare(tmp_path / name, tmp_path / "out", PrepareConfig(), progress=False).fingerprint
        for name in ("c", "j")
    }
    assert len(found) == 1


def test_tables_beside_json_of_one_value_or_a_catalog_are_the_log(tmp_path: Path) -> None:
    write(tmp_path / "log.csv", "user_id,item_id,timestamp\nu,7,1\n")
    write(tmp_path / "x.index.json", json.dumps({"7": ["<a_1>"], "8": ["<a_2>"]}, indent=1))
    lines(tmp_path / "items.jsonl", [{"item_id": 7, "title": "T"}], json.dumps)
    source = open_source(tmp_path)
    assert (source.format, events_of(source)) == ("csv", [("u", "7", 1.0)])
    assert catalog_of(source) == {"7": {"title": "T"}}


@pytest.mark.parametrize(
    ("rows", "columns", "says"),
    [
        (ROWS, {}, "log.jsonl has no key 'user_id', it has who, what, at, kind; pass --user KEY"),
        (ROWS, {"user": "who", "item": "waht"}, "no key 'waht', it has who, what, at, kind; did"),
        (ROWS, {"user": "who", "item": "what.no"}, "has no key 'what.no'"),
        (ROWS, {"user": "who", "item": "what.id"}, "or --timestamp none if the events are in"),
        (
            ROWS,
            {"user": "who", "item": "what.id", "timestamp": "at", "event_type": "type"},
            "has no key 'type', it has who, what, at, kind; pass --event-type KEY",
        ),
    ],
)
def test_missing_keys(tmp_path: Path, rows: Any, columns: Any, says: str) -> None:
    assert says in refusal(lines(tmp_path / "log.jsonl", rows, json.dumps), columns=columns)


GOOD = {"user_id": "u", "item_id": "a", "timestamp": 1}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([GOOD, {"item_id": "a", "timestamp": 1}], "log.jsonl, line 2 has no user id"),
        ([GOOD, GOOD | {"item_id": None}], "log.jsonl, line 2 has no item id"),
        ([GOOD, GOOD | {"timestamp": None}], "log.jsonl, line 2: timestamp is missing"),
        ([GOOD, GOOD | {"timestamp": "soon"}], "line 2: timestamp 'soon' is not a number"),
        (
            [GOOD, GOOD | {"timestamp": "2020-01-01"}],
            "log.jsonl, line 2: timestamp '2020-01-01' is a date, but",
        ),
        ([GOOD | {"item_id": ["a", "b"]}], "column 'item_id' holds a list in each row"),
        ([GOOD | {"history": ["b"]}], "log.jsonl has samples, not events: column 'history'"),
        ([GOOD, 3], "log.jsonl, line 2 is neither a JSON object nor a Python dict: '3'"),
    ],
)
@pytest.mark.parametrize("block_bytes", [10, 1 << 20])
def test_bad_lines(tmp_path: Path, rows: Any, says: str, block_bytes: int) -> None:
    path = lines(tmp_path / "log.jsonl", rows, json.dumps)
    assert says in refusal(path, block_bytes=block_bytes)


def test_other_lists_are_named(tmp_path: Path) -> None:
    path = lines(tmp_path / "log.jsonl", [GOOD | {"tags": ["x"]}], json.dumps)
    assert open_source(path).notes == [
        "log.jsonl: not read, though by type, name or content it holds lists: 'tags'"
    ]


def test_two_logs_and_a_catalog_without_its_key(tmp_path: Path) -> None:
    log = lines(tmp_path / "a.jsonl", [GOOD], json.dumps)
    items = lines(tmp_path / "b.jsonl", [{"id": "a", "title": "T"}, {"title": "U"}], json.dumps)
    message = "has 2 JSON Lines files (a.jsonl, b.jsonl), not one; give the path of the file"
    assert message in refusal(tmp_path)
    message = refusal(log, items=items)
    assert "b.jsonl has no key 'item_id', it has id, title" in message
    assert message.endswith("a log with keys or columns needs to have the same one")
    columns = {"item": "id"}
    log = lines(tmp_path / "c.jsonl", [{"user_id": 1, "id": "a", "timestamp": 1}], json.dumps)
    assert "b.jsonl, line 2 has no item id" in refusal(log, items=items, columns=columns)
