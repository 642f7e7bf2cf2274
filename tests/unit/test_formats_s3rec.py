"""What lies beside sequences: attributes, maps, drawn items, metadata, and random splits."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.support.errors import one_line

from l2rec.data.formats.open import open_source
from l2rec.data.formats.source import Source
from l2rec.data.prepare import prepare
from l2rec.errors import DataError

SEQUENCES = "1 1 2 3 4\n2 3 1 2\n"
PLACES = [(*pair, float(at)) for at, pair in enumerate(zip("1111222", "1234312", strict=True))]
ATTRIBUTES = {"3": [], "1": [1, 2, 1], "2": [3], "4": [2]}
NUMBERS = {"1": "1, 2", "2": "3", "3": "", "4": "2"}
MAPS = {
    "user2id": {"A1": "1", "A2": "2"},
    "id2user": {"1": "A1", "2": "A2"},
    "item2id": {f"B{n}": str(n) for n in range(1, 5)},
    "id2item": {str(n): f"B{n}" for n in range(1, 5)},
    "attribute2id": {"Skin Care": 1, "Nails & Co": 2, "ACME": 3},
    "id2attribute": {"1": "Skin Care", "2": "Nails &amp; Co", "3": "ACME"},
    "attributeid2num": {"1": 2, "2": 2, "3": 1},
}
NO_NAMES = (
    "{}item2attributes.json has numbers of attributes and no names, so the items' texts are "
    "numbers; give better texts by --items"
)


def events_of(source: Source) -> list[tuple[str, str, float]]:
    rows = [row for batch in source.events() for row in batch.to_pylist()]
    return [(r["user_id"], r["item_id"], r["timestamp"]) for r in rows]


def texts_of(source: Source, field: str = "attributes") -> dict[str, str]:
    assert source.catalog is not None
    batches = source.catalog((field,))
    return {row["item_id"]: row[field] for batch in batches for row in batch.to_pylist()}


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value) + "\n")
    return path


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        source = open_source(path, **options)
        events_of(source)
        texts_of(source)
    return one_line(error)


# -- S3-Rec --------------------------------------------------------------------------------------


def test_attributes_are_texts(tmp_path: Path) -> None:
    folder = tmp_path / "s3"
    log = write(folder / "Beauty.txt", SEQUENCES)
    write(folder / "Beauty_item2attributes.json", ATTRIBUTES)
    write(folder / "Beauty_sample.txt", "1 7 8\n2 8 9 5\n")
    write(folder / "Sports_item2attributes.json", {"1": [9]})
    archive = tmp_path / "s3.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.iterdir():
            file.write(path, path.name)
    drawn = "not read, as their names are those of drawn items: Beauty_sample.txt"
    for path, format in ((folder, None), (log, None), (archive, None), (folder, "sequences")):
        source = open_source(path, format=format)
        assert (source.format, source.fields) == ("sequences", ("attributes",))
        assert events_of(source) == PLACES
        assert texts_of(source) == NUMBERS
        assert source.notes == [drawn] * (path != log) + [NO_NAMES.format("Beauty_")]
    assert sorted(prepare(log, tmp_path / "out", progress=False).texts()) == ["", "1, 2", "2", "3"]


def test_without_attributes_of_its_name_a_log_has_no_texts(tmp_path: Path) -> None:
    log = write(tmp_path / "Beauty.txt", SEQUENCES)
    write(tmp_path / "Sports_item2attributes.json", ATTRIBUTES)
    write(tmp_path / "datamaps.json", MAPS)  # of whatever else is there
    assert (open_source(log).catalog, open_source(log).notes) == (None, [])
    assert events_of(open_source(log)) == PLACES


def test_attributes_by_option(tmp_path: Path) -> None:
    items = write(tmp_path / "Beauty_item2attributes.json", ATTRIBUTES)
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp\nu,1,1\n")
    assert texts_of(open_source(log, items=items)) == NUMBERS
    text = write(tmp_path / "s" / "Beauty.txt", SEQUENCES)
    assert texts_of(open_source(text, items=items)) == NUMBERS
    shop = write(tmp_path / "s" / "shop.csv", "item_id,title\n1,X\n")
    write(tmp_path / "s" / "Beauty_item2attributes.json", ATTRIBUTES)
    assert texts_of(open_source(text.parent, items=shop), "title") == {"1": "X"}


def test_a_table_of_items_beside_sequences_is_their_catalog(tmp_path: Path) -> None:
    write(tmp_path / "Beauty.txt", SEQUENCES)
    write(tmp_path / "items.csv", "item_id,title\n1,X\n")
    source = open_source(tmp_path)
    assert source.format == "sequences" and texts_of(source, "title") == {"1": "X"}
    write(tmp_path / "log.csv", "user_id,item_id,timestamp\nu,1,1\n")
    source = open_source(tmp_path)
    assert source.format == "csv" and source.notes == [
        "log.csv is read, not Beauty.txt, though its lines look like events too; give the path of "
        "the file to read that"
    ]
    assert events_of(open_source(tmp_path / "Beauty.txt")) == PLACES


def test_bad_attributes(tmp_path: Path) -> None:
    write(tmp_path / "Beauty.txt", SEQUENCES)
    write(tmp_path / "Beauty_item2attributes.json", {"1": [1], "2": [[3]]})
    assert "Beauty_item2attributes.json: '2' has [[3]], not a list of ids" in refusal(tmp_path)


# -- P5 ------------------------------------------------------------------------------------------


def p5(folder: Path) -> Path:
    write(folder / "sequential_data.txt", SEQUENCES)
    write(folder / "negative_samples.txt", "1 7 8 9\n2 8 9 5\n")
    write(folder / "datamaps.json", MAPS)
    write(folder / "item2attributes.json", ATTRIBUTES)
    return folder


def test_p5_has_raw_ids_and_names(tmp_path: Path) -> None:
    folder = p5(tmp_path)
    for path in (folder, folder / "sequential_data.txt"):
        source = open_source(path)
        assert source.format == "sequences"
        assert events_of(source)[3:5] == [("A1", "B4", 3.0), ("A2", "B3", 4.0)]
        assert texts_of(source) == {
            "B1": "Skin Care, Nails & Co",
            "B2": "ACME",
            "B3": "",
            "B4": "Nails & Co",
        }
        assert sum("has numbers of attributes" in note for note in source.notes) == 0


def test_p5_has_titles_where_the_metadata_is_there(tmp_path: Path) -> None:
    p5(tmp_path)
    rows = [{"asin": f"B{n}", "title": f"T'{n}", "categories": [["x"]]} for n in range(9)]
    text = "".join(f"{row!r}\n" for row in rows)
    (tmp_path / "meta.json.gz").write_bytes(gzip.compress(text.encode()))
    source = open_source(tmp_path)
    assert source.fields == ("title", "category", "brand")
    assert texts_of(source, "title")["B4"] == "T'4"
    data = prepare(tmp_path, tmp_path / "out", progress=False)
    assert data.n_items == 4 and data.texts()[0] == "T'1. x"


def test_p5_without_names_of_attributes(tmp_path: Path) -> None:
    p5(tmp_path)
    write(tmp_path / "datamaps.json", {name: MAPS[name] for name in ("id2user", "id2item")})
    source = open_source(tmp_path)
    assert texts_of(source)["B1"] == "1, 2"
    assert source.notes[-1] == NO_NAMES.format("")


@pytest.mark.parametrize(
    ("maps", "says"),
    [
        ({"user2id": {}}, "datamaps.json has user2id, not id2user and id2item, as P5's has; fetch"),
        (MAPS | {"id2item": {"1": "B1"}}, "datamaps.json has no raw id for '2'"),
        (MAPS | {"id2user": {"1": "A", "2": "A"}}, "datamaps.json gives 'A' and '2' to each other"),
        (MAPS | {"id2user": [1]}, "datamaps.json: id2user is no object of numbers and raw ids"),
        (MAPS | {"id2attribute": {"1": "x"}}, "datamaps.json has no raw id for '2'"),
    ],
)
def test_bad_maps(tmp_path: Path, maps: dict[str, Any], says: str) -> None:
    p5(tmp_path)
    write(tmp_path / "datamaps.json", maps)
    assert says in refusal(tmp_path)


# -- OpenP5 --------------------------------------------------------------------------------------


def test_openp5_reads_its_log_alone(tmp_path: Path) -> None:
    log = write(tmp_path / "user_sequence.txt", "a:1. x,y B1\nA|2 x,y z;!\n")  # any raw ids
    write(tmp_path / "user_indexing.txt", "a:1. 1\nA|2 2\n")
    write(tmp_path / "item_random_indexing.txt", "x,y 1001\nB1 1002\nz;! 1003\n")
    write(tmp_path / "item_collaborative_indexing_20_500.txt", "x,y <CI3><CI17>\nB1 <CI3>\n")
    write(tmp_path / "user_sequence_random_indexing.txt", "1 1001 1002\n2 1001 1003 1004\n")
    write(tmp_path / "similar_item_sasrec.txt", "B1 B2 B3\nB2 B1 B3 B4\n")
    write(tmp_path / "datamaps.json", MAPS)  # its ids are raw already
    for path in (tmp_path, log):
        source = open_source(path)
        assert (source.format, list(source.files)) == ("sequences", [log])
        assert events_of(source) == [
            ("a:1.", "x,y", 0.0),
            ("a:1.", "B1", 1.0),
            ("A|2", "x,y", 2.0),
            ("A|2", "z;!", 3.0),
        ]


# -- LightGCN ------------------------------------------------------------------------------------


def test_random_splits_are_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "train.txt", "0 5 1 9\n1 4 2 5 7\n2 3 1\n")
    test = write(tmp_path / "test.txt", "0 7 2\n1 1\n2 \n")
    write(tmp_path / "item_list.txt", "org_id remap_id\nB1 1\nB2 2\n")
    for path, format in ((tmp_path, None), (train, None), (tmp_path, "sequences"), (test, "pairs")):
        message = refusal(path, format=format)
        assert "train.txt and test.txt have items of the same users, as LightGCN's have" in message
        assert "split at random and in no order" in message
        assert "prepare the log with times that they were made from (or, if" in message
    both = write(tmp_path / "both.txt", "0 5 1 9 7 2\n1 4 2 5 7 1\n2 3 1\n")
    assert len(events_of(open_source(both))) == 12


@pytest.mark.parametrize("test", ["0 7\n1 1\n2 9\n", "7 1 2 3\n8 1 2\n"])
def test_last_items_and_other_users_are_no_random_split(tmp_path: Path, test: str) -> None:
    train = write(tmp_path / "train.txt", "0 5 1 9\n1 4 2 5 7\n2 3 1\n")
    write(tmp_path / "test.txt", test)
    assert "train.txt is one split" in open_source(train).notes[0]


def test_lines_of_one_length_are_sequences_beside_their_attributes(tmp_path: Path) -> None:
    log = write(tmp_path / "Beauty.txt", "1 1 2 3 4 5\n2 3 1 6 2 7\n")
    write(tmp_path / "Beauty_sample.txt", "1 9 8 7 6 5\n2 9 8 6 5 4\n")
    assert "--format sequences for a user" in refusal(log)
    attributes = write(tmp_path / "Beauty_item2attributes.json", {str(n): [n] for n in range(1, 8)})
    for path in (tmp_path, log):
        source = open_source(path)
        assert (source.format, list(source.files)) == ("sequences", [log, attributes])
        assert [item for _, item, _ in events_of(source)] == list("1234531627")


def test_attributes_are_not_taken_for_the_log(tmp_path: Path) -> None:
    write(tmp_path / "log.txt", "1 2 3\n2 3 4\n")
    write(tmp_path / "Beauty_item2attributes.json", ATTRIBUTES)
    assert "no known format" in refusal(tmp_path)
