"""Sequence text: a user and their items in each line, or one event in each line; no times.

    sequences    USER ITEM ITEM ITEM ...    one line per user, oldest item first
    pairs        USER ITEM                  one line per event, in the order that they happened

Words are separated by blanks or tabs, and there is no header. The time of an event is its place in
the file, as in a table that is read with ``--timestamp none``. In memory are a block of the file
and the ids of the users.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from l2rec.data.formats.files import File, line_blocks, only_file, open_text, reading, split_note
from l2rec.data.formats.objects import one_value
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

HEAD_BYTES = 1 << 20
LOG = "user_sequence.txt"
"""Name of the log among files of the same shape (OpenP5)."""
_WORD = r"[^ \t\r]+"
_NO_ID = re.compile(r'[,;|:"]|[.!?]$')
"""Characters of prose and of tables with other separators, which no id here is taken to have."""
_DIGIT = re.compile(r"\d")


def shape(file: File, encoding: str) -> str | None:
    """Tell whether the first lines of a .txt file are sequences or pairs; None if neither."""
    rows = _head(file, encoding) if file.ends(".txt") else []
    if len(rows) < 2 or _has_header(rows):
        return None
    if any(_NO_ID.search(word) for row in rows for word in row):
        return None
    sizes = {len(row) for row in rows}
    users = [user for user, _ in groupby(row[0] for row in rows)]
    if len(set(users)) < len(users):  # events of a user are apart
        return None
    if sizes == {2} and len(users) < len(rows):
        return "pairs"
    if min(sizes) > 2 and len(sizes) > 1 and len(users) == len(rows):
        return "sequences"
    return None


def detect(path: Path, files: dict[str, File], items: File | None, context: Context) -> str | None:
    """Tell by the first .txt file that has a shape, where no other file can be the log.

    JSON objects beside it are S3-Rec's attributes of items, or P5's maps of ids.
    """
    encoding = context.columns.encoding
    others = [f for f in files.values() if f.ends(".json", ".jsonl", ".parquet", ".csv", ".tsv")]
    if not all(f.ends(".json") and one_value(f, encoding) for f in others):
        return None
    return next((s for f in files.values() if f != items and (s := shape(f, encoding))), None)


def sequences(
    path: Path,
    files: dict[str, File],
    items: File | None,
    kind: str,
    context: Context,
    open_catalog: OpenCatalog,
) -> Source:
    """Open a log of either shape, by its name, and the catalog that is given."""
    encoding = context.columns.encoding
    if path.is_file() and path.suffix.lower() != ".zip":
        file = File(path)
    else:
        texts = {name: f for name, f in files.items() if f.ends(".txt") and f != items}
        told = {name: f for name, f in texts.items() if shape(f, encoding) == kind} or texts
        file = told.get(LOG) or only_file(path, told, (".txt",), ".txt")
    rows = _head(file, encoding)
    if not rows:
        raise DataError(
            f"{file} is empty; expected a line for each "
            + ("user: USER ITEM ITEM ..." if kind == "sequences" else "event: USER ITEM")
        )
    if _has_header(rows):
        raise DataError(
            f"{file}, line 1 looks like a header ({' '.join(rows[0])[:60]}), which {kind} do not "
            f"have; remove that line"
        )
    context.notes.extend(split_note(file))

    catalog = open_catalog(items, context) if items else None
    events = line_events(file, kind, context)
    return as_source(kind, [file, *([items] if items else [])], events, catalog)


def line_events(file: File, kind: str, context: Context) -> Callable[[], Iterator[pa.RecordBatch]]:
    """Return a reader of the events of a file of either shape."""
    encoding = context.columns.encoding

    def events() -> Iterator[pa.RecordBatch]:
        seen, total = pl.Series("user", [], pl.String), 0
        with reading(file, encoding):
            for block, first in line_blocks(file, context.block_bytes, encoding):
                lines = _words(file, block, first)
                if not len(lines):
                    continue
                _check(file, kind, lines)
                if kind == "sequences":
                    seen = seen.append(lines["user"])
                    _check_once(file, lines, seen)
                rows = lines.explode("items")
                times = pa.array(np.arange(total, total + len(rows), dtype=np.float64))
                total += len(rows)
                yield event_batch(
                    as_arrow(rows["user"]),
                    as_arrow(rows["items"]),
                    times,
                    None,
                    lambda row, rows=rows: f"{file}, line {rows['line'][row]}",  # type: ignore[misc]
                )

    return events


def _head(file: File, encoding: str) -> list[list[str]]:
    """Return the words of the first lines that have any."""
    with reading(file, encoding), open_text(file, encoding) as stream:
        head = stream.read(HEAD_BYTES)
    if len(head) == HEAD_BYTES:
        head = head[: head.rfind(b"\n") + 1] or head
    lines = head.decode(errors="replace").split("\n")
    return [words for words in (re.findall(_WORD, line) for line in lines) if words]


def _has_header(rows: Sequence[Sequence[str]]) -> bool:
    """Tell whether the first line is of names and the second of numbers or of ids with numbers."""
    return (
        len(rows) > 1
        and not any(_DIGIT.search(word) for word in rows[0])
        and all(_DIGIT.search(word) for word in rows[1])
    )


def _words(file: File, block: bytes, first: int) -> pl.DataFrame:
    """Split whole lines into a user, a list of items and the number of the line."""
    text = block.decode()
    if "\0" in text:
        line = first + text[: text.index("\0")].count("\n")
        raise DataError(
            f"{file}, line {line} has NUL characters, as text in UTF-16 has; pass its encoding, "
            f"for example --encoding utf-16-le, or give a file of plain text"
        )
    words = pl.col("text").str.extract_all(_WORD)
    return (
        pl.DataFrame({"text": text.split("\n")})
        .with_row_index("line", offset=first)
        .select("line", user=words.list.first(), items=words.list.slice(1))
        .drop_nulls("user")
    )


def _check(file: File, kind: str, lines: pl.DataFrame) -> None:
    """Raise DataError for the first line that has too few or too many words."""
    sizes = lines["items"].list.len()
    wrong = sizes == 0 if kind == "sequences" else sizes != 1
    if not wrong.any():
        return
    line, user, items = lines.row(int(wrong.arg_max() or 0))
    if not items:
        raise DataError(
            f"{file}, line {line} has a user ({user}) and no item; add the items or remove the line"
        )
    raise DataError(
        f"{file}, line {line} has {len(items) + 1} words, not a user and an item; pass --format "
        f"sequences if it is a user and all their items, or write a CSV with a header if an event "
        f"has more columns"
    )


def _check_once(file: File, lines: pl.DataFrame, seen: pl.Series) -> None:
    """Raise DataError for a user with a second line. ``seen``: users up to the end of ``lines``."""
    again = ~seen.is_first_distinct().tail(len(lines))
    if again.any():
        line, user, _ = lines.row(int(again.arg_max() or 0))
        raise DataError(
            f"{file}, line {line}: user {user} has a line already; write all items of a user in "
            f"one line, oldest first, or pass --format pairs if each line is one event"
        )


READER = Reader(
    {
        "sequences": ".txt, USER ITEM ITEM ... in a line, oldest first (S3-Rec, P5, OpenP5, TIGER)",
        "pairs": ".txt, USER ITEM in a line for each event, in order (SASRec, BERT4Rec)",
    },
    detect,
    sequences,
)
