"""One JSON object for a whole file: LC-Rec's and RecFormer's folders, catalogs for any log."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.support.errors import one_line
from tests.support.logs import catalog_of, events_of

from l2rec.data.formats.open import open_source
from l2rec.data.prepare import prepare
from l2rec.errors import DataError


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        source = open_source(path, **options)
        events_of(source)
        catalog_of(source)
    return one_line(error)


def write(path: Path, value: Any, indent: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=indent))
    return path


# -- LC-Rec and LETTER ---------------------------------------------------------------------------

LISTS = {"0": [0, 1, 2], "1": [2, 0, 1, 2]}
PLACES = [(u, str(i), float(n)) for n, (u, i) in enumerate((u, i) for u in LISTS for i in LISTS[u])]
ITEMS = {
    "0": {
        "title": "A &amp; B",
        "description": "long",
        "brand": "",
        "categories": "Music,Strings",
    },
    "1": {"title": "<b>C</b>", "description": ".", "brand": "Y", "categories": "."},
    "2": {"title": "D", "description": ""},
}


def lc_rec(folder: Path, indent: int | None = 2) -> Path:
    write(folder / "Tiny.inter.json", LISTS, indent)
    write(folder / "Tiny.item.json", ITEMS, indent)
    write(folder / "Tiny.index.json", {"0": ["<a_1>", "<b_2>"], "1": ["<a_1>", "<b_2>"]}, indent)
    return folder


@pytest.mark.parametrize("indent", [None, 2])
def test_lc_rec(tmp_path: Path, indent: int | None) -> None:
    folder = lc_rec(tmp_path / "Tiny", indent)
    archive = tmp_path / "Tiny.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.iterdir():
            file.write(path, f"Tiny/{path.name}")
    log = folder / "Tiny.inter.json"
    for path, format in ((folder, None), (log, None), (archive, None), (folder, "lc-rec")):
        source = open_source(path, format=format)
        assert source.format == "lc-rec"
        assert events_of(source) == events_of(source) == PLACES
        assert all("split" not in batch.schema.names for batch in source.events())
        assert (source.fields, source.more_fields) == (
            ("title", "brand", "categories"),
            ("description",),
        )
        assert catalog_of(source) == {
            "0": {"title": "A & B", "brand": "", "categories": "Music,Strings"},
            "1": {"title": "C", "brand": "Y", "categories": ""},
            "2": {"title": "D", "brand": "", "categories": ""},
        }
        assert catalog_of(source, "description")["0"] == {"description": "long"}
        assert source.notes == [
            "Tiny.inter.json is the log; not read: Tiny.index.json (semantic ids, and other forms "
            "of the log)"
        ]


def test_lc_rec_without_texts_and_gzipped(tmp_path: Path) -> None:
    path = tmp_path / "Tiny.inter.json.gz"
    path.write_bytes(gzip.compress(json.dumps(LISTS).encode()))
    for given in (path, tmp_path):
        source = open_source(given)
        assert (source.catalog, source.notes) == (None, [])
        assert events_of(source) == PLACES


def test_lc_rec_with_raw_ids_beside_samples(tmp_path: Path) -> None:
    lc_rec(tmp_path)
    write(tmp_path / "Tiny.user2id", "A1\t0\nA2\t1\n")
    write(tmp_path / "Tiny.item2id", "B a\t0\nB1\t1\nB2\t2\n\n")
    header = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    for split in ("train", "valid", "test"):
        write(tmp_path / f"Tiny.{split}.inter", header + "0\t0 1\t2\n")
    source = open_source(tmp_path)
    assert events_of(source)[2:4] == [("A1", "B2", 2.0), ("A2", "B2", 3.0)]
    assert list(catalog_of(source)) == ["B a", "B1", "B2"]
    assert len(source.files) == 4
    assert "Tiny.index.json, Tiny.test.inter, Tiny.train.inter, Tiny.valid" in source.notes[0]
    shop = write(tmp_path / "shop.csv", "item_id,title\nB a,X\n")
    assert catalog_of(open_source(tmp_path, items=shop)) == {"B a": {"title": "X"}}
    items = tmp_path / "Tiny.item.json"
    assert catalog_of(open_source(tmp_path, items=items)) == catalog_of(source)
    write(tmp_path / "Tiny.item2id", "B0\t0\nB1\t1\n")
    assert "Tiny.item2id has no raw id for '2'; fetch the files of one" in refusal(tmp_path)
    write(tmp_path / "Tiny.item2id", "B0\t0\nB0\t1\n")
    assert "Tiny.item2id gives 'B0' and '1' to each other, and one of" in refusal(tmp_path)
    write(tmp_path / "Tiny.item2id", "B0\t0\nB1 1\n")
    assert "Tiny.item2id, line 2 is 'B1 1'; expected a raw id, a tab and" in refusal(tmp_path)


def test_yelp_has_its_categories_in_the_description(tmp_path: Path) -> None:
    write(tmp_path / "Yelp.inter.json", LISTS)
    write(
        tmp_path / "Yelp.item.json",
        {str(n): {"title": f"T{n}", "description": "Diners, Greek"} for n in range(3)},
    )
    assert open_source(tmp_path).fields == ("title", "description")
    data = prepare(tmp_path, tmp_path / "out", progress=False)
    assert data.texts()[0] == "T0. Diners, Greek"


def test_lists_under_another_name_by_format(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.json", {"ann": ["x", "y"], "bob": ["y", 7]})
    message = refusal(path)
    assert "mine.json is one JSON object of ids and lists" in message
    assert "if these are users and their items, oldest first, pass --format lc-rec" in message
    for given in (path, tmp_path):
        events = events_of(open_source(given, format="lc-rec"))
        assert events == [("ann", "x", 0), ("ann", "y", 1), ("bob", "y", 2), ("bob", "7", 3)]


def test_empty_lists_are_no_events(tmp_path: Path) -> None:
    write(tmp_path / "x.inter.json", {"0": [], "1": [5]})
    assert events_of(open_source(tmp_path)) == [("1", "5", 0.0)]
    write(tmp_path / "x.inter.json", {"0": []})
    assert events_of(open_source(tmp_path)) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"0": [0, 1], "1": [2}', r"x.inter.json, line 1 is not JSON (Expecting ',' delimiter"),
        ('{"0": [0, 1],\n"1": [2', "x.inter.json, line 2 is not JSON"),
        ('{"0": [0, 1], "0": [2]}', "x.inter.json has the key '0' twice in one object; keep one"),
        ('{"0": [0, 1.5]}', "x.inter.json: '0' has [0, 1.5], not a list of ids; expected {\"1\":"),
        ('{"0": [true]}', "x.inter.json: '0' has [true], not a list of ids"),
        ('{"0": [1], "1": 2}', "x.inter.json: '1' has 2, not a list of ids"),
        ('{"0": [1, ""]}', "x.inter.json, user '0' has no item id; give it one or remove the row"),
        ('{"": [1]}', "x.inter.json, user '' has no user id"),
        ('{"0": ["\\ud800"]}', "x.inter.json cannot be read as utf-8"),
        ("{}", "x.inter.json is empty; expected one JSON object with a key for each id"),
        ('"x"', "x.inter.json is a JSON str; expected one JSON object"),
        ('{"0": ["<a_1>"]}', "x.inter.json is the semantic ids of items"),
        ('{"0": {"title": "x"}}', "x.inter.json is one JSON object of items and their fields"),
    ],
)
def test_bad_lists(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.inter.json"
    path.write_text(text)
    assert says in refusal(path)


def test_two_lists_in_one_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.inter.json", LISTS)
    write(tmp_path / "b.inter.json", LISTS)
    message = refusal(tmp_path)
    assert "has 2 .inter.json files (a.inter.json, b.inter.json), not one; give the" in message


# -- RecFormer -----------------------------------------------------------------------------------

SPLIT = {
    "train": {"0": [0, 1, 0], "1": [2, 1], "2": [1, 2]},
    "val": {"0": [2], "1": [0]},
    "test": {"0": [1], "1": [3]},
}
META = {
    "B9": {"title": "unused", "brand": "", "category": ""},
    **{f"B{n}": {"title": f"T&amp;{n}", "brand": "", "category": "x y"} for n in range(4)},
}


def recformer(folder: Path) -> Path:
    for name, lists in SPLIT.items():
        write(folder / f"{name}.json", lists)
    write(folder / "umap.json", {"A0": 0, "A1": 1, "A2": 2})
    write(folder / "smap.json", {f"B{n}": n for n in range(4)})
    write(folder / "meta_data.json", META)
    return folder


def test_recformer(tmp_path: Path) -> None:
    folder = recformer(tmp_path / "Scientific")
    archive = tmp_path / "s.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.iterdir():
            file.write(path, path.name)
    paths = [folder, archive, *(folder / f"{name}.json" for name in SPLIT)]
    for path, format in [*((path, None) for path in paths), (folder, "recformer")]:
        source = open_source(path, format=format)
        assert source.format == "recformer"
        assert events_of(source) == [
            *(("A0", f"B{i}", float(n)) for n, i in enumerate([0, 1, 0, 2, 1])),
            *(("A1", f"B{i}", float(n)) for n, i in enumerate([2, 1, 0, 3], 5)),
            *(("A2", f"B{i}", float(n)) for n, i in enumerate([1, 2], 9)),
        ]
        splits = [s for batch in source.events() for s in batch["split"].to_pylist()]
        assert splits == [0, 0, 0, 1, 2, 0, 0, 1, 2, 0, 0]
        assert source.fields == ("title", "brand", "category")
        assert catalog_of(source)["B1"] == {"title": "T&1", "brand": "", "category": "x y"}
    data = prepare(folder, tmp_path / "out", progress=False)
    assert data.n_items == 4  # the unused one is dropped


def test_recformer_without_texts(tmp_path: Path) -> None:
    (recformer(tmp_path) / "meta_data.json").unlink()
    assert open_source(tmp_path).catalog is None
    shop = write(tmp_path / "shop.csv", "item_id,title\nB1,X\n")
    assert catalog_of(open_source(tmp_path, items=shop)) == {"B1": {"title": "X"}}


@pytest.mark.parametrize("name", ["train.json", "val.json", "test.json", "smap.json", "umap.json"])
def test_recformer_with_a_file_missing(tmp_path: Path, name: str) -> None:
    (recformer(tmp_path) / name).unlink()
    assert f"{tmp_path} has no {name}, it has meta_data.json, " in refusal(tmp_path)
    (tmp_path / "smap.json").unlink(missing_ok=True)
    (tmp_path / "umap.json").unlink(missing_ok=True)
    assert f"{tmp_path} has no " in refusal(tmp_path)


def test_one_file_of_recformer_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "train.json", SPLIT["train"])
    assert "train.json is read with val.json, test.json, smap.json and umap" in refusal(path)
    recformer(tmp_path)
    message = refusal(tmp_path / "meta_data.json")
    assert "items and their fields" in message and message.endswith("this file by --items")


@pytest.mark.parametrize(
    ("maps", "says"),
    [
        ({"B0": 0, "B1": 1, "B2": 2}, "smap.json has no raw id for '3'"),
        ({"B0": 0, "B1": 1, "B2": 2, "B3": 2}, "smap.json gives 'B3' and '2' to each other"),
    ],
)
def test_recformer_with_bad_maps(tmp_path: Path, maps: dict[str, int], says: str) -> None:
    recformer(tmp_path)
    write(tmp_path / "smap.json", maps)
    assert says in refusal(tmp_path)


# -- objects of items as a catalog ---------------------------------------------------------------


def test_an_object_of_items_as_catalog_of_any_log(tmp_path: Path) -> None:
    items = write(tmp_path / "items.json", ITEMS)
    table = write(tmp_path / "log.csv", "user_id,item_id,timestamp\nu,0,1\nu,1,2\n")
    atomic = write(tmp_path / "r" / "x.inter", "user_id:token\titem_id:token\ttimestamp:float\n")
    text = write(tmp_path / "s" / "Beauty.txt", "1 0 1\n2 2 1 0\n")
    rows = [{"reviewerID": "A1", "asin": "0", "unixReviewTime": 1}]
    reviews = write(tmp_path / "a" / "reviews.json", rows[0])
    expected = {"title": "A & B", "brand": "", "categories": "Music,Strings"}
    films = write(tmp_path / "m" / "u.data", "1\t0\t3\t5\n")
    write(films.with_name("u.item"), "")
    for log in (table, atomic, text, reviews, films):
        source = open_source(log, items=items)
        assert catalog_of(source)["0"] == expected
        assert source.format in (
            "csv",
            "recbole",
            "sequences",
            "amazon-2018",
            "movielens-100k",
        )
    assert catalog_of(open_source(tmp_path, format="csv"))["0"] == expected
    assert open_source(tmp_path).format == "csv"  # objects are no reviews
    write(reviews.with_name("meta_x.json"), ITEMS)
    source = open_source(reviews.parent)
    assert (source.format, catalog_of(source)["0"]) == ("amazon-2018", expected)


def test_an_object_beside_reviews_is_named(tmp_path: Path) -> None:
    write(tmp_path / "reviews.json", {"reviewerID": "A1", "asin": "0", "unixReviewTime": 1})
    write(tmp_path / "x.item.json", ITEMS)
    source = open_source(tmp_path)
    assert source.format == "amazon-2018" and events_of(source) == [("A1", "0", 1.0)]
    assert source.notes == ["x.item.json is one JSON value, not one review per line; not read"]
    assert len(catalog_of(open_source(tmp_path, items=tmp_path / "x.item.json"))) == 3


def test_fields_by_what_they_hold(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp\nu,a,1\n")
    items = write(
        tmp_path / "x.json",
        {
            "a": {"item_id": "a", "title": None, "tags": ["x", ["y"]], "price": 3, "vec": [0.1]},
            "b": {"item_id": "b", "title": 5, "tags": [], "more": {"x": 1}},
            "c": {"title": "C"},
        },
    )
    source = open_source(log, items=items)
    assert (set(source.fields), source.more_fields) == ({"title", "tags"}, ("price",))
    assert catalog_of(source, "title", "tags", "price") == {
        "a": {"title": "", "tags": "x y", "price": "3"},
        "b": {"title": "5", "tags": "", "price": ""},
        "c": {"title": "C", "tags": "", "price": ""},
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            '{"a": {"title": "x"}, "b": 5, "c": {}}',
            "x.json: item 'b' has 5, not an object of fields",
        ),
        ('{"a": {"title": "x"}, "a": {}}', "x.json has the key 'a' twice in one object"),
        ('{"a": {"title": "x"}, "": {}}', "x.json, item '' has no item id; give it one or remove"),
        ('{"a": {"title": "x"', "x.json, line 1 is not JSON"),
        ('{"a": {"title": "\\ud800"}}', "x.json cannot be read as utf-8"),
    ],
)
def test_bad_objects_of_items(tmp_path: Path, text: str, says: str) -> None:
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp\nu,a,1\n")
    items = write(tmp_path / "x.json", text.replace('"b": 5', '\n"b": 5'))
    assert says in refusal(log, items=items)
