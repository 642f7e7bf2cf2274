"""What a log holds and nobody reads: histories, lists, splits, text in other encodings."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.support.errors import one_line

from l2rec.data.formats.columns import Columns
from l2rec.data.formats.files import File
from l2rec.data.formats.objects import one_value
from l2rec.data.formats.open import open_source
from l2rec.data.formats.source import Source
from l2rec.errors import DataError

LOG = "user_id,item_id,timestamp\nu,a,1\né,b,2\n"
UNREAD = "not read, though by type, name or content it holds lists"
PREFIXES = ["u,a,b,1", "u,a b,c,2", "v,b,c,1", "v,b c,a,2", "u,a b c,d,3"]
"""Users, the items before, an item, a time."""
EVENTS = [("u", "a", 1.0), ("é", "b", 2.0)]


def opened(path: Path, format: str | None = None, **columns: Any) -> Source:
    return open_source(path, format=format, columns=Columns(**columns))


def events_of(source: Source) -> list[tuple[str, str, float]]:
    rows = [row for batch in source.events() for row in batch.to_pylist()]
    return [(r["user_id"], r["item_id"], r["timestamp"]) for r in rows]


def refusal(path: Path, **columns: Any) -> str:
    with pytest.raises(DataError) as error:
        events_of(opened(path, **columns))
    return one_line(error)


# -- histories, lists and splits -----------------------------------------------------------------


def test_recbole_samples_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.inter"
    path.write_text(
        "user_id:token\titem_id_list:token_seq\titem_id:token\n1\ta\tb\n1\ta b\tc\n2\tb\tc\n"
    )
    message = refusal(path, timestamp=None)
    assert "t.inter has samples, not events: column 'item_id_list' holds the history" in message
    assert "prepare the log that the samples were made from" in message


@pytest.mark.parametrize(
    ("header", "rows"),
    [
        ("user_id,parent_asin,rating,timestamp,history", ["u,a,5,1,", "u,b,5,2,a", "u,c,5,3,a b"]),
        ("user_id,history_item_id,parent_asin,timestamp", ["u,\"['a', 'b']\",c,1"]),
        ("user_id,item_seq,parent_asin,timestamp", ["u,a,b,1"]),
        ("user_id,clicks_list,parent_asin,timestamp", ["u,a|b,c,1"]),
        ("user_id,hist,parent_asin,timestamp", ["u,a b,c,1"]),
        ("user_id,past_items,parent_asin,timestamp", PREFIXES),
        ("user_id,prev,parent_asin,timestamp", [row.replace(" ", "|") for row in PREFIXES]),
        ("user_id,input,parent_asin,timestamp", [row.replace(" ", ";") for row in PREFIXES]),
        ("user_id,clicked_before,parent_asin,timestamp", [*PREFIXES[::-1]]),
        ("user_id,seen,parent_asin,timestamp", ["u,a,b,1", 'u,"b,a",c,2', 'u,"c,b,a",d,3']),
        ("user_id,seen,parent_asin,timestamp", ["u,['a'],b,1", "u,\"['a', 'b']\",c,2"]),
    ],
)
def test_separated_samples_are_refused(tmp_path: Path, header: str, rows: list[str]) -> None:
    path = tmp_path / "test.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    assert "test.csv has samples, not events" in refusal(path, item="parent_asin")


@pytest.mark.parametrize("separated", [True, False])
def test_samples_of_json_lines_are_refused_by_what_they_hold(
    tmp_path: Path, separated: bool
) -> None:
    path = tmp_path / "t.jsonl"
    rows = [
        {"user_id": user, "item_id": n, "seen": list(range(10, n)), "timestamp": n}
        for user in (1, 2)
        for n in range(11, 15)
    ]
    for row in rows if separated else ():
        row["seen"] = " ".join(map(str, row["seen"]))
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert "column 'seen' holds the history before" in refusal(path)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert "column 'seen' holds the history before" in refusal(tmp_path / "t.parquet")


def test_what_is_no_history_is_not_taken_for_one(tmp_path: Path) -> None:
    """Labels, texts and numbers that are also ids; what was bought together is named at least."""
    path = tmp_path / "log.csv"
    draw = random.Random(0)
    lines = ["user_id,item_id,timestamp,tags,rating,title,together,others"]
    for user in range(40):
        for basket in range(3):
            bought = [str(n) for n in draw.sample(range(1, 50), draw.randint(2, 3))]
            for item in bought:
                tags = "|".join(draw.sample(["new", "red", "for a walk", "5"], 2))
                others = " ".join(other for other in bought if other != item)
                cells = [f"u{user}", item, str(basket), tags, str(draw.randint(1, 5))]
                lines.append(",".join([*cells, "12 red 7 or more", " ".join(bought), others]))
    path.write_text("\n".join(lines) + "\n")
    assert opened(path).notes == [f"log.csv: {UNREAD}: 'together', 'others'"]


def test_other_lists_are_named_and_scalars_are_not(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(
        'user_id,item_id,timestamp,tags,wish_list,title\nu,a,1,"[1, 2]",yes,Some [words] here\n'
    )
    source = opened(path)
    assert events_of(source) == [("u", "a", 1.0)]
    assert source.notes == [f"log.csv: {UNREAD}: 'tags', 'wish_list'"]
    path = tmp_path / "x.inter"
    path.write_text("user_id:token\titem_id:token\ttimestamp:float\tname:token_seq\nu\ta\t1\tA b\n")
    assert opened(path).notes == [f"x.inter: {UNREAD}: 'name'"]


def test_parquet_lists(tmp_path: Path) -> None:
    rows: dict[str, Any] = {"user_id": ["u"], "item_id": ["a"], "timestamp": [1.0]}
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table(rows | {"history": [["b"]]}), path)
    assert "log.parquet has samples, not events" in refusal(path)
    pq.write_table(pa.table(rows | {"tags": [["b"]], "n": [[1, 2]]}), path)
    assert opened(path).notes == [f"log.parquet: {UNREAD}: 'tags', 'n'"]
    pq.write_table(pa.table(rows | {"item_id": [["a", "b"]]}), path)
    assert "column 'item_id' holds a list in each row, so a row is not one event" in refusal(path)


def test_parquet_files_that_are_no_parts_of_one_log(tmp_path: Path) -> None:
    rows: dict[str, Any] = {"user_id": ["u"], "item_id": ["a"], "timestamp": [1.0]}
    pq.write_table(pa.table(rows), tmp_path / "likes.parquet")
    pq.write_table(pa.table(rows), tmp_path / "skips.parquet")
    assert opened(tmp_path).notes == [
        "2 files were read as parts of one log: likes.parquet, skips.parquet"
    ]
    pq.write_table(pa.table(rows | {"event_type": ["like"]}), tmp_path / "multi_event.parquet")
    assert "different columns, such as likes.parquet and multi_event.parquet" in refusal(tmp_path)


def test_splits_in_several_parquet_files_follow_each_other(tmp_path: Path) -> None:
    for item, name in enumerate(("train-0-of-2", "train-1-of-2", "validation", "test")):
        rows = pa.table({"user_id": ["u"], "item_id": [str(item)]})
        pq.write_table(rows, tmp_path / f"{name}.parquet")
    source = opened(tmp_path, timestamp=None)
    assert [item for _, item, _ in events_of(source)] == list("0123")
    assert source.notes[1].startswith("splits that the names of these files tell were not kept")


@pytest.mark.parametrize("ending", ["inter", "csv"])
def test_splits_are_named(tmp_path: Path, ending: str) -> None:
    typed = "user_id:token\titem_id:token\ttimestamp:float\nu\ta\t1\n"
    text = typed if ending == "inter" else "user_id,item_id,timestamp\nu,a,1\n"
    for split in ("train", "test"):
        (tmp_path / f"x.{split}.{ending}").write_text(text)
    message = refusal(tmp_path)
    assert "these look like the splits of one log, and each alone is a part of it" in message
    assert "give the path of the file" not in message
    assert message.endswith("give a folder with the train, valid and test files of one log alone")
    assert opened(tmp_path / f"x.train.{ending}").notes == [
        f"x.train.{ending} is one split (train); x.test.{ending} beside it is not read, so events "
        "may be missing"
    ]
    (tmp_path / f"x.valid.{ending}").write_text(text)
    assert opened(tmp_path / f"x.train.{ending}").notes == [
        f"x.train.{ending} is one split (train); x.test.{ending}, x.valid.{ending} beside it are "
        "not read, so events may be missing; give a folder with these files alone to read them "
        "all, with their splits"
    ]
    assert len(events_of(opened(tmp_path))) == 3


# -- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path: Path, encoding: str) -> None:
    for end in ("\n", "\r\n", "\r"):
        for separator in (",", "\t"):
            path = tmp_path / "log.csv"
            path.write_bytes(LOG.replace("\n", end).replace(",", separator).encode(encoding))
            assert events_of(opened(path)) == EVENTS
            assert events_of(opened(path, encoding=encoding)) == EVENTS


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "cp1252", "shift_jis", "utf-32-be"])
def test_encodings_by_name(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(LOG.replace("é", "e").encode(encoding))
    expected = [(u.replace("é", "e"), i, t) for u, i, t in EVENTS]
    assert events_of(opened(path, encoding=encoding)) == expected
    if encoding.startswith("utf"):
        assert "line 1 has NUL characters, as text in UTF-16 has" in refusal(path)


@pytest.mark.parametrize("encoding", ["rot13", "hex", "undefined", "klingon"])
def test_what_is_no_encoding(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(LOG)
    assert encoding in refusal(path, encoding=encoding)


def test_text_that_is_not_in_its_encoding(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(LOG.encode("utf-16") + b"\x00")
    message = refusal(path)
    assert "log.csv, line 4: byte 0x00 at position" in message and "is not utf-16" in message
    path.write_text(LOG)
    assert "line 3: byte 0xc3 at position 32 is not ascii" in refusal(path, encoding="ascii")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_carriage_returns_alone_end_lines(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "mac.csv"
    path.write_bytes(LOG.replace("\n", "\r").encode(encoding))
    assert events_of(opened(path)) == EVENTS
    path.write_bytes(LOG.replace("\n", "\r").replace(",2", "").encode(encoding))
    assert "mac.csv, line 3 has 2 columns, not the 3 of its header" in refusal(path)


def test_a_stray_carriage_return(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(b"user_id,item_id,timestamp\nu,a,1\nu,b\rc,2\n")
    assert "log.csv, line 3 has 2 columns, not the 3 of its header" in refusal(path)


# -- the shape of a table ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dates",
    [
        ("2009-05-04", "2009-05-05"),
        ("2009-05-04 00:00", "2009-05-05T00:00Z"),
        ("2009-05-04T00:00:00Z", "2009-05-05 00:00:00.0"),
        ("2009-05-04T02:00:00+02:00", "2009-05-04T22:30:00-0130"),
        (" 2009-05-04 00:00:00 UTC", "2009-05-05 00:00:00 UTC"),
    ],
)
def test_iso_dates(tmp_path: Path, dates: tuple[str, str]) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\n" + "".join(f"u,a,{date}\n" for date in dates))
    start = 1241395200.0
    assert events_of(opened(path)) == [("u", "a", start), ("u", "a", start + 86400)]
    path.write_text(path.read_text() + "u,a,2009-02-30\n")
    assert "log.csv, line 4: timestamp '2009-02-30' is not a" in refusal(path)


def test_endings_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "LOG.CSV").write_text(LOG)
    assert events_of(opened(tmp_path)) == EVENTS
    assert events_of(opened(tmp_path / "LOG.CSV")) == EVENTS


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp,item_id\nu,a,1,b\n")
    assert "log.csv, line 1: 2 columns are named 'item_id'; rename all but" in refusal(path)
    path = tmp_path / "log.inter"
    path.write_text("user_id:token\titem_id:token\titem_id:float\n")
    assert "log.inter, line 1: 2 columns are named 'item_id'; rename all but" in refusal(path)


def test_no_timestamp_column_names_none(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id\nu,a\n")
    assert refusal(path).endswith(
        "pass --timestamp COLUMN, or --timestamp none if the events are in order and have no times"
    )


def test_numbers_are_no_header(tmp_path: Path) -> None:
    path = tmp_path / "Beauty.txt"
    for line in ("1 1 2 3 4 5", "1, u1, 11/11/2019 9:05:58 AM, N1 N2"):
        path.write_text(f"{line}\n2 6 7\n".replace(", ", ","))
        with pytest.raises(DataError, match=f"its first line is '{line}', data and not a header"):
            opened(path, format="csv")


def test_typed_headers_under_any_name(tmp_path: Path) -> None:
    log, items = tmp_path / "log.csv", tmp_path / "x.text"
    log.write_text(LOG)
    items.write_text('item_id:token\ttext:token_seq\na\t"A" one\nb\tB\n')
    source = open_source(log, items=items)
    assert source.fields == ("text",) and source.catalog is not None
    rows = [row for batch in source.catalog(("text",)) for row in batch.to_pylist()]
    assert [row["text"] for row in rows] == ['"A" one', "B"]


# -- JSON ----------------------------------------------------------------------------------------

REVIEW = {"reviewerID": "u", "asin": "a", "unixReviewTime": 1}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"0": [1, 2], "1": [3]}, "one JSON object of ids and lists, not one event per line"),
        ({"0": ["<a_1>", "<b_2>"]}, "the semantic ids of items"),
        ({f"B{n}": n for n in range(20)}, "a map of ids to numbers"),
        ([REVIEW], "one JSON array, not one object per line"),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_of_one_value_is_told_by_its_shape(
    tmp_path: Path, value: Any, says: str, indent: int | None
) -> None:
    path, log = tmp_path / "Beauty.json", tmp_path / "log.csv"
    path.write_text(json.dumps(value, indent=indent))
    assert f"Beauty.json is {says}" in refusal(path)
    log.write_text(LOG)
    with pytest.raises(DataError, match=f"Beauty.json is {says}"):
        open_source(log, items=path)
    log.unlink()
    (tmp_path / "Beauty.test.json").write_text("[]")
    assert f"Beauty.json is {says}" in refusal(tmp_path)
    with pytest.raises(DataError, match=f"Beauty.json is {says}"):
        open_source(tmp_path, format="amazon")


def test_an_object_of_items_is_no_log(tmp_path: Path) -> None:
    path = tmp_path / "Beauty.item.json"
    path.write_text('{"B0": {"title": "x"}, "B1": {}}')
    message = refusal(path)
    assert "Beauty.item.json is one JSON object of items and their fields" in message
    assert message.endswith("give the log, and this file by --items")


@pytest.mark.parametrize("row", [REVIEW, {"category": ["x"], "asin": "a"}])
def test_one_line_of_json_is_no_object_of_ids(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(row))
    assert one_value(File(path), "utf-8") is None
    path.write_text(json.dumps({"category": ["x"]}) + "\n" + json.dumps(row))
    assert one_value(File(path), "utf-8") is None


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_lines_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "log.json"
    path.write_bytes((json.dumps(REVIEW) + "\n").encode(encoding))
    assert events_of(opened(path)) == [("u", "a", 1.0)]


def test_json_samples_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps(REVIEW | {"history": ["b"]}))
    assert "log.json has samples, not events: column 'history' holds" in refusal(path)


@pytest.mark.parametrize(
    ("read", "left"),
    [("x.inter", "y.csv"), ("b.jsonl", "y.csv"), ("b.jsonl", "x.inter"), ("p.parquet", "y.csv")],
)
def test_logs_of_two_formats_in_a_folder_are_told(tmp_path: Path, read: str, left: str) -> None:
    contents = {
        "x.inter": b"user_id:token\titem_id:token\ttimestamp:float\nu\ta\t1\n",
        "y.csv": b"user_id,item_id,timestamp\nu,a,1\n",
        "b.jsonl": b'{"user_id": "u", "item_id": "a", "timestamp": 1}\n',
        "p.parquet": b"",
    }
    for name in (read, left):
        (tmp_path / name).write_bytes(contents[name])
    if read.endswith(".parquet"):
        rows = {"user_id": ["u"], "item_id": ["a"], "timestamp": [1.0]}
        pq.write_table(pa.table(rows), tmp_path / read)
    source = opened(tmp_path)
    used, unread = source.files[0].name, {read, left} - {source.files[0].name}
    assert source.notes[-1].startswith(f"read as {source.format}; not read: {unread.pop()}; give")
    assert opened(tmp_path / used).notes == []


def test_files_of_one_name_in_a_zip_do_not_hide_each_other(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "log.zip", "w") as archive:
        for name, item in (("x/a.csv", "a"), ("y/a.csv", "b")):
            archive.writestr(name, f"user_id,item_id,timestamp\nu,{item},1\n")
    message = refusal(tmp_path / "log.zip")
    assert "has 2 .csv or .tsv files (a.csv, y/a.csv), not one; unpack it and" in message
