"""MIND: histories without times, impressions with clicks, parts in folders."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import pytest
from tests.support.errors import one_line
from tests.support.logs import catalog_of, events_of, write

from l2rec.data.formats.open import open_source
from l2rec.data.formats.source import Source
from l2rec.data.moments import moment
from l2rec.data.prepare import PrepareConfig, prepare
from l2rec.errors import DataError

TRAIN = (
    "1\tU1\t11/11/2019 9:05:58 AM\tN1 N2\tN3-0 N4-1 N5-0\n"
    "2\tU2\t11/9/2019 12:00:00 AM\t\tN1-1 N3-1\n"
    "3\tU1\t11/10/2019 11:00:00 PM\tN1 N2\tN5-1 N3-0\n"
    "4\tU3\t11/12/2019 1:00:00 AM\tN5\tN1-0\n"
)
DEV = (
    "1\tU1\t11/15/2019 12:00:01 AM\tN1 N2\tN6-1 N1-0\n2\tU4\t11/15/2019 12:30:00 PM\tN6 N1\tN2-1\n"
)
TEST = "1\tU1\t11/16/2019 8:00:00 AM\tN1 N2 N9\tN7 N8\n"
NEWS = (
    'N1\tsports\tgolf\tThe "Open\tIt begins.\thttps://x\t[]\t[]\n'
    "N2\tnews\tworld\tTwo, three\t\thttps://y\t[{}]\t[]\n"
)
START = 1573257600.0  # 11/9/2019 0:00


def mind(folder: Path, **parts: str) -> Path:
    for name, text in parts.items():
        write(folder / f"MINDsmall_{name}" / "behaviors.tsv", text)
        write(folder / f"MINDsmall_{name}" / "news.tsv", NEWS)
        write(folder / f"MINDsmall_{name}" / "entity_embedding.vec", "Q1\t0.1\n")
    return folder


def of_user(source: Source, user: str) -> list[tuple[str, float]]:
    """Return a user's items and times from the start, in time order as `prepare` sorts them."""
    found = [(item, time - START) for who, item, time in events_of(source) if who == user]
    return sorted(found, key=lambda event: event[1])


def refusal(path: Path, format: str | None = None) -> str:
    with pytest.raises(DataError) as error:
        events_of(open_source(path, format=format))
    return one_line(error)


@pytest.mark.parametrize("block_bytes", [60, 1 << 20])
def test_one_part(tmp_path: Path, block_bytes: int) -> None:
    folder = mind(tmp_path / "m", train=TRAIN) / "MINDsmall_train"
    archive = tmp_path / "MINDsmall_train.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("behaviors.tsv", "news.tsv"):
            file.write(folder / name, name)
    log = folder / "behaviors.tsv"
    for path, format in (
        (folder, None),
        (tmp_path / "m", None),
        (log, None),
        (archive, None),
        (folder, "mind"),
        (log, "mind"),
    ):
        source = open_source(path, format=format, block_bytes=block_bytes)
        assert source.format == "mind"
        assert [f.name for f in source.files][-1:] in (["news.tsv"], [archive.name])
        assert of_user(source, "U1") == [("N1", -2), ("N2", -1), ("N5", 169200.0), ("N4", 205558.0)]
        assert of_user(source, "U2") == [("N1", 0), ("N3", 0)]
        assert of_user(source, "U3") == [("N5", -1)]
        assert source.fields == ("title", "category", "subcategory", "abstract")
        assert catalog_of(source, "title", "abstract") == {
            "N1": {"title": 'The "Open', "abstract": "It begins."},
            "N2": {"title": "Two, three", "abstract": ""},
        }
        assert list(dict.fromkeys(source.notes)) == [
            "the times of 3 events are made up: MIND's histories have an order and no times, and "
            "were put before the first impression (2019-11-09 00:00:00)"
        ]


def test_all_parts(tmp_path: Path) -> None:
    folder = mind(tmp_path / "m", train=TRAIN, dev=DEV, test=TEST)
    archive = tmp_path / "mind.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for log in folder.glob("*/*.tsv"):
            file.write(log, log.relative_to(tmp_path))
    for path in (folder, archive):
        source = open_source(path)
        first = [("N1", -2), ("N2", -1), ("N5", 169200.0), ("N4", 205558.0), ("N6", 518401.0)]
        assert of_user(source, "U1") == first
        # A user of dev alone has his history before all impressions too.
        assert of_user(source, "U4") == [("N6", -2), ("N1", -1), ("N2", 563400.0)]
        assert len(events_of(source)) == 11
        assert source.notes[0] == (
            "MINDsmall_test/behaviors.tsv: 1 rows were left out, as they do not say what was "
            "clicked"
        )
        assert (
            "splits are given: MINDsmall_dev is test, all before it is train; MINDsmall_dev begins "
            "at 2019-11-15 00:00:01"
        ) in source.notes
        dev = moment("2019-11-15T00:00:01")
        splits = [
            (time >= dev, split)
            for batch in open_source(path).events()
            for time, split in zip(batch["timestamp"].to_pylist(), batch["split"], strict=True)
        ]
        assert {(late, split.as_py()) for late, split in splits} == {(False, 0), (True, 2)}
    data = prepare(folder, tmp_path / "out", PrepareConfig(drop_unknown_items=True), progress=False)
    assert data.n_events == 5  # of N1 and N2 alone


def test_a_part_beside_others(tmp_path: Path) -> None:
    folder = mind(tmp_path, train=TRAIN, dev=DEV) / "MINDsmall_train"
    for path in (folder, folder / "behaviors.tsv"):
        assert open_source(path).notes == [
            "MINDsmall_train alone is read, not MINDsmall_dev beside it; give the folder that "
            "holds them to read all"
        ]


@pytest.mark.parametrize(
    ("later", "expected", "new", "turned"),
    [
        # Goes on with what was clicked and with what is not known.
        ("N1 N2 N5 N7 N4 N8 N9", "N1 N2 N5 N7 N4 N8 N9", 3, 0),
        ("N0 N1 N2", "N0 N1 N2 N5 N4", 1, 0),
        ("N2 N5", "N1 N2 N5 N4", 0, 0),  # the newest only
        ("N7 N5", "N1 N2 N7 N5 N4", 1, 0),
        ("N7 N8", "N1 N2 N5 N4 N7 N8", 2, 0),  # none of the known ones
        ("N1 N1 N2", "N1 N1 N2 N5 N4", 1, 0),
        ("N2 N1", "N1 N2 N5 N4", 0, 1),
    ],
)
def test_a_later_history(tmp_path: Path, later: str, expected: str, new: int, turned: int) -> None:
    dev = f"1\tU1\t11/15/2019 12:00:01 AM\t{later}\tN6-1\n"
    source = open_source(mind(tmp_path, train=TRAIN, dev=dev))
    found = of_user(source, "U1")
    assert [item for item, _ in found] == [*expected.split(), "N6"]
    assert {"N5": 169200.0, "N4": 205558.0, "N6": 518401.0}.items() <= dict(found).items()
    assert len({time for _, time in found}) == len(found)
    notes = "; ".join(source.notes)
    assert (f"{new} events stand in a later history of their user alone" in notes) == (new > 0)
    assert (f"{turned} events stand elsewhere in a later history" in notes) == (turned > 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            TRAIN + "5\tU1\t2019-11-11\tN1\tN2-1\n",
            "behaviors.tsv, line 5: time '2019-11-11' is not",
        ),
        (
            TRAIN + "5\tU1\t13/11/2019 1:00:00 AM\tN1\tN2-1\n",
            "line 5: time '13/11/2019 1:00:00 AM'",
        ),
        (TRAIN + "5\tU1\t11/11/2019 1:00:00 AM\tN1\tN2-1 N3\n", "line 5: some of its news end in"),
        (TRAIN + "5\t\t11/11/2019 1:00:00 AM\tN1\tN2-1\n", "line 5 has no user id"),
        (
            TRAIN + "5\tU1\t11/11/2019 1:00:00 AM\tN1\n",
            "line 5 has 4 columns, not the 5 of this fo",
        ),
        (TEST, "says what was clicked (N1-1 N2-0), as in MIND's test part; give the train or dev"),
    ],
)
@pytest.mark.parametrize("block_bytes", [60, 1 << 20])
def test_bad_rows(tmp_path: Path, text: str, says: str, block_bytes: int) -> None:
    folder = mind(tmp_path, train=text)
    with pytest.raises(DataError) as error:
        events_of(open_source(folder, block_bytes=block_bytes))
    assert says in one_line(error)


def test_no_parts_and_other_tables_of_the_name(tmp_path: Path) -> None:
    log = write(tmp_path / "behaviors.tsv", "user_id\titem_id\ttimestamp\nu\ti\t1\n")
    assert open_source(log).format == "csv"
    write(tmp_path / "x" / "log.tsv", TRAIN)
    message = refusal(tmp_path / "x", format="mind")
    assert (
        "x has no behaviors.tsv, nor has a folder in it; give a folder of MIND, such as" in message
    )
    assert events_of(open_source(tmp_path / "x" / "log.tsv", format="mind"))[0][0] == "U1"


def test_without_news_and_with_other_items(tmp_path: Path) -> None:
    log = write(tmp_path / "m" / "behaviors.tsv", TRAIN)
    assert open_source(log).catalog is None
    items = write(tmp_path / "items.csv", "item_id,title\nN1,Own\n")
    assert catalog_of(open_source(log, items=items)) == {"N1": {"title": "Own"}}


def test_parts_with_the_same_clicks_are_refused(tmp_path: Path) -> None:
    """Read both, and every event of the smaller one counts twice."""
    for name, text in (("small", TRAIN), ("large", TRAIN + DEV)):
        write(tmp_path / f"MIND{name}_train" / "behaviors.tsv", text)
    message = refusal(tmp_path)
    assert "MINDlarge_train and MINDsmall_train have 4 clicks in common, which would be" in message


def test_a_packed_file(tmp_path: Path) -> None:
    log = tmp_path / "behaviors.tsv.gz"
    log.write_bytes(gzip.compress(TRAIN.encode()))
    (tmp_path / "news.tsv.gz").write_bytes(gzip.compress(NEWS.encode()))
    for path in (log, tmp_path):
        source = open_source(path)
        assert (source.format, len(source.files)) == ("mind", 2)
