"""Steam and Goodreads, as UCSD publishes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.errors import one_line
from tests.support.logs import catalog_of, events_of, lines, write

from l2rec.data.formats.columns import Columns
from l2rec.data.formats.open import open_source
from l2rec.data.formats.source import Source
from l2rec.errors import DataError


def as_literal(row: Any) -> str:
    """Write a row as Python 2 printed it."""
    return repr(row).replace("{'", "{u'").replace(": '", ": u'").replace(", '", ", u'")


REVIEWS = [
    {"username": "Chaos", "hours": 13.3, "product_id": "725280", "date": "2017-12-17", "text": "x"},
    {"username": "C'est", "product_id": "328100", "date": "2011-01-02", "early_access": False},
]
GAMES: list[dict[str, Any]] = [
    {
        "publisher": "Kotoshiro",
        "genres": ["Action", "Indie"],
        "app_name": "Lost &amp; Found",
        "title": "Lost",
        "tags": ["Strategy", "Action"],
        "id": "725280",
        "price": 4.99,
        "early_access": False,
    },
    {"title": "Ironbound", "id": "328100", "price": "Free To Play"},
    {"url": "http://store.steampowered.com/", "app_name": "", "price": 19.99},
]
SEEN = [("Chaos", "725280", 1513468800.0), ("C'est", "328100", 1293926400.0)]


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        events_of(open_source(path, **options))
    return one_line(error)


def types_of(source: Source) -> list[str]:
    return [row["event_type"] for batch in source.events() for row in batch.to_pylist()]


@pytest.mark.parametrize("write_row", [as_literal, json.dumps])
@pytest.mark.parametrize("suffix", ["json", "json.gz"])
def test_steam(tmp_path: Path, write_row: Any, suffix: str) -> None:
    log = lines(tmp_path / f"steam_reviews.{suffix}", REVIEWS, write_row)
    games = lines(tmp_path / f"steam_games.{suffix}", GAMES, write_row)
    for path, items, format in ((tmp_path, None, None), (log, games, None), (log, games, "steam")):
        source = open_source(path, items=items, format=format)
        assert source.format == "steam"
        assert events_of(source) == SEEN
        assert source.fields == ("title", "genres", "tags")
        assert catalog_of(source) == {
            "725280": {
                "title": "Lost & Found",
                "genres": "Action, Indie",
                "tags": "Strategy, Action",
            },
            "328100": {"title": "Ironbound", "genres": "", "tags": ""},
        }
        assert catalog_of(source, "price", "early_access")["725280"] == {
            "price": "4.99",
            "early_access": "false",
        }
        assert source.notes[0] == "steam_games.json: lines without 'id' were left out: 1"
    assert open_source(log).catalog is None


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"user_id": "7", "items_count": 1, "items": [{"item_id": "10", "item_name": "CS"}]},
            "has the games that each user owns, without times, not one event per line; prepare ste",
        ),
        (
            {"user_id": "7", "user_url": "u", "reviews": [{"posted": "Posted November 5."}]},
            "has the reviews of each user in one line, many with a day and no year",
        ),
    ],
)
def test_other_files_of_steam_are_refused(tmp_path: Path, row: Any, says: str) -> None:
    path = lines(tmp_path / "australian.json", [row], as_literal)
    assert says in refusal(path)
    assert says in refusal(path, format="steam")


def test_the_catalog_of_steam_is_no_log(tmp_path: Path) -> None:
    path = lines(tmp_path / "steam_games.json", GAMES, as_literal)
    message = refusal(path, format="steam")
    assert "has no key 'username' in its first lines; a log of steam has username, pro" in message


SHELVED = [
    {
        "user_id": "8842",
        "book_id": "24375664",
        "review_id": "5cd4",
        "is_read": True,
        "rating": 5,
        "date_added": "Sun Jul 30 07:44:10 -0700 2017",
        "read_at": "",
    },
    {
        "user_id": "8842",
        "book_id": "18245960",
        "is_read": False,
        "rating": 0,
        "date_added": "Wed Dec  6 10:00:00 +0000 2006",
    },
]
BOOKS = [
    {
        "book_id": "24375664",
        "title": "The <i>Three</i>-Body Problem",
        "description": "Stars &amp; suns",
        "authors": [{"author_id": "1", "role": ""}],
        "average_rating": "4.1",
        "similar_books": [],
    }
]


def test_goodreads(tmp_path: Path) -> None:
    log = lines(tmp_path / "goodreads_interactions_poetry.json.gz", SHELVED, json.dumps)
    books = lines(tmp_path / "goodreads_books_poetry.json.gz", BOOKS, json.dumps)
    genres = [{"book_id": "24375664", "genres": {"fiction": 3}}]
    lines(tmp_path / "goodreads_book_genres_initial.json.gz", genres, json.dumps)
    for path, items, format in (
        (tmp_path, None, None),
        (log, books, None),
        (log, books, "goodreads"),
    ):
        source = open_source(path, items=items, format=format)
        assert source.format == "goodreads"
        assert events_of(source) == [
            ("8842", "24375664", 1501425850.0),
            ("8842", "18245960", 1165399200.0),
        ]
        assert source.fields == ("title", "description")
        assert "average_rating" in source.more_fields and "authors" not in source.more_fields
        text = {"title": "The Three -Body Problem", "description": "Stars & suns"}
        assert catalog_of(source) == {"24375664": text}
        assert any("--event-type is_read --only true" in note for note in source.notes)
    source = open_source(log, columns=Columns(event_type="is_read"))
    assert types_of(source) == ["true", "false"]
    assert not any("is_read" in note for note in source.notes)


def test_goodreads_by_another_date(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.json", SHELVED[:1], json.dumps)
    message = refusal(path, columns=Columns(timestamp="read_at"))
    assert "x.json, line 1: timestamp is missing" in message
    found = events_of(open_source(path, columns=Columns(timestamp=None)))
    assert found == [("8842", "24375664", 0.0)]


def test_two_goodreads_logs(tmp_path: Path) -> None:
    for name in ("goodreads_interactions_a.json", "goodreads_reviews_a.json"):
        lines(tmp_path / name, SHELVED, json.dumps)
    message = refusal(tmp_path)
    assert "has 2 goodreads log files (goodreads_interactions_a.json, goodreads_rev" in message


def test_goodreads_without_times(tmp_path: Path) -> None:
    path = write(
        tmp_path / "goodreads_interactions.csv",
        "user_id,book_id,is_read,rating,is_reviewed\n0,948,1,5,0\n0,947,1,5,1\n",
    )
    message = refusal(path)
    assert "goodreads_interactions.csv has no times, and its rows are in no known order" in message
    columns = Columns(item="book_id", timestamp=None)
    assert events_of(open_source(path, columns=columns)) == [("0", "948", 0.0), ("0", "947", 1.0)]


def test_goodreads_dates_in_a_table(tmp_path: Path) -> None:
    path = write(
        tmp_path / "log.csv",
        "user_id,item_id,timestamp\nu,a,Sun Jul 30 07:44:10 -0700 2017\nu,b,2017-07-30T14:44:11\n",
    )
    assert events_of(open_source(path)) == [("u", "a", 1501425850.0), ("u", "b", 1501425851.0)]
