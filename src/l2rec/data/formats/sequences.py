"""Sequence text: a user and their items in each line, or one event in each line; no times.

    sequences    USER ITEM ITEM ITEM ...    one line per user, oldest item first
    pairs        USER ITEM                  one line per event, in the order that they happened

Words are separated by blanks or tabs, and there is no header. The time of an event is its place in
the file, as in a table that is read with ``--timestamp none``. In memory are a block of the file
and the ids of the users. What may lie beside a log of sequences: see `s3rec.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from l2rec.data.formats.files import (
    File,
    beside,
    catalog_beside,
    is_folder,
    line_blocks,
    only_file,
    open_text,
    reading,
    split_note,
)
from l2rec.data.formats.objects import kind as object_kind
from l2rec.data.formats.s3rec import ATTRIBUTES, MAPS, DataMaps, attribute_catalog, data_maps
from l2rec.data.formats.source import (
    CatalogReader,
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
RAW_LOG = "user_sequence.txt"
"""Name of OpenP5's log, which has raw ids, among files of the same shape."""
LOGS = (RAW_LOG, "sequential_data.txt")
"""Names of the log in OpenP5 and P5, whatever its ids look like."""
NEGATIVES = ("_sample.txt", "negative_samples.txt")
"""Ends of names of items drawn for each user to rank with (S3-Rec, P5), which are no events."""
METADATA = "meta.json"
"""Amazon's metadata of 2014 in P5's folders, by raw id."""
TABLES = (".csv", ".tsv")
_WORD = r"[^ \t\r]+"
_NO_ID = re.compile(r'[,;|:"]|[.!?]$')
"""Characters of prose and of tables with other separators, which no id here is taken to have."""
_DIGIT = re.compile(r"\d")


def shape(file: File, encoding: str, *, attributed: bool = False) -> str | None:
    """Tell whether the first lines of a .txt file are sequences or pairs; None if neither.

    ``attributed``: attributes of the items lie beside it, so lines of one length are no table.
    """
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
    if min(sizes) > 2 and (len(sizes) > 1 or attributed) and len(users) == len(rows):
        return "sequences"
    return None


def detect(path: Path, files: dict[str, File], items: File | None, context: Context) -> str | None:
    """Tell by the first .txt file that has a shape or a known name, if no other can be the log.

    Others can be if they are no catalog, no attributes or maps, and no other JSON objects.
    """
    encoding = context.columns.encoding
    catalogs = (items, catalog_beside(files, TABLES), _metadata(files))
    others = [f for f in files.values() if f not in catalogs and not f.ends(ATTRIBUTES, MAPS)]
    if any(f.ends(".parquet", ".jsonl", *TABLES) for f in others):
        return None
    if not all(object_kind(f, encoding) for f in others if f.ends(".json")):
        return None
    texts = _texts(files, items)
    if any(name in texts for name in LOGS):
        return "sequences"
    near = beside(path, files)
    return next((told for f in texts.values() if (told := _shape(f, near, encoding))), None)


def _shape(file: File, near: dict[str, File], encoding: str) -> str | None:
    """Tell the shape of a file by its lines and by what lies beside it."""
    return shape(file, encoding, attributed=_attributes_of(file) in near)


def _texts(files: dict[str, File], items: File | None) -> dict[str, File]:
    """Return the .txt files that may be the log; a lone one may, whatever its name."""
    texts = {name: f for name, f in files.items() if f.ends(".txt") and f != items}
    logs = {name: f for name, f in texts.items() if not f.ends(*NEGATIVES)}
    return logs or texts


def _metadata(files: dict[str, File]) -> File | None:
    """Return P5's file of texts, whose raw ids are known by its maps."""
    return files.get(METADATA) if MAPS in files else None


def sequences(
    path: Path,
    files: dict[str, File],
    items: File | None,
    kind: str,
    context: Context,
    open_catalog: OpenCatalog,
) -> Source:
    """Open a log of either shape, by its name, and the catalog that is given or lies beside it."""
    encoding = context.columns.encoding
    _check_random_split(path, files, encoding)
    file = _log(path, files, items, kind, encoding)
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
    context.notes.extend([*split_note(file), *_negatives_note(file, files)])
    near = _kin(path, files, file)
    map_file = near.get(MAPS) if file.name != RAW_LOG else None
    maps = data_maps(map_file, encoding) if map_file else None
    items = items or _texts_beside(near, file)
    catalog = _catalog(items, maps, context, open_catalog) if items else None
    used = [file, *(f for f in (map_file, items) if f)]
    return as_source(kind, used, line_events(file, kind, context, maps), catalog)


def line_events(
    file: File, kind: str, context: Context, maps: DataMaps | None = None
) -> Callable[[], Iterator[pa.RecordBatch]]:
    """Return a reader of the events of a file of either shape; ``maps``: raw ids behind them."""
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
                users, things = as_arrow(rows["user"]), as_arrow(rows["items"])
                if maps:
                    users = pa.array(maps.users.of(users.to_pylist()), pa.string())
                    things = pa.array(maps.items.of(things.to_pylist()), pa.string())
                yield event_batch(
                    users,
                    things,
                    times,
                    None,
                    lambda row, rows=rows: f"{file}, line {rows['line'][row]}",  # type: ignore[misc]
                )

    return events


def _log(path: Path, files: dict[str, File], items: File | None, kind: str, encoding: str) -> File:
    """Return the file of events: the one given, or the one of a folder that has the shape."""
    if not is_folder(path):
        return File(path)
    texts = _texts(files, items)
    named = [texts[name] for name in LOGS if name in texts and kind == "sequences"]
    if len(named) == 1:
        return named[0]
    told = {name: f for name, f in texts.items() if _shape(f, files, encoding) == kind} or texts
    return only_file(path, told, (".txt",), ".txt")


def _negatives_note(file: File, files: dict[str, File]) -> list[str]:
    """Name the files that are left out for their names."""
    left = [name for name, f in files.items() if f.ends(*NEGATIVES) and f != file]
    return [f"not read, as their names are those of drawn items: {', '.join(left)}"] if left else []


def _kin(path: Path, files: dict[str, File], file: File) -> dict[str, File]:
    """Return the files that belong to a log: its folder's, or those that its name tells."""
    if is_folder(path):
        return files
    near = beside(path, files)
    if file.name in LOGS:
        return near
    return {name: f for name, f in near.items() if name == _attributes_of(file)}


def _attributes_of(file: File) -> str:
    """Return the name that S3-Rec gives the attributes of a log's items."""
    return f"{file.name.removesuffix('.txt')}_{ATTRIBUTES}"


def _texts_beside(near: dict[str, File], file: File) -> File | None:
    """Return the best texts among the files of a log: a table, metadata, else attributes."""
    attributes = near.get(_attributes_of(file)) or near.get(ATTRIBUTES)
    return catalog_beside(near, TABLES) or _metadata(near) or attributes


def _catalog(
    items: File, maps: DataMaps | None, context: Context, open_catalog: OpenCatalog
) -> CatalogReader:
    if items.ends(ATTRIBUTES):
        return attribute_catalog(items, context, maps)
    return open_catalog(items, context)


def _check_random_split(path: Path, files: dict[str, File], encoding: str) -> None:
    """Refuse LightGCN's train.txt and test.txt: the same users, split without regard to order.

    A test line of one item each is taken for a last item instead.
    """
    near = beside(path, files)
    train, test = near.get("train.txt"), near.get("test.txt")
    if not train or not test or not {train.name, test.name} & set(files):
        return
    sizes, tested = (_sizes(f, encoding) for f in (train, test))
    if tested and tested.keys() <= sizes.keys() and max(tested.values()) > 1:
        raise DataError(
            f"{train} and {test.name} have items of the same users, as LightGCN's have: split at "
            f"random and in no order, so that a sequence would be learned from what came after the "
            f"test; prepare the log with times that they were made from (or, if {test.name} goes "
            f"on where {train.name} ends, one file with the items of both in a line per user)"
        )


def _sizes(file: File, encoding: str) -> dict[bytes, int]:
    """Return the number of items in the line of each user."""
    with reading(file, encoding), open_text(file, encoding) as stream:
        return {words[0]: len(words) - 1 for line in stream if (words := line.split())}


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
