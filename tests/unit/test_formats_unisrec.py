"""Splits of samples in .inter files: of UniSRec, by position, and of others, by time."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
from tests.support.errors import one_line

from l2rec.data.formats.open import open_source
from l2rec.data.formats.source import Source
from l2rec.data.prepare import prepare
from l2rec.errors import DataError

HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
SPLITS = ("train", "valid", "test")
Row = tuple[str, Sequence[str], str]
"""A user, the history and the item."""


def write_splits(folder: Path, name: str, splits: Iterable[Iterable[Row]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in zip(SPLITS, splits, strict=True):
        lines = (f"{user}\t{' '.join(past)}\t{item}\n" for user, past, item in rows)
        (folder / f"{name}.{split}.inter").write_text(HEADER + "".join(lines))
    return folder


def by_position(log: Mapping[str, Sequence[str]], longest: int = 50) -> list[list[Row]]:
    """Cut a log as UniSRec does: the newest item of a user first in train."""
    train, valid, test = [], [], []
    for user, items in log.items():
        last = len(items) - 2
        train += [(user, items[:at][-longest:], items[at]) for at in range(last - 1, 0, -1)]
        valid.append((user, items[:last][-longest:], items[last]))
        test.append((user, items[: last + 1][-longest:], items[last + 1]))
    return [train, valid, test]


def by_time(
    events: Sequence[tuple[str, str]], longest: int, bounds: tuple[int, int]
) -> list[list[Row]]:
    """Cut a log in the order of time as AmazonReviews2023 and MiniOneRec do."""
    seen: dict[str, list[str]] = {}
    rows: list[Row] = []
    for user, item in events:
        past = seen.setdefault(user, [])
        if past:
            rows.append((user, past[-longest:], item))
        past.append(item)
    first, second = bounds
    return [rows[:first], rows[first:second], rows[second:]]


def sequences_of(source: Source) -> dict[str, str]:
    """Return each user's items and splits, after a look at the times."""
    found: dict[str, list[str]] = {}
    rows = [row for batch in source.events() for row in batch.to_pylist()]
    assert [row["timestamp"] for row in rows] == list(range(len(rows)))
    for row in rows:
        found.setdefault(row["user_id"], []).append(f"{row['item_id']}{row['split']}")
    return {user: " ".join(items) for user, items in found.items()}


def refusal(path: Path, **options: str) -> str:
    with pytest.raises(DataError) as error:
        list(open_source(path, **options).events())  # type: ignore[arg-type]
    return one_line(error)


LOG = {"0": "abcde", "1": "bca", "2": "abab"}
FOUND = {"0": "a0 b0 c0 d1 e2", "1": "b0 c1 a2", "2": "a0 b0 a1 b2"}


@pytest.mark.parametrize("block_bytes", [60, 1 << 20])
def test_unisrec(tmp_path: Path, block_bytes: int) -> None:
    folder = write_splits(tmp_path / "Tiny", "Tiny", by_position(LOG))
    archive = tmp_path / "Tiny.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.iterdir():
            file.write(path, f"Tiny/{path.name}")
    one = folder / "Tiny.train.inter"
    for path, format in ((folder, None), (archive, None), (one, None), (one, "unisrec")):
        source = open_source(path, format=format, block_bytes=block_bytes)
        assert (source.format, source.catalog) == ("unisrec", None)
        assert sequences_of(source) == FOUND
        assert list(sequences_of(source)) == ["0", "1", "2"]
        assert [note.split(":")[0] for note in dict.fromkeys(source.notes)] == [
            "read as one log whose splits are given",
            "the splits that are given are by position",
        ]


def test_raw_ids_and_texts_through_the_index(tmp_path: Path) -> None:
    log = {"0": ["0", "1", "2"], "1": ["2", "0", "3"]}
    folder = write_splits(tmp_path / "T", "T", by_position(log))
    (folder / "T.user2index").write_text("A1\t0\nB2\t1\n")
    (folder / "T.item2index").write_text("X\t0\nY\t1\nZ\t2\n W\t3\n")
    (folder / "T.text").write_text(
        "item_id:token\ttext:token_seq\nZ\tA <b>brush</b>. Tools. ACME. \nX\nY\ta\tb \n W\t5'. \n"
    )
    (folder / "T.feat1CLS").write_bytes(b"\0" * 8)
    source = open_source(folder)
    assert sequences_of(source) == {"A1": "X0 Y1 Z2", "B2": "Z0 X1  W2"}
    assert source.catalog is not None and source.fields == ("text",)
    rows = [row for batch in source.catalog(("text",)) for row in batch.to_pylist()]
    assert {row["item_id"]: row["text"] for row in rows} == {
        "Z": "A brush . Tools. ACME.",
        "X": "",
        "Y": "a b",
        " W": "5'.",
    }
    assert [file.name for file in source.files][3:] == ["T.user2index", "T.item2index", "T.text"]
    assert "vectors of the items' texts are not read: T.feat1CLS" in source.notes
    data = prepare(folder, tmp_path / "out", progress=False)
    assert data.order.unit == "order only"


def test_maps_under_the_names_of_lc_rec(tmp_path: Path) -> None:
    folder = write_splits(tmp_path, "T", by_position({"0": ["0", "1", "2"]}))
    (folder / "T.user2id").write_text("A\t0\n")
    (folder / "T.item2id").write_text("X\t0\nY\t1\nZ\t2\n")
    assert sequences_of(open_source(folder)) == {"A": "X0 Y1 Z2"}


def test_a_map_of_another_log(tmp_path: Path) -> None:
    folder = write_splits(tmp_path, "T", by_position({"0": ["0", "1", "2"]}))
    (folder / "T.item2index").write_text("X\t0\nY\t7\n")
    assert refusal(folder) == (
        f"{folder}/T.item2index has no raw id for '1'; fetch the files of one data set together, "
        "or take T.item2index away to keep the numbers"
    )


@pytest.mark.parametrize("size", [3, 4, 5, 6, 9])
def test_histories_that_are_cut_begin_in_the_train_rows(tmp_path: Path, size: int) -> None:
    log = {"0": "abcdefghi"[:size], "1": "aaabaaaca"[:size], "2": "xyz"}
    source = open_source(write_splits(tmp_path, "T", by_position(log, longest=3)))
    found = sequences_of(source)
    assert {user: items[::3] for user, items in found.items()} == log
    assert {items[1::3][-2:] for items in found.values()} == {"12"}
    assert {items[1::3][:-2].strip("0") for items in found.values()} == {""}
    assert len(source.notes) == 2


def test_beginnings_that_nothing_tells_of(tmp_path: Path) -> None:
    train, valid, test = by_position({"0": "abcdefg", "1": "xyz"}, longest=3)
    source = open_source(write_splits(tmp_path, "T", [train[:1], valid, test]))
    assert sequences_of(source) == {"0": "b0 c0 d0 e0 f1 g2", "1": "x0 y1 z2"}
    assert source.notes[2:] == [
        "1 users may have lost their earliest events: histories are cut to 3 items, and that of "
        "their first row is full"
    ]


EVENTS = [*zip("uuvuvwuvwuuvw", "abaccbdebeacd", strict=True)]


@pytest.mark.parametrize("longest", [2, 3, 50])
def test_splits_by_time(tmp_path: Path, longest: int) -> None:
    rows = by_time(EVENTS, longest, (3, 5))
    source = open_source(write_splits(tmp_path, "T", rows))
    assert sequences_of(source) == {
        "u": "a0 b0 c0 d1 e2 a2",
        "v": "a0 c0 e1 c2",
        "w": "b0 b2 d2",
    }
    assert source.notes[1].startswith("the splits that are given are not by position (by time")


def test_texts_of_amazon_reviews_2023(tmp_path: Path) -> None:
    folder = write_splits(tmp_path / "T", "T", by_time(EVENTS, 50, (4, 7)))
    ids = {"[PAD]": 0} | {item: at for at, item in enumerate("abcde", 1)}
    maps = {"item2id": ids, "id2meta": {str(at): f"About {item} " for item, at in ids.items()}}
    (folder / "T.data_maps").write_text(json.dumps(maps))
    data = prepare(folder, tmp_path / "out", progress=False)
    assert data.texts() == [f"About {item}" for item in "abcde"]
    (folder / "T.data_maps").write_text('{"item2id": {"a": 1}}')
    with pytest.raises(DataError, match=r"T\.data_maps is not one JSON object with item2id and"):
        prepare(folder, tmp_path / "other", progress=False)


def test_rows_that_were_left_out_are_filled_from_histories(tmp_path: Path) -> None:
    train = [("u", "a", "b"), ("u", "abcd", "e"), ("v", "x", "y")]
    test = [("u", "cdef", "g"), ("u", "lmno", "p")]
    source = open_source(write_splits(tmp_path, "T", [train, [("v", "xy", "z")], test]))
    assert sequences_of(source) == {
        "u": "a0 b0 c0 d0 e0 f0 g2 l2 m2 n2 o2 p2",
        "v": "x0 y0 z1",
    }
    assert source.notes[2:] == [
        "7 events stand in the history of a later row alone, since their own row is not there; "
        "they are of the split of the event before them",
        "events are missing in 1 places between two rows of a user, where the later history (cut "
        "to 4 items) does not reach back to the earlier row",
    ]


@pytest.mark.parametrize(
    ("splits", "says"),
    [
        (
            [[("u", "a", "b"), ("u", "xb", "c"), ("v", "abc", "d")], [], []],
            "T.train.inter, line 3: the history of user u (x, b) contradicts the rows before it "
            "in train, valid and test, which tell of the events a, b; repair",
        ),
        (
            [[("u", "a", "b"), ("u", "ab", "c")], [("v", "xyz", "a")], [("u", "a", "b")]],
            "T.test.inter, line 2: the history of user u (a) ends before events of rows of the "
            "same split or of one before it (a, b, c); splits that are given may not go back",
        ),
        (
            [[("u", "abcdef", "g")], [("u", "bcdefg", "h"), ("u", "abcdef", "g")], []],
            "T.valid.inter, line 3: the history of user u (..., b, c, d, e, f) ends before",
        ),
        (
            [[], [("u", "abc", "d")], [("u", "xyz", "e")]],
            "T.test.inter, line 2: the history of user u (x, y, z) contradicts the rows before",
        ),
        ([[("u", "a", "")], [], []], "T.train.inter, line 2 has no item id"),
        ([[("", "a", "b")], [], []], "T.train.inter, line 2 has no user id"),
    ],
)
def test_rows_that_do_not_belong_together(
    tmp_path: Path, splits: list[list[Row]], says: str
) -> None:
    assert says in refusal(write_splits(tmp_path, "T", splits))


def test_a_split_without_its_siblings(tmp_path: Path) -> None:
    folder = write_splits(tmp_path, "T", by_position(LOG))
    (folder / "T.valid.inter").unlink()
    told = (
        "T.{}.inter has samples, not events: each row is an item with the history before it; a log "
        "is put together from its three splits, but T.valid.inter is not beside it; add it, or "
        "prepare the log that the samples were made from (one event in each row)"
    )
    assert refusal(folder).endswith(told.format("test"))
    assert refusal(folder / "T.train.inter").endswith(told.format("train"))
    (folder / "T.test.inter").rename(folder / "T.txt")
    assert "T.valid.inter and T.test.inter are not beside it; add them" in refusal(folder)


def test_names_that_do_not_tell_the_splits(tmp_path: Path) -> None:
    folder = write_splits(tmp_path, "T", by_position(LOG))
    (folder / "T.val.inter").write_text(HEADER)
    assert "name them NAME.train.inter, NAME.valid.inter and NAME.test.inter" in refusal(folder)


def test_several_logs_in_one_folder(tmp_path: Path) -> None:
    write_splits(tmp_path, "A", by_position(LOG))
    write_splits(tmp_path, "B", by_position({"0": "xyz"}))
    message = refusal(tmp_path)
    assert "has the splits of 2 logs (A, B), not of one; give the path of a file" in message
    path = Path(message.rpartition("such as ")[2])
    assert sequences_of(open_source(path)) == FOUND
    assert sequences_of(open_source(tmp_path / "B.test.inter")) == {"0": "x0 y1 z2"}


def test_text_as_the_catalog_of_another_log(tmp_path: Path) -> None:
    log, items = tmp_path / "log.csv", tmp_path / "x.text"
    log.write_text("user_id,item_id,timestamp\nu,a,1\n")
    items.write_text("item_id:token\ttext:token_seq\r\na\tA\r\n\tB\r\n")
    source = open_source(log, items=items)
    assert source.catalog is not None
    with pytest.raises(DataError, match=r"x\.text, line 3 has no item id"):
        list(source.catalog(("text",)))
