"""Steam and Goodreads as UCSD publishes them: lines under known keys, with days or times.

    steam        steam_reviews.json, steam_games.json: Python literals, dates in days
    goodreads    goodreads_interactions_*.json, goodreads_books*.json: JSON Lines

Other files of these collections have no times, or only a part of them; they are refused by name
of what to take instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from l2rec.data.formats.columns import Columns
from l2rec.data.formats.files import File, is_folder, only_file, split_note
from l2rec.data.formats.jsonl import Keys, keys_of, line_catalog, line_events
from l2rec.data.formats.source import (
    CatalogReader,
    Context,
    OpenCatalog,
    Reader,
    Source,
    as_source,
)
from l2rec.data.formats.tables import read_header
from l2rec.errors import DataError


@dataclass(frozen=True)
class Dump:
    """Keys of the events, the key of the items' ids in the catalog, keys that tell a catalog, and
    the fields of the text with the keys of each.
    """

    keys: Keys
    item: str
    catalog: frozenset[str]
    fields: Mapping[str, tuple[str, ...]]


DUMPS = {
    "steam": Dump(
        Keys("username", "product_id", "date"),
        "id",
        frozenset({"id", "app_name"}),
        {"title": ("app_name", "title"), "genres": ("genres",), "tags": ("tags",)},
    ),
    "goodreads": Dump(
        Keys("user_id", "book_id", "date_added"),
        "book_id",
        frozenset({"book_id", "title"}),
        {"title": ("title",), "description": ("description",)},
    ),
}
_NO_LOGS = {
    frozenset({"user_id", "items_count", "items"}): (
        "the games that each user owns, without times, not one event per line"
    ),
    frozenset({"user_id", "user_url", "reviews"}): (
        "the reviews of each user in one line, many with a day and no year, not one event per line"
    ),
}
GOODREADS_CSV = ["user_id", "book_id", "is_read", "rating", "is_reviewed"]


def _kind(file: File, encoding: str) -> str | None:
    """Tell whose log a file is, by its first keys."""
    keys = keys_of(file, encoding)
    return next((kind for kind, dump in DUMPS.items() if keys >= set(dump.keys.names)), None)


def _no_log(file: File, context: Context) -> DataError | None:
    """Return the error that says what a file is that has no times."""
    encoding = context.columns.encoding
    keys = keys_of(file, encoding)
    for known, what in _NO_LOGS.items():
        if keys >= known:
            return DataError(
                f"{file} has {what}; prepare steam_reviews.json, which has a date in each line"
            )
    if not file.ends(".csv") or context.columns.timestamp is None:
        return None
    if read_header(file, ",", encoding) != GOODREADS_CSV:
        return None
    return DataError(
        f"{file} has no times, and its rows are in no known order; prepare "
        f"goodreads_interactions_dedup.json.gz or that of a genre, which have date_added, or pass "
        f"--user user_id --item book_id --timestamp none if the order of the rows will do"
    )


def detect(path: Path, files: dict[str, File], items: File | None, context: Context) -> str | None:
    """Tell by the keys of the first lines."""
    logs = [file for file in files.values() if file != items]
    found = next((k for f in logs if (k := _kind(f, context.columns.encoding))), None)
    if found is not None:
        return found
    if len(logs) == 1 and (told := _no_log(logs[0], context)) is not None:
        raise told
    return None


def ucsd(
    path: Path,
    files: dict[str, File],
    items: File | None,
    kind: str,
    context: Context,
    open_catalog: OpenCatalog,
) -> Source:
    """Open the events of either, and the catalog that is given or lies in the same folder."""
    encoding, dump = context.columns.encoding, DUMPS[kind]
    if not is_folder(path):
        file = File(path)
        if (told := _no_log(file, context)) is not None:
            raise told
    else:
        logs = {n: f for n, f in files.items() if f != items and _kind(f, encoding) == kind}
        file = only_file(path, logs, ("",), f"{kind} log")
        items = items or _beside(files, dump, encoding)
    keys = _keys(dump.keys, context.columns)
    missing = [key for key in keys.names if key not in keys_of(file, encoding)]
    if missing:
        raise DataError(
            f"{file} has no key {missing[0]!r} in its first lines; a log of {kind} has "
            f"{', '.join(dump.keys.names)}; give such a file, or choose another --format"
        )
    context.notes.extend(split_note(file))
    if kind == "goodreads" and keys.event_type is None:
        context.notes.append(
            "books that were only shelved are events too; --event-type is_read --only true keeps "
            "those that were read"
        )
    catalog = _catalog(items, dump, context, open_catalog) if items else None
    used = [file, *([items] if items else [])]
    return as_source(kind, used, line_events(file, keys, context), catalog)


def _keys(keys: Keys, columns: Columns) -> Keys:
    """Return the known keys, but for those that the options name."""
    return Keys(
        keys.user if columns.user == Columns.user else columns.user,
        keys.item if columns.item == Columns.item else columns.item,
        keys.time if columns.timestamp == Columns.timestamp else columns.timestamp,
        columns.event_type,
    )


def _beside(files: dict[str, File], dump: Dump, encoding: str) -> File | None:
    """Find the catalog: the only file with its keys and not those of events."""
    found = []
    for file in files.values():
        keys = keys_of(file, encoding)
        if keys >= dump.catalog and not keys >= set(dump.keys.names):
            found.append(file)
    return found[0] if len(found) == 1 else None


def _catalog(file: File, dump: Dump, context: Context, open_catalog: OpenCatalog) -> CatalogReader:
    if not keys_of(file, context.columns.encoding) >= dump.catalog:
        return open_catalog(file, context)
    return line_catalog(file, dump.item, context, dump.fields, marked_up=True, without_id=True)


READER = Reader(
    {
        "steam": "steam_reviews.json and steam_games.json: username, product_id, date (Steam)",
        "goodreads": "goodreads_interactions_*.json and books: book_id, date_added (Goodreads)",
    },
    detect,
    ucsd,
)
