"""Every format, from small files in its true schema; every bad file, by its message."""

from __future__ import annotations

import datetime
import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.support.errors import one_line
from tests.support.logs import catalog_of, events_of, lines, write

from l2rec.data.formats.columns import Columns
from l2rec.data.formats.open import FORMATS, open_source
from l2rec.data.prepare import PrepareConfig, prepare
from l2rec.errors import DataError

# ---------------------------------------------------------------- RecBole


def recbole(folder: Path, name: str = "tiny") -> Path:
    write(
        folder / f"{name}.inter",
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        '7\ta"b\t5\t881250949\n7\tc\t3\t881250950.5\n8\tc\t1\t1\n',
    )
    write(
        folder / f"{name}.item",
        "item_id:token\ttitle:token_seq\tprice:float\tyear:token\n"
        'a"b\tThe "first\t1.5\t1999\nc\t\t2\t2000\n',
    )
    return folder


def test_recbole_folder_and_file(tmp_path: Path) -> None:
    for path in (recbole(tmp_path / "tiny"), tmp_path / "tiny" / "tiny.inter"):
        source = open_source(path)
        assert source.format == "recbole"
        assert [f.name for f in source.files] == ["tiny.inter", "tiny.item"]
        assert events_of(source) == [
            ("7", 'a"b', 881250949.0),
            ("7", "c", 881250950.5),
            ("8", "c", 1.0),
        ]
        assert (source.fields, source.more_fields) == (("title", "year"), ("price",))
        assert catalog_of(source, "title", "price") == {
            'a"b': {"title": 'The "first', "price": "1.5"},
            "c": {"title": "", "price": "2"},
        }


def test_recbole_header_without_types(tmp_path: Path) -> None:
    write(tmp_path / "x.inter", "user_id\titem_id\n1\t2\n")
    with pytest.raises(DataError, match=r"x\.inter, line 1: header 'user_id' has no type"):
        open_source(tmp_path)


def test_recbole_two_logs_in_one_folder(tmp_path: Path) -> None:
    recbole(tmp_path, "a")
    recbole(tmp_path, "b")
    with pytest.raises(DataError, match=r"has 2 \.inter files \(a\.inter, b\.inter\), not one"):
        open_source(tmp_path)


# ---------------------------------------------------------------- Amazon

REVIEWS: list[dict[str, Any]] = [
    {"reviewerID": "A1", "asin": "B1", "unixReviewTime": 1393545600, "reviewText": "x"},
    {"reviewerID": "A2", "asin": "B2", "unixReviewTime": 1393545601, "vote": "3"},
]
META_2018: list[dict[str, Any]] = [
    {
        "asin": "B1",
        "title": "Nuts &amp; Bolts <b>M3</b>\n box",
        "brand": "ACME",
        "category": ["Industrial", "Fasteners", "Industrial"],
        "description": ["long", "text"],
        "price": "$3",
    },
    {"asin": "B2", "title": "var aPageStart = (new Date()).getTime();", "category": []},
]
CLEAN = {
    "B1": {"title": "Nuts & Bolts M3 box", "category": "Industrial, Fasteners", "brand": "ACME"},
    "B2": {"title": "", "category": "", "brand": ""},
}


@pytest.mark.parametrize("suffix", ["json", "jsonl", "json.gz"])
def test_amazon_2018(tmp_path: Path, suffix: str) -> None:
    reviews = lines(tmp_path / f"Tools_5.{suffix}", REVIEWS, json.dumps)
    items = lines(tmp_path / f"meta_Tools.{suffix}", META_2018, json.dumps)
    for source in (open_source(reviews, items=items), open_source(tmp_path)):
        assert source.format == "amazon-2018"
        assert events_of(source) == [("A1", "B1", 1393545600.0), ("A2", "B2", 1393545601.0)]
        assert catalog_of(source) == CLEAN
        assert catalog_of(source, "description")["B1"] == {"description": "long text"}


def test_amazon_2014_python_literals(tmp_path: Path) -> None:
    meta: list[dict[str, Any]] = [
        {
            "asin": "B1",
            "title": "Nuts &amp; Bolts M3 box",
            "brand": "ACME",
            "categories": [["Industrial", "Fasteners"], ["Industrial"]],
            "salesRank": None,
        },
        {"asin": "B2", "categories": [[]]},
    ]
    items = lines(tmp_path / "meta_Tools.json.gz", meta, repr)
    reviews = lines(tmp_path / "reviews_Tools_5.json.gz", REVIEWS, repr)
    source = open_source(reviews, items=items)
    assert source.format == "amazon-2014"
    assert events_of(source) == [("A1", "B1", 1393545600.0), ("A2", "B2", 1393545601.0)]
    assert catalog_of(source) == CLEAN


def test_amazon_2014_as_json_equals_literals(tmp_path: Path) -> None:
    meta = [{"asin": "B1", "title": "t", "categories": [["a", "b"], ["a", "c"]]}]
    json_items = lines(tmp_path / "meta_j.json", meta, json.dumps)
    literal_items = lines(tmp_path / "meta_l.json", meta, repr)
    reviews = lines(tmp_path / "reviews.json", REVIEWS, json.dumps)
    found = [catalog_of(open_source(reviews, items=i)) for i in (json_items, literal_items)]
    assert found[0] == found[1] == {"B1": {"title": "t", "category": "a, b, c", "brand": ""}}


def test_amazon_2023_has_milliseconds_and_stores(tmp_path: Path) -> None:
    reviews = lines(
        tmp_path / "Tools.jsonl",
        [{"user_id": "A", "asin": "V1", "parent_asin": "P", "timestamp": 1588687728923}],
        json.dumps,
    )
    items = lines(
        tmp_path / "meta_Tools.jsonl",
        [{"parent_asin": "P", "title": "T", "store": "S", "categories": ["x", "y"], "price": 3}],
        json.dumps,
    )
    source = open_source(reviews, items=items)
    assert source.format == "amazon-2023"
    assert events_of(source) == [("A", "P", 1588687728.923)]
    assert catalog_of(source) == {"P": {"title": "T", "category": "x, y", "brand": "S"}}


def test_amazon_messy_lines_fall_back(tmp_path: Path) -> None:
    rows = [*META_2018, {"asin": "B3", "title": 5, "category": "plain", "brand": None}]
    items = lines(tmp_path / "meta_x.json", rows, json.dumps)
    reviews = lines(tmp_path / "r.json", REVIEWS, json.dumps)
    found = catalog_of(open_source(reviews, items=items))
    assert found == CLEAN | {"B3": {"title": "5", "category": "plain", "brand": ""}}


@pytest.mark.parametrize("block_bytes", [40, 300, 1 << 20])
def test_blocks_do_not_matter(tmp_path: Path, block_bytes: int) -> None:
    many = [REVIEWS[0] | {"asin": f"B{i}", "unixReviewTime": i} for i in range(50)]
    path = lines(tmp_path / "r.json", many, json.dumps)
    source = open_source(path, block_bytes=block_bytes)
    assert events_of(source) == [("A1", f"B{i}", float(i)) for i in range(50)]


def test_amazon_broken_line(tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", json.dumps(REVIEWS[0]) + "\n\n{broken\n")
    with pytest.raises(DataError, match=r"r\.json, line 3 is neither a JSON object nor"):
        events_of(open_source(path))


def test_amazon_wrong_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "r.json", '{"who": 1, "what": 2}\n')
    with pytest.raises(DataError, match="has the keys what, who; expected reviewerID, asin"):
        open_source(path, format="amazon-2018")


def test_amazon_missing_timestamp(tmp_path: Path) -> None:
    path = lines(tmp_path / "r.json", [*REVIEWS, {"reviewerID": "A", "asin": "B"}], json.dumps)
    with pytest.raises(DataError, match=r"r\.json, line 3: timestamp is missing"):
        events_of(open_source(path))


# ---------------------------------------------------------------- MovieLens

MOVIES = {
    "1": {"movie_title": "Toy Story", "release_year": "1995", "class": "Animation Children's"},
    "2": {"movie_title": "Godfather, The", "release_year": "1972", "class": "Crime"},
    "3": {"movie_title": "Misérables, Les", "release_year": "", "class": ""},
}


def movielens_100k(folder: Path) -> Path:
    write(folder / "u.data", "196\t1\t3\t881250949\n186\t2\t3\t891717742\n")
    flags = {g: i for i, g in enumerate(["unknown", "Action", "Adventure", "Animation"])}
    flags |= {"Children's": 4, "Crime": 6}

    def film(number: int, title: str, *genres: str) -> str:
        bits = ["0"] * 19
        for genre in genres:
            bits[flags[genre]] = "1"
        return "|".join([str(number), title, "01-Jan-1995", "", "http://x", *bits]) + "\n"

    text = film(1, "Toy Story (1995)", "Animation", "Children's")
    text += film(2, "Godfather, The (1972)", "Crime") + film(3, "Misérables, Les")
    write(folder / "u.item", text, "latin-1")
    return folder


def test_movielens_100k_folder_and_zip(tmp_path: Path) -> None:
    folder = movielens_100k(tmp_path / "ml-100k")
    archive = tmp_path / "ml-100k.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.iterdir():
            file.write(path, f"ml-100k/{path.name}")
    for path in (folder, archive, folder / "u.data"):
        source = open_source(path)
        assert source.format == "movielens-100k"
        assert events_of(source) == [("196", "1", 881250949.0), ("186", "2", 891717742.0)]
        assert catalog_of(source) == MOVIES
    raw = catalog_of(source, "title", "clean_title")
    assert raw["2"] == {"title": "Godfather, The (1972)", "clean_title": "The Godfather"}
    assert raw["3"]["clean_title"] == "Les Misérables"


@pytest.mark.parametrize("block_bytes", [30, 1 << 20])
def test_movielens_1m(tmp_path: Path, block_bytes: int) -> None:
    write(tmp_path / "ratings.dat", "1::1193::5::978300760\n1::661::3::978302109\n")
    write(
        tmp_path / "movies.dat",
        "1::Toy Story (1995)::Animation|Children's\n2::Godfather, The (1972)::Crime\n"
        "3::Misérables, Les::\n",
        "latin-1",
    )
    source = open_source(tmp_path, block_bytes=block_bytes)
    assert source.format == "movielens-1m"
    assert events_of(source) == [("1", "1193", 978300760.0), ("1", "661", 978302109.0)]
    assert catalog_of(source) == MOVIES


def test_movielens_1m_names_the_line(tmp_path: Path) -> None:
    write(tmp_path / "ratings.dat", "1::1193::5::978300760\n1::661::3::soon\n")
    write(tmp_path / "movies.dat", "1::Toy Story (1995)::Animation\n")
    with pytest.raises(DataError, match=r"ratings\.dat, line 2: timestamp 'soon' is not a number"):
        events_of(open_source(tmp_path))


def test_movielens_latest(tmp_path: Path) -> None:
    write(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\r\n1,1,4.0,964982703\r\n")
    write(
        tmp_path / "movies.csv",
        "movieId,title,genres\r\n1,Toy Story (1995),Animation|Children's\r\n"
        '2,"Godfather, The (1972)",Crime\r\n3,"Misérables, Les",(no genres listed)\r\n',
    )
    source = open_source(tmp_path)
    assert source.format == "movielens-latest"
    assert events_of(source) == [("1", "1", 964982703.0)]
    assert catalog_of(source) == MOVIES


def test_movielens_without_movies(tmp_path: Path) -> None:
    write(tmp_path / "u.data", "1\t1\t1\t1\n")
    with pytest.raises(DataError, match=r"has no u\.item, it has u\.data; unpack the whole"):
        open_source(tmp_path)


# ---------------------------------------------------------------- CSV and Parquet


def test_csv_with_named_columns_and_catalog(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", "who,what,ts,event_type\nu1,i1,5,click\n\nu2,i2,6,\n")
    items = write(tmp_path / "shop.csv", 'what,title,price\ni1,"a, b\nc",3\ni2,,\n')
    source = open_source(log, items=items, columns=Columns("who", "what", "ts"))
    assert source.format == "csv"
    assert events_of(source) == [("u1", "i1", 5.0), ("u2", "i2", 6.0)]
    types = [t for batch in source.events() for t in batch["event_type"].to_pylist()]
    assert types == ["click", ""]
    assert catalog_of(source) == {
        "i1": {"title": "a, b\nc", "price": "3"},
        "i2": {"title": "", "price": ""},
    }


@pytest.mark.parametrize(("name", "separator"), [("a.tsv", "\t"), ("a.csv", ";"), ("a.csv", "|")])
def test_csv_separators_and_byte_order_mark(tmp_path: Path, name: str, separator: str) -> None:
    rows = [["user_id", "item_id", "timestamp"], ["u", "i", "1"]]
    log = write(tmp_path / name, "\ufeff" + "\n".join(separator.join(r) for r in rows))
    assert events_of(open_source(log)) == [("u", "i", 1.0)]


@pytest.mark.parametrize(("at", "value"), [(6, b"\x01"), (8, b"\x09")], ids=["locked", "deflate64"])
def test_a_zip_that_cannot_be_unpacked(tmp_path: Path, at: int, value: bytes) -> None:
    path = tmp_path / "log.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("events.csv", "user_id,item_id,timestamp\nu,i,1\n")
    packed = bytearray(path.read_bytes())
    for header, offset in ((b"PK\x03\x04", at), (b"PK\x01\x02", at + 2)):
        place = packed.index(header) + offset
        packed[place : place + 1] = value
    path.write_bytes(packed)
    with pytest.raises(DataError, match=r"cannot be unpacked: .*; pack it again") as error:
        events_of(open_source(path))
    one_line(error)


def test_csv_gzipped(tmp_path: Path) -> None:
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(b"user_id,item_id,timestamp\nu,i,1\n"))
    assert events_of(open_source(tmp_path / "log.csv.gz")) == [("u", "i", 1.0)]


def test_csv_other_encoding(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp\né,i,1\n", "latin-1")
    assert events_of(open_source(log, columns=Columns(encoding="latin-1"))) == [("é", "i", 1.0)]


def test_without_timestamps_the_order_counts(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", "user_id,item_id\nu,b\nu,a\nv,b\n")
    found = events_of(open_source(log, columns=Columns(timestamp=None)))
    assert found == [("u", "b", 0.0), ("u", "a", 1.0), ("v", "b", 2.0)]


def test_parquet_types(tmp_path: Path) -> None:
    moment = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    log = pa.table(
        {
            "user_id": pa.array([1, 2], pa.int64()),
            "item_id": pa.array(["a", "b"]).dictionary_encode(),
            "timestamp": pa.array([moment, moment + datetime.timedelta(seconds=1.5)]),
        }
    )
    items = pa.table(
        {"item_id": ["a", "b"], "title": ["A", None], "tags": [["x", "y"], []], "price": [1.5, 2]}
    )
    pq.write_table(log, tmp_path / "events-0.parquet")
    pq.write_table(log, tmp_path / "events-1.parquet")
    pq.write_table(items, tmp_path / "items.parquet")
    source = open_source(tmp_path)
    start = moment.timestamp()
    assert events_of(source) == [("1", "a", start), ("2", "b", start + 1.5)] * 2
    assert (source.fields, source.more_fields) == (("title", "tags"), ("price",))
    assert catalog_of(source, "title", "tags", "price") == {
        "a": {"title": "A", "tags": "x, y", "price": "1.5"},
        "b": {"title": "", "tags": "", "price": "2"},
    }


def test_parquet_missing_timestamp(tmp_path: Path) -> None:
    table = pa.table({"user_id": ["u"] * 3, "item_id": ["i"] * 3, "timestamp": [1.0, 2.0, None]})
    pq.write_table(table, tmp_path / "log.parquet")
    with pytest.raises(DataError, match=r"log\.parquet, row 3: timestamp is missing"):
        events_of(open_source(tmp_path / "log.parquet"))


def test_parquet_torn(tmp_path: Path) -> None:
    (tmp_path / "log.parquet").write_bytes(b"PAR1....")
    with pytest.raises(DataError, match=r"log\.parquet is not a whole Parquet file"):
        open_source(tmp_path / "log.parquet")


# ---------------------------------------------------------------- sequence text

SEQUENCES = "1 1 2 3 4 5\n2 3 1 6 2 7\n3 2 2 9\n"
PAIRS = "".join(
    f"{user} {item}\n" for user, *items in map(str.split, SEQUENCES.splitlines()) for item in items
)
PLACES = [(*line.split(), float(at)) for at, line in enumerate(PAIRS.splitlines())]


@pytest.mark.parametrize(("kind", "text"), [("sequences", SEQUENCES), ("pairs", PAIRS)])
@pytest.mark.parametrize("block_bytes", [5, 1 << 20])
def test_sequence_text(tmp_path: Path, kind: str, text: str, block_bytes: int) -> None:
    plain = write(tmp_path / "a" / "Beauty.txt", text)
    other = write(
        tmp_path / "b" / "B.TXT", "\n" + text.replace(" ", "\t ").replace("\n", " \r\n\n")
    )
    wide = write(tmp_path / "c" / "B.txt", text, "utf-16")
    packed = tmp_path / "d" / "B.txt.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(text.rstrip().encode()))
    archive = tmp_path / "B.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(plain, "B/Beauty.txt")
    for path in (plain, plain.parent, other, wide, packed, archive):
        source = open_source(path, block_bytes=block_bytes)
        assert (source.format, source.catalog) == (kind, None)
        assert events_of(source) == events_of(source) == PLACES


def test_sequence_text_has_the_fingerprint_of_the_table(tmp_path: Path) -> None:
    items = write(
        tmp_path / "shop.csv", "item_id,title\n" + "".join(f"{n},T{n}\n" for n in range(10))
    )
    table = "user_id,item_id\n" + PAIRS.replace(" ", ",")
    found = {}
    for name, text in (("s.txt", SEQUENCES), ("p.txt", PAIRS), ("t.csv", table)):
        config = PrepareConfig(timestamp=None if name == "t.csv" else "timestamp")
        data = prepare(
            write(tmp_path / name, text), tmp_path / "out", config, items=items, progress=False
        )
        found[name] = data.fingerprint
        assert data.order.unit == "order only"
    assert len(set(found.values())) == 1, found


def test_sequences_with_raw_ids_beside_their_kin(tmp_path: Path) -> None:
    log = write(tmp_path / "user_sequence.txt", "A1YJ B00X B00Y\nA2é B00Y B00X B00Z\n")
    write(tmp_path / "user_sequence_indexing.txt", "1 1001 1002\n2 1002 1001 1003\n")
    write(tmp_path / "user_indexing.txt", "A1YJ 1\nA2é 2\n")
    for path, format in ((tmp_path, None), (tmp_path, "sequences"), (log, None)):
        source = open_source(path, format=format)
        assert [f.name for f in source.files] == ["user_sequence.txt"]
        assert events_of(source)[2:4] == [("A2é", "B00Y", 2.0), ("A2é", "B00X", 3.0)]
    log.rename(tmp_path / "other.txt")
    with pytest.raises(DataError, match=r"has 2 \.txt files \(other\.txt, user_sequence_indexing"):
        open_source(tmp_path)


def test_splits_of_sequences_are_named(tmp_path: Path) -> None:
    write(tmp_path / "test.txt", "4 1 2 3\n5 2 1\n")  # other users
    assert open_source(write(tmp_path / "train.txt", SEQUENCES)).notes == [
        "train.txt is one split (train); test.txt beside it is not read, so events may be missing"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1 2 3 4\n",
        "1 2 3\n2 3 4\n",  # a table of three columns
        "1 2 3\n1 2 3 4\n",  # a user twice
        "1 2 3\n2 3 4 5\n3 1\n",
        "1 10\n2 11\n3 12\n",  # a map of ids
        "1 2\n2 2\n1 3\n",  # not grouped
        "user item\n1 2\n1 3\n",
        "This is a set of data\nIt comes from a shop.\n",
        "user_id:token\titem_id_list:token_seq\titem_id:token\n1\t2 3\t4\n2\t3 4 5\t6\n",
        "u1,an item,1 2\nu2,an,1 3 4\n",
    ],
)
def test_other_text_is_not_taken_for_sequences(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "log.txt", text)
    with pytest.raises(DataError) as error:
        open_source(path)
    message = one_line(error)
    assert "no known format" in message and "*.txt of lines USER ITEM ITEM ..." in message
    assert "l2rec prepare --formats" in message


def test_sequence_text_does_not_hide_other_formats(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", SEQUENCES)
    recbole(tmp_path)
    assert open_source(tmp_path).format == "recbole"
    write(tmp_path / "log.dat", SEQUENCES)
    with pytest.raises(DataError, match="no known format"):
        open_source(tmp_path / "log.dat")
    assert events_of(open_source(tmp_path / "log.dat", format="sequences")) == PLACES


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("sequences", "", r"log\.txt is empty; expected a line for each user: USER ITEM ITEM"),
        ("pairs", " \n\n", r"log\.txt is empty; expected a line for each event: USER ITEM"),
        ("sequences", "1 2 3\n\n2\n", r"log\.txt, line 3 has a user \(2\) and no item; add"),
        ("pairs", "1 2\n1\n", r"log\.txt, line 2 has a user \(1\) and no item; add"),
        ("pairs", "1 2\n1 2 3\n", r"log\.txt, line 2 has 3 words, .* --format sequences if"),
        (
            "sequences",
            "7 2 3\n\n1 2\n7 2\n",
            r"log\.txt, line 4: user 7 has a line already; .*pairs",
        ),
        (
            "sequences",
            "user items\n1 2 3\n",
            r"line 1 looks like a header \(user items\), which seq",
        ),
        ("pairs", "user item\n1 2\n", r"line 1 looks like a header \(user item\), which pairs do"),
        (
            "sequences",
            b"1 2 3\n2 \xe9 4\n",
            r"log\.txt, line 2: byte 0xe9 at position 8 is not utf",
        ),
        ("pairs", b"1 2\n1 \x00\n", r"log\.txt, line 2 has NUL characters, .* plain text"),
    ],
)
@pytest.mark.parametrize("block_bytes", [3, 1 << 20])
def test_bad_sequence_text(
    tmp_path: Path, kind: str, text: str | bytes, says: str, block_bytes: int
) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError, match=says) as error:
        events_of(open_source(path, format=kind, block_bytes=block_bytes))
    one_line(error)


# ---------------------------------------------------------------- bad input


def csv_error(tmp_path: Path, text: str | bytes, **columns: Any) -> str:
    path = tmp_path / "log.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError) as error:
        events_of(open_source(path, columns=Columns(**columns)))
    return one_line(error)


def test_missing_column(tmp_path: Path) -> None:
    message = csv_error(tmp_path, "user,item_id,timestamp\n1,2,3\n")
    assert "has no column 'user_id', it has user, item_id, timestamp; did you mean" in message
    assert message.endswith("pass --user COLUMN")


def test_missing_timestamp_column(tmp_path: Path) -> None:
    message = csv_error(tmp_path, "user_id,item_id\n1,2\n")
    assert "has no column 'timestamp'" in message
    assert "pass --timestamp COLUMN" in message


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "timestamp is missing"),
        ("nan", "timestamp 'nan' is not a number"),
        ("inf", "timestamp 'inf' is not a number"),
    ],
)
def test_bad_timestamp(tmp_path: Path, value: str, says: str) -> None:
    message = csv_error(tmp_path, f"user_id,item_id,timestamp\nu,i,1\n\nu,i,{value}\nu,i,3\n")
    assert f"log.csv, line 4: {says}; give seconds since 1970" in message


def test_times_are_all_numbers_or_all_dates(tmp_path: Path) -> None:
    rows = ["u,i,1", "u,i,2", "u,i,2020-01-01", "u,i,2020-01-02"]
    for order, found, first in ((rows, "'2020-01-01' is a date", "'1'"), (rows[::-1], "'2'", "")):
        text = "user_id,item_id,timestamp\n" + "".join(f"{row}\n" for row in order)
        for block_bytes in (16, 1 << 20):
            path = write(tmp_path / "log.csv", text)
            with pytest.raises(DataError) as error:
                events_of(open_source(path, block_bytes=block_bytes))
            message = one_line(error)
            assert (
                found in message and first in message and "write all times in one form" in message
            )


@pytest.mark.parametrize(("row", "what"), [(",i,1", "user"), ("u,,1", "item")])
def test_missing_id(tmp_path: Path, row: str, what: str) -> None:
    message = csv_error(tmp_path, f"user_id,item_id,timestamp\nu,i,1\n{row}\n")
    assert f"log.csv, line 3 has no {what} id; give it one or remove the row" in message


def test_ragged_row(tmp_path: Path) -> None:
    message = csv_error(tmp_path, "user_id,item_id,timestamp\nu,i,1\nu,i\n")
    assert "log.csv, line 3 has 2 columns, not the 3 of its header" in message


@pytest.mark.parametrize("text", ["", "\n"])
def test_empty_file(tmp_path: Path, text: str) -> None:
    assert "log.csv is empty; expected a header line" in csv_error(tmp_path, text)


def test_wrong_encoding(tmp_path: Path) -> None:
    text = b"user_id,item_id,timestamp\nu,i,1\n\xe9,i,2\n"
    message = csv_error(tmp_path, text)
    assert "log.csv, line 3: byte 0xe9 at position 32 is not utf-8" in message
    assert message.endswith("for example --encoding cp1252 (Windows) or latin-1")


def test_unknown_encoding(tmp_path: Path) -> None:
    message = csv_error(tmp_path, "user_id,item_id,timestamp\nu,i,1\n", encoding="klingon")
    assert "encoding='klingon' is not known" in message


@pytest.mark.parametrize("name", ["log.csv.gz", "r.json.gz"])
def test_truncated_gzip(tmp_path: Path, name: str) -> None:
    if name.startswith("log"):
        text = "user_id,item_id,timestamp\n" + "".join(f"u{i},i{i},{i}\n" for i in range(3000))
    else:
        text = "".join(json.dumps(REVIEWS[0] | {"unixReviewTime": i}) + "\n" for i in range(3000))
    (tmp_path / name).write_bytes(gzip.compress(text.encode())[:-40])
    with pytest.raises(DataError, match="is incomplete: its compressed data ends early"):
        events_of(open_source(tmp_path / name))


def test_not_gzip(tmp_path: Path) -> None:
    write(tmp_path / "log.csv.gz", "user_id,item_id,timestamp\n")
    with pytest.raises(DataError, match=r"is damaged .* fetch the file again, or rename it"):
        open_source(tmp_path / "log.csv.gz")


def test_broken_zip(tmp_path: Path) -> None:
    write(tmp_path / "ml.zip", "PK but not really")
    with pytest.raises(DataError, match="is not a whole zip file"):
        open_source(tmp_path / "ml.zip")


def test_nothing_known_lists_what_was_looked_for(tmp_path: Path) -> None:
    write(tmp_path / "notes.md", "hello")
    with pytest.raises(DataError) as error:
        open_source(tmp_path)
    message = str(error.value)
    assert "found notes.md; looked for *.inter (RecBole)" in message
    assert "--format csv" in message


def test_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist; check the path"):
        open_source(tmp_path / "nowhere")
    recbole(tmp_path)
    with pytest.raises(DataError, match=r"catalog file .*none\.item does not exist"):
        open_source(tmp_path, items=tmp_path / "none.item")


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--format recbol is not known; did you mean 'recbole'"):
        open_source(recbole(tmp_path), format="recbol")
    assert set(FORMATS) >= {"recbole", "csv", "parquet", "sequences", "pairs"}
    assert all(looks and "\n" not in looks for looks in FORMATS.values())


def test_a_prepared_data_set_is_no_source(tmp_path: Path) -> None:
    write(tmp_path / "dataset.json", "{}")
    with pytest.raises(DataError, match="is a prepared data set already"):
        open_source(tmp_path)


def test_format_overrides_detection(tmp_path: Path) -> None:
    log = write(tmp_path / "log.txt", "user_id,item_id,timestamp\nu,i,1\n")
    assert events_of(open_source(log, format="csv")) == [("u", "i", 1.0)]


def test_catalog_row_without_id(tmp_path: Path) -> None:
    recbole(tmp_path)
    write(tmp_path / "tiny.item", "item_id:token\ttitle:token_seq\na\tA\n\tB\n")
    with pytest.raises(DataError, match=r"tiny\.item, line 3 has no item id"):
        catalog_of(open_source(tmp_path))


def test_a_format_that_the_files_do_not_have_is_refused(tmp_path: Path) -> None:
    recbole(tmp_path)
    with pytest.raises(DataError, match=r"has no u\.data, no ratings\.dat and no ratings\.csv"):
        open_source(tmp_path, format="movielens")


def test_folders_of_folders_are_named(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write(tmp_path / name / "a.csv", "user_id,item_id\n")
    with pytest.raises(DataError, match=r"found only folders \(test, train\); looked for"):
        open_source(tmp_path)
