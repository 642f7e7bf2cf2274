"""MicroLens: pairs with times or without, and two forms of titles."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.support.errors import one_line
from tests.support.logs import catalog_of, events_of, write

from l2rec.data.formats.columns import Columns
from l2rec.data.formats.open import open_source
from l2rec.errors import DataError

TABLE = "user,item,timestamp\n1,7,1588687728923\n2,8,1588687729000\n1,8,1588687730000\n"
EVENTS = [("1", "7", 1588687728.923), ("2", "8", 1588687729.0), ("1", "8", 1588687730.0)]
PAIRS = "1\t7 8\n2\t8\n"
PLACES = [("1", "7", 0.0), ("1", "8", 1.0), ("2", "8", 2.0)]
TITLES = 'item,title\n7,"One, ""two"""\n8,Three\n'
CUT = '\ufeff7,One, "two"\r\n8,"Three\n9,\n10\n'


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        source = open_source(path, **options)
        events_of(source)
        catalog_of(source)
    return one_line(error)


def test_times_and_titles_with_a_header(tmp_path: Path) -> None:
    folder = tmp_path / "MicroLens-50k"
    log = write(folder / "MicroLens-50k_pairs.csv", TABLE)
    write(folder / "MicroLens-50k_pairs.tsv", PAIRS)
    write(folder / "MicroLens-50k_likes_and_views.txt", "7\t1\t2\n8\t3\t4\n")
    write(folder / "MicroLens-50k_titles.csv", TITLES)
    archive = tmp_path / "m.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.iterdir():
            file.write(path, f"MicroLens-50k/{path.name}")
    for path, format in ((folder, None), (log, None), (archive, None), (folder, "microlens")):
        source = open_source(path, format=format)
        assert source.format == "microlens"
        assert events_of(source) == EVENTS
        assert catalog_of(source) == {"7": {"title": 'One, "two"'}, "8": {"title": "Three"}}
        assert source.notes == [
            "not read beside MicroLens-50k_pairs.csv: MicroLens-50k_likes_and_views.txt, "
            "MicroLens-50k_pairs.tsv"
        ]
    columns = Columns(user="user", item="item", timestamp=None)
    assert events_of(open_source(log, columns=columns)) == [
        (user, item, float(at)) for at, (user, item, _) in enumerate(EVENTS)
    ]


@pytest.mark.parametrize("block_bytes", [12, 1 << 20])
def test_titles_that_are_cut_at_the_first_comma(tmp_path: Path, block_bytes: int) -> None:
    log = write(tmp_path / "m" / "MicroLens-100k_pairs.csv", TABLE)
    write(tmp_path / "m" / "MicroLens-100k_comment_en.txt", "1\t7\tNice\n")
    items = write(tmp_path / "m" / "MicroLens-100k_title_en.csv", CUT)
    for path, given in ((tmp_path / "m", None), (log, None), (log, items)):
        source = open_source(path, items=given, block_bytes=block_bytes)
        assert events_of(source) == EVENTS
        assert catalog_of(source) == {
            "7": {"title": 'One, "two"'},
            "8": {"title": '"Three'},
            "9": {"title": ""},
            "10": {"title": ""},
        }
    write(items, "7,One\nand more, of it\n")
    message = "title_en.csv, line 2 does not begin with a number and a comma: 'and more, of it'"
    assert message in refusal(tmp_path / "m", block_bytes=block_bytes)


def test_pairs_without_times(tmp_path: Path) -> None:
    log = write(tmp_path / "m" / "MicroLens-50k_pairs.tsv", PAIRS)
    for path, format in ((log, None), (tmp_path, None), (log, "microlens")):
        source = open_source(path, format=format)
        assert (source.format, source.catalog) == ("microlens", None)
        assert events_of(source) == PLACES
    write(log, PAIRS + "1\t9\n")
    assert "pairs.tsv, line 3: user 1 has a line already" in refusal(log)


def test_other_items(tmp_path: Path) -> None:
    log = write(tmp_path / "m" / "MicroLens-50k_pairs.csv", TABLE)
    items = write(tmp_path / "items.csv", "item_id,text\n7,Own\n")
    assert catalog_of(open_source(log, items=items)) == {"7": {"text": "Own"}}


def test_two_logs_and_others(tmp_path: Path) -> None:
    log = write(tmp_path / "m" / "MicroLens-50k_pairs.csv", TABLE)
    write(tmp_path / "m" / "MicroLens-100k_pairs.csv", TABLE)
    message = refusal(tmp_path / "m")
    assert "has 2 logs of MicroLens (MicroLens-50k_pairs.csv, MicroLens-100k_pairs.csv)" in message
    assert events_of(open_source(log)) == EVENTS
    other = write(tmp_path / "x_pairs.csv", "user_id,item_id,timestamp\nu,i,1\n")
    assert open_source(other).format == "csv"
    assert "is not MicroLens: expected NAME_pairs.csv" in refusal(other, format="microlens")
    other = write(tmp_path / "y" / "x_pairs.tsv", "user_id\titem_id\ttimestamp\nu\ti\t1\n")
    assert open_source(other).format == "csv"
    assert "has 0 logs of MicroLens (none)" in refusal(other.parent, format="microlens")


def test_times_that_look_like_seconds_are_told(tmp_path: Path) -> None:
    log = write(tmp_path / "M_pairs.csv", "user,item,timestamp\n1,7,1588687728\n1,8,1588687729\n")
    (note,) = open_source(log).notes
    assert "the first, 1588687728, would be of the year 1973 or earlier" in note
    columns = Columns(user="user", item="item")
    assert events_of(open_source(log, format="csv", columns=columns))[0] == ("1", "7", 1588687728.0)
