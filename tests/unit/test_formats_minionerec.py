"""MiniOneRec's folders of CSV: sequences from samples, titles from wherever they are."""

from __future__ import annotations

import csv
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.support.errors import one_line

from l2rec.data.formats.open import open_source
from l2rec.data.formats.source import Source
from l2rec.data.prepare import prepare
from l2rec.errors import DataError

NAME = "Office_Products_5_2016-10-2018-11"
COLUMNS = ["user_id", "history_item_title", "item_title", "history_item_id", "item_id"]
COLUMNS += ["history_item_sid", "item_sid"]
TITLES = ['Pen, "blue"', "it's ink", 'Desk\t12"', "Chair", ""]
EVENTS = [(0, 0), (1, 1), (0, 1), (1, 2), (0, 2), (0, 2), (1, 0), (2, 3), (0, 3), (2, 1), (2, 0)]
FOUND = {"A0": "00 10 20 20 31", "A1": "10 20 00", "A2": "30 12 02"}
"""Items and splits of the events, cut as below."""
Row = tuple[int, Sequence[int], int]


def rows_of(longest: int = 10) -> list[list[Row]]:
    """Cut the log by time: five rows to train, one to valid, two to test."""
    seen: dict[int, list[int]] = {}
    rows: list[Row] = []
    for user, item in EVENTS:
        past = seen.setdefault(user, [])
        if past:
            rows.append((user, past[-longest:], item))
        past.append(item)
    return [rows[:5], rows[5:6], rows[6:]]


def write(folder: Path, splits: Sequence[Sequence[Row]], name: str = NAME) -> Path:
    for split, rows in zip(("train", "valid", "test"), splits, strict=True):
        (folder / split).mkdir(parents=True, exist_ok=True)
        with (folder / split / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for user, past, item in rows:
                titles, codes = [TITLES[i] for i in past], [f"<a_{i}><b_1>" for i in past]
                cells = [titles, TITLES[item], list(past), item, codes, f"<a_{item}><b_1>"]
                writer.writerow([f"A{user}", *map(str, cells)])
    return folder


def sequences_of(source: Source) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    rows = [row for batch in source.events() for row in batch.to_pylist()]
    assert [row["timestamp"] for row in rows] == list(range(len(rows)))
    for row in rows:
        found.setdefault(row["user_id"], []).append(f"{row['item_id']}{row['split']}")
    return {user: " ".join(items) for user, items in found.items()}


def titles_of(source: Source) -> dict[str, str]:
    assert source.catalog is not None and source.fields == ("title",)
    rows = [row for batch in source.catalog(("title",)) for row in batch.to_pylist()]
    return {row["item_id"]: row["title"] for row in rows}


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as error:
        list(open_source(path).events())
    return one_line(error)


CLEAN = {"0": 'Pen, "blue"', "1": "it's ink", "2": 'Desk 12"', "3": "Chair"}


@pytest.mark.parametrize("block_bytes", [400, 1 << 20])
@pytest.mark.parametrize("longest", [2, 10])
def test_minionerec(tmp_path: Path, block_bytes: int, longest: int) -> None:
    folder = write(tmp_path / "Amazon", rows_of(longest))
    archive = tmp_path / "Amazon.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.rglob("*.csv"):
            file.write(path, f"Amazon/{path.relative_to(folder)}")
    ways = (folder, folder / "train", folder / "valid" / f"{NAME}.csv", archive)
    for path, format in (*((way, None) for way in ways), (folder, "minionerec")):
        source = open_source(path, format=format, block_bytes=block_bytes)
        assert source.format == "minionerec"
        assert sequences_of(source) == FOUND
        assert titles_of(source) == CLEAN
        assert re.match(
            r"read as one log whose splits are given: train/([\w.-]+\.csv), valid/\1, test/\1 ",
            source.notes[0],
        )
        assert "not by position (by time over all users" in source.notes[1]
        assert len(source.notes) == 2


def test_the_folder_of_all_folders_and_its_info(tmp_path: Path) -> None:
    folder = write(tmp_path / "data" / "Amazon", rows_of())
    (folder / "info").mkdir()
    lines = [f"<a_{i}>\t{title} of info\t{i}\n" for i, title in enumerate(TITLES[:2])]
    (folder / "info" / f"{NAME}.txt").write_text("".join(lines))
    (folder / "index").mkdir()
    source = open_source(tmp_path / "data")
    assert source.files[-1].name == f"{NAME}.txt"
    assert titles_of(source) == CLEAN | {
        "0": 'Pen, "blue" of info',
        "1": "it's ink of info",
    }
    data = prepare(tmp_path / "data", tmp_path / "out", progress=False)
    assert (data.n_users, data.n_items, data.n_events) == (3, 4, 11)
    assert data.order.unit == "order only"
    (folder / "info" / f"{NAME}.txt").write_text("<a_1>\tPen\t1\n<a_2> Ink 2\n")
    with pytest.raises(DataError, match=r"\.txt, line 2 is not a semantic id, a title and an"):
        titles_of(open_source(folder))


def test_titles_by_hand(tmp_path: Path) -> None:
    items = tmp_path / "items.csv"
    items.write_text("item_id,title\n0,Pen\n1,Ink\n2,Desk\n3,Chair\n")
    source = open_source(write(tmp_path / "A", rows_of()), items=items)
    assert titles_of(source) == {"0": "Pen", "1": "Ink", "2": "Desk", "3": "Chair"}


def test_the_longest_train_rows_alone(tmp_path: Path) -> None:
    train = [(0, [0, 1, 2], 2), (1, [1, 2], 0)]
    source = open_source(write(tmp_path, [train, *rows_of()[1:]]))
    assert sequences_of(source) == FOUND


def test_rows_that_were_left_out(tmp_path: Path) -> None:
    train, valid, test = rows_of()
    source = open_source(write(tmp_path, [train[:2], valid, test]))
    assert sequences_of(source)["A0"] == "00 10 20 20 31"
    assert source.notes[2:] == [
        "2 events stand in the history of a later row alone, since their own row is not there; "
        "they are of the split of the event before them"
    ]


def test_a_missing_split(tmp_path: Path) -> None:
    folder = write(tmp_path / "A", rows_of())
    shutil.rmtree(folder / "valid")
    told = (
        f"put together from train/{NAME}.csv, valid/{NAME}.csv and test/{NAME}.csv, but there is "
        f"no valid/{NAME}.csv; add what is missing, or prepare the log that the samples were made"
    )
    assert f"{folder} has samples, not events" in refusal(folder)
    assert told in refusal(folder)
    assert told in refusal(folder / "test" / f"{NAME}.csv")


def test_several_logs(tmp_path: Path) -> None:
    write(tmp_path, rows_of())
    write(tmp_path, [[(7, [4], 3)], [], []], "Other")
    message = refusal(tmp_path)
    assert f"has the splits of 2 logs ({NAME}.csv, Other.csv), not of one" in message
    path = Path(message.rpartition("such as ")[2])
    assert sequences_of(open_source(path)) == FOUND
    assert sequences_of(open_source(tmp_path / "train" / "Other.csv")) == {"A7": "40 30"}


def test_three_files_in_one_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "A", rows_of())
    for split in ("train", "valid", "test"):
        (folder / split / f"{NAME}.csv").rename(folder / f"Office.{split}.csv")
        (folder / split).rmdir()
    assert sequences_of(open_source(folder)) == FOUND


@pytest.mark.parametrize("cell", ["3 5", "{3, 5}", "[3, 5", "__import__('os')"])
def test_what_is_no_list(tmp_path: Path, cell: str) -> None:
    path = write(tmp_path, rows_of()) / "valid" / f"{NAME}.csv"
    path.write_text(path.read_text().replace('"[0, 1, 2, 2]"', f'"{cell}"'))
    assert f"{NAME}.csv, line 2: {cell!r} is not a list as Python prints it" in refusal(tmp_path)


def test_a_history_of_other_events(tmp_path: Path) -> None:
    train, valid, test = rows_of()
    message = refusal(write(tmp_path, [[*train[:3], (0, [3, 2], 1), *train[3:]], valid, test]))
    assert "line 5: the history of user A0 (3, 2) contradicts the rows before it" in message
