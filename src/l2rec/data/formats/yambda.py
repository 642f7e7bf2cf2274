"""Yambda: what users of a music service listened to, liked and disliked, as Parquet.

    flat/50m/          listens, likes, dislikes, unlikes, undislikes: one event in each row
                       multi_event: the union of the others, with the type of each event
    sequential/50m/    the same, one user in each row, with lists

Times are seconds from a start that is not said. No texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import polars as pl
import pyarrow as pa

from l2rec.data.formats.files import File, folders, reading
from l2rec.data.formats.parquet import is_list, parquet_file
from l2rec.data.formats.source import (
    Context,
    OpenCatalog,
    Reader,
    Source,
    as_arrow,
    as_source,
    event_batch,
)
from l2rec.errors import DataError

UNION = "multi_event"
TYPES = {
    "listens": "listen",
    "likes": "like",
    "dislikes": "dislike",
    "unlikes": "unlike",
    "undislikes": "undislike",
}
USER, ITEM, TIME, TYPE = "uid", "item_id", "timestamp", "event_type"
MARK = "is_organic"
"""A column that tells these files from other tables of users, items and times."""
USERS_AT_A_TIME = 256
"""Rows of the sequential form that are read at a time; users have thousands of events."""


def _stem(file: File) -> str:
    return file.name.lower().split(".")[0]


def _is_yambda(file: File) -> bool:
    if not file.ends(".parquet"):
        return False
    try:
        return {USER, ITEM, TIME, MARK} <= set(parquet_file(file).schema_arrow.names)
    except DataError:
        return False


def _logs_in(path: Path, levels: int = 2) -> list[str]:
    """Return the folders with logs inside a folder, such as flat/50m."""
    known = {*TYPES, UNION}
    found = []
    for name, files in folders(path).items() if path.is_dir() and levels else ():
        if known & {_stem(f) for f in files.values() if f.ends(".parquet")}:
            found.append(name)
        found += [f"{name}/{inner}" for inner in _logs_in(path / name, levels - 1)]
    return found


def detect(path: Path, files: dict[str, File], items: File | None, context: Context) -> str | None:
    """Tell by the columns of a file, or by the names of files in subfolders."""
    if any(_is_yambda(file) for file in files.values() if file != items):
        return "yambda"
    # Its root has tables of embeddings, albums and artists beside the folders.
    tables = [file for file in files.values() if file.ends(".parquet") and file != items]
    return "yambda" if all(map(_is_of_items, tables)) and _logs_in(path) else None


def _is_of_items(file: File) -> bool:
    """Tell whether a table says something of items and of no user, so that it is no log."""
    names = set(parquet_file(file).schema_arrow.names)
    return ITEM in names and USER not in names and TIME not in names


def yambda(
    path: Path,
    files: dict[str, File],
    items: File | None,
    kind: str,
    context: Context,
    open_catalog: OpenCatalog,
) -> Source:
    """Open one file or a folder: the union of all events if it is there, or else all others."""
    logs = [f for f in files.values() if f != items and _is_yambda(f)]
    if not logs:
        inside = _logs_in(path)
        raise DataError(
            f"{path} has {', '.join(inside) or 'no log'}; give the folder of one size and form, "
            f"such as flat/50m, or one of its files (with {USER}, {ITEM}, {TIME} and {MARK})"
        )
    union = [f for f in logs if _stem(f) == UNION]
    used = union or logs
    forms = {is_list(parquet_file(f).schema_arrow.field(ITEM).type) for f in used}
    if len(forms) > 1:
        raise DataError(
            f"{path} has files of the flat and of the sequential form, which hold the same events; "
            f"give those of one form"
        )
    tables = (f for f in files.values() if f.ends(".parquet") and f != items)
    left_out = [f.name for f in tables if f not in used]
    if union and len(logs) > 1:
        context.notes.append(
            f"{union[0].name} has all events; the files of some of them were not read: "
            f"{', '.join(f.name for f in logs if f not in used)}"
        )
    elif left_out:
        context.notes.append(f"not read, as they are no events: {', '.join(left_out)}")
    context.notes.append(
        "times are seconds from a start that Yambda does not say, so --before takes a number of "
        "them; listens count however short they were (Yambda's authors count those of 50% and "
        "more), and --only listen leaves out likes, dislikes and their withdrawals"
    )
    catalog = open_catalog(items, context) if items else None
    events = _events(used, forms.pop(), context)
    return as_source(kind, [*used, *([items] if items else [])], events, catalog)


def _events(
    files: Sequence[File], sequential: bool, context: Context
) -> Callable[[], Iterator[pa.RecordBatch]]:
    rows = USERS_AT_A_TIME if sequential else max(1, context.block_bytes // 32)
    typed = {f: TYPE in parquet_file(f).schema_arrow.names for f in files}
    has_types = all(typed[f] or _stem(f) in TYPES for f in files)

    def events() -> Iterator[pa.RecordBatch]:
        for file in files:
            names = [USER, ITEM, TIME, *([TYPE] if typed[file] else [])]
            first = 0
            with reading(file):
                for batch in parquet_file(file).iter_batches(batch_size=rows, columns=names):
                    where = _where(file, first)
                    frame = cast(pl.DataFrame, pl.from_arrow(batch)).with_row_index("row")
                    first += batch.num_rows
                    if sequential:
                        frame = _one_by_one(file, frame, first - batch.num_rows)
                    if has_types and not typed[file]:
                        frame = frame.with_columns(pl.lit(TYPES[_stem(file)]).alias(TYPE))
                    yield event_batch(
                        as_arrow(frame[USER]),
                        as_arrow(frame[ITEM]),
                        as_arrow(frame[TIME]),
                        as_arrow(frame[TYPE].cast(pl.String)) if has_types else None,
                        lambda row, where=where, frame=frame: where(frame["row"][row]),  # type: ignore[misc]
                    )

    return events


def _where(file: File, first: int) -> Callable[[int], str]:
    return lambda row: f"{file}, row {first + row + 1}"


def _one_by_one(file: File, users: pl.DataFrame, first: int) -> pl.DataFrame:
    """Turn a row of lists for each user into a row for each event."""
    lists = [name for name in users.columns if name not in ("row", USER)]
    sizes = users.select(pl.col(name).list.len().fill_null(0) for name in lists)
    for name in lists[1:]:
        wrong = sizes[name] != sizes[ITEM]
        if wrong.any():
            at = int(wrong.arg_max() or 0)
            raise DataError(
                f"{file}, row {first + at + 1}: {sizes[ITEM][at]} values of {ITEM}, but "
                f"{sizes[name][at]} of {name}; fetch the file again"
            )
    return users.filter(sizes[ITEM] > 0).explode(lists)


READER = Reader(
    {"yambda": "Parquet with uid, item_id, timestamp, is_organic, flat or sequential (Yambda)"},
    detect,
    yambda,
)
