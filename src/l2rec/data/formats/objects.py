"""JSON files that are one object: told by their shape, read as lists of events or as a catalog.

Such a file is parsed as a whole, so it is in memory while its batches are made.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from l2rec.data.formats.fields import clean, flat, separator_of
from l2rec.data.formats.files import File, open_text, reading
from l2rec.data.formats.names import Names
from l2rec.data.formats.source import CatalogReader, Context, catalog_batch, event_batch
from l2rec.errors import DataError

HEAD_BYTES = 1 << 20
"""More than a line of JSON Lines is taken to have."""
MAP_KEYS = 20
USERS = 1 << 12
ITEMS = 1 << 16
LONG_FIELDS = ("description", "feature", "features")
"""Fields that are pages of text where there are categories too; `amazon.py` names them so."""

_FIRST = re.compile(r'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*(\[\s*"\s*<|\[|\{|-?\d)')
_KINDS = {"[": "lists", "{": "fields"}
_SHAPES = {
    "array": (
        "one JSON array, not one object per line; write each of its objects in a line "
        "(jq -c '.[]' FILE)"
    ),
    "lists": (
        "one JSON object of ids and lists, not one event per line; if these are users and their "
        "items, oldest first, pass --format lc-rec (RecFormer's train.json is read with val.json, "
        "test.json, smap.json and umap.json beside it)"
    ),
    "fields": (
        "one JSON object of items and their fields (as LC-Rec's .item.json and RecFormer's "
        "meta_data.json are), which has no events; give the log, and this file by --items"
    ),
    "codes": (
        "the semantic ids of items (as LC-Rec's and LETTER's .index.json are), neither events nor "
        "texts; give the log, and the texts by --items"
    ),
    "numbers": (
        "a map of ids to numbers (as RecFormer's smap.json and umap.json are), neither events nor "
        "texts; give the log, and the texts by --items"
    ),
}


# -- what a file is ------------------------------------------------------------------------------


def kind(file: File, encoding: str) -> str | None:
    """Tell what one JSON value a file holds; None for JSON Lines and whatever else.

    ``array``; or an object of ids and ``lists``, ``codes`` (lists of semantic ids), ``fields``
    or ``numbers``.
    """
    with reading(file, encoding), open_text(file, encoding) as stream:
        head = stream.read(HEAD_BYTES).decode(errors="replace").lstrip()
    if head.startswith("["):
        return "array"
    first = _FIRST.match(head)
    if first is None or _is_row(head):
        return None
    value = first[1]
    found = "codes" if value.endswith("<") else _KINDS.get(value, "numbers")
    if found == "numbers" and head.count('":') < MAP_KEYS:  # a line of JSON Lines may be so too
        return None
    return found


def _is_row(head: str) -> bool:
    """Tell whether the first line is a row of JSON Lines.

    It is a whole object then, and has values of several types, or other rows after it.
    """
    line, _, rest = head.partition("\n")
    try:
        row = json.loads(line)
    except ValueError:  # the first line of an indented object, or the beginning of a long one
        return False
    return bool(rest.strip()) or len({type(value) for value in row.values()}) > 1


def one_value(file: File, encoding: str) -> DataError | None:
    """Return the error that says what a file of one JSON value is; None for JSON Lines."""
    found = kind(file, encoding)
    return DataError(f"{file} is {_SHAPES[found]}") if found else None


# -- what is in it -------------------------------------------------------------------------------


def read_object(file: File, encoding: str) -> dict[str, Any]:
    """Parse a file that is one JSON object.

    Raises:
        DataError: it is something else, torn or empty, or has a key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            key = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise DataError(f"{file} has the key {key!r} twice in one object; keep one of the two")
        return found

    with reading(file, encoding), open_text(file, encoding) as stream:
        text = stream.read().decode()
    try:
        found = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}, line {error.lineno} is not JSON ({error.msg}, column {error.colno}); fetch "
            f"or write the file again"
        ) from error
    if not isinstance(found, dict) or not found:
        what = "empty" if isinstance(found, dict) else f"a JSON {type(found).__name__}"
        raise DataError(f"{file} is {what}; expected one JSON object with a key for each id")
    return found


def id_lists(file: File, encoding: str) -> dict[str, list[str | int]]:
    """Parse a file of ids and lists of ids, which are strings or whole numbers."""
    found = read_object(file, encoding)
    for key, ids in found.items():
        if not isinstance(ids, list) or not set(map(type, ids)) <= {int, str}:
            raise DataError(
                f"{file}: {key!r} has {json.dumps(ids)[:60]}, not a list of ids; expected "
                f'{{"1": [5, 2, 7], ...}}'
            )
    return found


def list_events(
    parts: Sequence[tuple[File, int | None]],
    users: Names | None,
    items: Names | None,
    context: Context,
) -> Callable[[], Iterator[pa.RecordBatch]]:
    """Return a function that reads files of users and their items, oldest first, user by user.

    The time of an event is its place in what is read.

    Args:
        parts: files in the order in which they go on with a user's events, each with the split
            (into `SPLITS`) that its events are of; None in all where nothing is said of splits.
        users: raw ids of the users in the files.
        items: raw ids of the items in the files.
        context: options of the reader.
    """
    encoding = context.columns.encoding

    def events() -> Iterator[pa.RecordBatch]:
        found = [(file, split, id_lists(file, encoding)) for file, split in parts]
        everyone = list(dict.fromkeys(user for _, _, lists in found for user in lists))
        total = 0
        for at in range(0, len(everyone), USERS):
            rows = [
                (user, str(item), split, file)
                for user in everyone[at : at + USERS]
                for file, split, lists in found
                for item in lists.get(user, ())
            ]
            if not rows:
                continue
            who, what, splits, files = zip(*rows, strict=True)
            with reading(parts[0][0], encoding):
                yield event_batch(
                    pa.array(users.of(who) if users else who, pa.string()),
                    pa.array(items.of(what) if items else what, pa.string()),
                    pa.array(np.arange(total, total + len(rows), dtype=np.float64)),
                    None,
                    lambda row, who=who, files=files: f"{files[row]}, user {who[row]!r}",  # type: ignore[misc]
                    splits=None if None in splits else pa.array(splits, pa.int8()),
                )
            total += len(rows)

    return events


def object_catalog(file: File, context: Context, names: Names | None = None) -> CatalogReader:
    """Open one JSON object of items and their fields; ``names``: raw ids of the items in it.

    Fields of text make the text, numbers are read when named. So are descriptions where there are
    categories (Amazon); where there are none (LETTER's Yelp), these stand in the description.
    """
    encoding = context.columns.encoding
    texts, numbers = _field_names(_item_fields(file, encoding))
    if {"category", "categories"} & set(texts):
        numbers += tuple(name for name in texts if name in LONG_FIELDS)
        texts = tuple(name for name in texts if name not in LONG_FIELDS)

    def catalog(fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
        found = _item_fields(file, encoding)
        ids = list(found)
        for at in range(0, len(ids), ITEMS):
            some = ids[at : at + ITEMS]
            with reading(file, encoding):
                columns = {
                    name: _texts([found[i].get(name) for i in some], name) for name in fields
                }
                yield catalog_batch(
                    pa.array(names.of(some) if names else some, pa.string()),
                    columns,
                    lambda row, some=some: f"{file}, item {some[row]!r}",  # type: ignore[misc]
                )

    return CatalogReader(catalog, texts, numbers)


def _item_fields(file: File, encoding: str) -> dict[str, dict[str, Any]]:
    found = read_object(file, encoding)
    for item, fields in found.items():
        if not isinstance(fields, dict):
            raise DataError(
                f"{file}: item {item!r} has {json.dumps(fields)[:60]}, not an object of fields; "
                f'expected {{"1": {{"title": "..."}}, ...}}'
            )
    return found


def _field_names(items: dict[str, dict[str, Any]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the fields that have text in some item, and those that have numbers alone."""
    texts: dict[str, None] = {}
    numbers: dict[str, None] = {}
    for fields in items.values():
        for name, value in fields.items():
            if _is_text(value):
                texts[name] = None
            elif isinstance(value, int | float):
                numbers[name] = None
    texts.pop("item_id", None)  # the key again
    return tuple(texts), tuple(name for name in numbers if name not in (*texts, "item_id"))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(map(_is_text, value)))


def _texts(values: Sequence[Any], name: str) -> pl.Series:
    """Turn the values of one field into plain texts; a lone full stop is LC-Rec's empty text."""
    kept = (
        value if _is_text(value) or isinstance(value, int | float) else None for value in values
    )
    texts = [flat(value, separator_of(name)) for value in kept]
    cleaned = clean(pl.Series(name, texts, pl.String), name)
    return cleaned.set(cleaned == ".", "")
