"""The benchmark CSV files of Amazon Reviews 2023, whole or in splits, with metadata beside them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from tests.support.errors import one_line

from l2rec.data.formats.columns import Columns
from l2rec.data.formats.open import open_source
from l2rec.data.formats.source import Source
from l2rec.data.prepare import PrepareConfig, prepare
from l2rec.errors import DataError

HEADER = "user_id,parent_asin,rating,timestamp"
NAME = "All_Beauty"
ROWS = {  # the split, the row, the history
    "u,a,5.0,1588687728923": ("train", ""),
    "u,b,1.0,1600000000000": ("train", "a"),
    "u,c,3.0,1628643414042": ("valid", "a b"),
    "u,d,3.0,1658002729837": ("test", "a b c"),
    "v,b,5.0,1628643414043": ("valid", ""),
    "v,a,5.0,1658002729838": ("test", "b"),
}
EVENTS = [
    ("u", "a", 1588687728.923, 0),
    ("u", "b", 1600000000.0, 0),
    ("u", "c", 1628643414.042, 1),
    ("v", "b", 1628643414.043, 1),
    ("u", "d", 1658002729.837, 2),
    ("v", "a", 1658002729.838, 2),
]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def rating_only(folder: Path, ending: str = "csv") -> Path:
    return write(folder / f"{NAME}.{ending}", "\n".join([HEADER, *ROWS]) + "\n")


def splits(folder: Path, ending: str = "csv", history: bool = False, name: str = NAME) -> Path:
    for split in ("train", "valid", "test"):
        lines = [
            f"{row},{past}" if history else row for row, (s, past) in ROWS.items() if s == split
        ]
        header = HEADER + ",history" * history
        write(folder / f"{name}.{split}.{ending}", "\n".join([header, *lines]) + "\n")
    return folder


def metadata(folder: Path, name: str = NAME, ending: str = "jsonl") -> Path:
    rows = [{"parent_asin": i, "title": i.upper(), "store": "S", "categories": []} for i in "abcd"]
    return write(folder / f"meta_{name}.{ending}", "".join(json.dumps(row) + "\n" for row in rows))


def events_of(source: Source) -> list[tuple[str, str, float, int | None]]:
    rows = [row for batch in source.events() for row in batch.to_pylist()]
    return [(r["user_id"], r["item_id"], r["timestamp"], r.get("split")) for r in rows]


def refusal(path: Path, format: str | None = None) -> str:
    with pytest.raises(DataError) as error:
        events_of(open_source(path, format=format))
    return one_line(error)


@pytest.mark.parametrize("ending", ["csv", "csv.gz"])
@pytest.mark.parametrize("way", ["file", "folder", "named", "family", "item"])
def test_rating_only(tmp_path: Path, ending: str, way: str) -> None:
    path = rating_only(tmp_path, ending)
    format = {"named": "amazon-2023-csv", "family": "amazon"}.get(way)
    columns = Columns(item="parent_asin") if way == "item" else None
    source = open_source(tmp_path if way == "folder" else path, format=format, columns=columns)
    assert (source.format, source.catalog, source.notes) == ("amazon-2023-csv", None, [])
    assert sorted(events_of(source)) == sorted((u, i, t, None) for u, i, t, _ in EVENTS)


@pytest.mark.parametrize("ending", ["csv", "csv.gz"])
@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("format", [None, "amazon-2023-csv"])
def test_splits(tmp_path: Path, ending: str, history: bool, format: str | None) -> None:
    source = open_source(splits(tmp_path, ending, history), format=format)
    assert source.format == "amazon-2023-csv"
    assert events_of(source) == EVENTS
    assert source.notes == [
        f"read as one log whose splits are given: {NAME}.train.csv, {NAME}.valid.csv, "
        f"{NAME}.test.csv (train, valid, test)"
    ]


def test_metadata(tmp_path: Path) -> None:
    metadata(tmp_path, "Books")
    for ending in ("jsonl", "jsonl.gz"):
        meta = metadata(tmp_path, ending=ending)
        path = rating_only(tmp_path)
        folder = splits(tmp_path / ending)
        beside, given = open_source(path), open_source(folder, items=meta)
        metadata(folder, "of_it")
        for source in (beside, given, open_source(folder)):
            assert source.fields == ("title", "category", "brand")
            assert source.catalog is not None
        assert [source.files[-1].name for source in (beside, given)] == [meta.name, meta.name]
        assert events_of(open_source(folder)) == EVENTS
        meta.unlink()
    assert open_source(rating_only(tmp_path)).catalog is None


def test_dates_and_texts_of_a_prepared_log(tmp_path: Path) -> None:
    metadata(tmp_path)
    config = PrepareConfig.model_validate({"before": "2021-08-12", "text": "{title} by {brand}"})
    data = prepare(rating_only(tmp_path), tmp_path / "out", config, progress=False)
    assert (data.n_users, data.n_events) == (2, 4)
    assert data.texts() == ["A by S", "B by S", "C by S"]
    assert data.order.unit == "seconds"


def test_one_split_alone(tmp_path: Path) -> None:
    folder = splits(tmp_path)
    source = open_source(folder / f"{NAME}.train.csv")
    assert [event[3] for event in events_of(source)] == [None, None]
    assert source.notes == [
        f"{NAME}.train.csv is one split (train); {NAME}.test.csv, {NAME}.valid.csv beside it are "
        "not read, so events may be missing; give a folder with these files alone to read them "
        "all, with their splits"
    ]
    (folder / f"{NAME}.valid.csv").unlink()
    assert "has 2 .csv files" in refusal(folder)
    assert "each alone is a part of it" in refusal(folder)


def test_one_split_with_histories(tmp_path: Path) -> None:
    path = splits(tmp_path, history=True) / f"{NAME}.test.csv"
    message = refusal(path)
    assert f"{NAME}.test.csv has samples, not events: column 'history' holds the history" in message
    assert (
        f"prepare a folder with {NAME}.test.csv, {NAME}.train.csv and {NAME}.valid.csv alone, or "
        "the log as in rating_only/" in message
    )


def test_splits_without_first_events(tmp_path: Path) -> None:
    splits(tmp_path, history=True)
    for path in tmp_path.iterdir():
        lines = path.read_text().splitlines()
        path.write_text("\n".join(line for line in lines if not line.endswith(",")) + "\n")
    message = refusal(tmp_path)
    assert "have no row with an empty history, so the first event of each user is not" in message


def test_several_logs_in_one_folder(tmp_path: Path) -> None:
    splits(tmp_path)
    splits(tmp_path, name="Books")
    message = refusal(tmp_path)
    assert "has 6 .csv files" in message
    assert message.endswith("give a folder with the train, valid and test files of one log alone")


def test_other_tables_are_not_taken_for_it(tmp_path: Path) -> None:
    for number, text in enumerate(
        (
            f"{HEADER}\nu,a,5,1588687728\n",  # seconds
            f"{HEADER}\nu,a,5,2020-05-05\n",
            f"{HEADER},price\nu,a,5,1588687728923,1\n",
        )
    ):
        path = write(tmp_path / f"{number}.csv", text)
        assert open_source(path, columns=Columns(item="parent_asin")).format == "csv"
    path = rating_only(tmp_path / "a")
    assert open_source(path, columns=Columns("parent_asin", "user_id")).format == "csv"
    write(path.with_name("r.jsonl"), json.dumps({"user_id": 1, "parent_asin": 2, "timestamp": 3}))
    assert open_source(tmp_path / "a").format == "amazon-2023"


def test_missing_columns_and_wrong_times(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "user_id,item_id,timestamp\nu,a,1\n")
    assert refusal(path, "amazon-2023-csv").endswith(
        "x.csv has no column 'parent_asin', as --format amazon-2023-csv has, but user_id, item_id, "
        "timestamp; leave --format out or choose another"
    )
    path = rating_only(tmp_path)
    path.write_text(path.read_text() + "v,c,5.0,\n")
    assert f"{NAME}.csv, line 8: timestamp is missing" in refusal(path)
