"""MiniOneRec's samples: a CSV of one name in each of the folders train, valid and test.

    {train,valid,test}/NAME.csv    user_id, item_id, item_title and lists as Python prints them:
                                   history_item_id, history_item_title; semantic ids are not read
    info/NAME.txt                  semantic id, title, item id; tabs, no header

The splits are by time over all users, so a user's rows are in one, two or all of the three files.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from l2rec.data.formats.fields import clean
from l2rec.data.formats.files import File, folders, given_splits, open_text, reading, splits_note
from l2rec.data.formats.samples import Block, Samples, sequences
from l2rec.data.formats.source import (
    CatalogReader,
    Context,
    OpenCatalog,
    Reader,
    Source,
    as_source,
    catalog_batch,
)
from l2rec.data.formats.tables import Table, named_table, read_header
from l2rec.errors import DataError

SPLIT_FOLDERS = ("train", "valid", "test")
INFO = "info"
USER, ITEM, TITLE = "user_id", "item_id", "item_title"
PAST, PAST_TITLES = "history_item_id", "history_item_title"


def detect(path: Path, files: dict[str, File], items: File | None, context: Context) -> str | None:
    """Tell by the header of a CSV that is given or in a folder named train, valid or test."""
    inside = [files for name, files in folders(path).items() if name in SPLIT_FOLDERS]
    some = [*files.values(), *(file for folder in inside for file in folder.values())]
    return "minionerec" if any(_is_log(file, context) for file in some) else None


def _is_log(file: File, context: Context) -> bool:
    if not file.ends(".csv"):
        return False
    header: list[str] = []
    with contextlib.suppress(DataError):  # it may well be something else
        header = read_header(file, ",", context.columns.encoding)
    return {USER, ITEM, PAST, PAST_TITLES} <= set(header)


def minionerec(
    path: Path,
    files: dict[str, File],
    items: File | None,
    _kind: str,
    context: Context,
    open_catalog: OpenCatalog,
) -> Source:
    """Open the three splits, and the titles in them and beside them."""
    logs, info = _splits(path, files, context)
    tables = [named_table(file, context) for file in logs]
    for table in tables:
        table.need_all((USER, ITEM, TITLE, PAST, PAST_TITLES), "minionerec")
    context.notes.append(splits_note(logs))

    def events() -> Iterator[pa.RecordBatch]:
        samples = Samples.of(_blocks(tables, context))
        yield from sequences(samples, lambda split, row: tables[split].where(row), context)

    if items is not None:
        catalog = open_catalog(items, context)
    else:
        catalog = CatalogReader(_title_batches(tables, info, context), ("title",))
    return as_source(
        "minionerec", [*logs, *(file for file in (items or info,) if file)], events, catalog
    )


def _splits(
    path: Path, files: dict[str, File], context: Context
) -> tuple[tuple[File, ...], File | None]:
    """Return the train, valid and test file of a log, and the titles that lie beside their folders.

    Raises:
        DataError: one of the three is missing, or there are several logs.
    """
    given = [file for file in files.values() if _is_log(file, context)]
    if flat := given_splits(given, (".csv",)):
        return flat, None
    if given and given[0].member is None:
        path = given[0].path.absolute().parent.parent
    inside = folders(path)
    parts = [inside.get(split, {}) for split in SPLIT_FOLDERS]
    logs = [file for part in parts for file in part.values() if _is_log(file, context)]
    names = list(dict.fromkeys(file.name for file in given or logs))
    whole = [name for name in names if all(name in part for part in parts)]
    if len(whole) == 1:
        titles = whole[0].removesuffix(".csv") + ".txt"
        return tuple(part[whole[0]] for part in parts), inside.get(INFO, {}).get(titles)
    if whole:
        raise DataError(
            f"{path} has the splits of {len(whole)} logs ({', '.join(whole[:5])}), not of one; "
            + (
                f"give the path of a file of one of them, such as {parts[0][whole[0]]}"
                if path.is_dir()
                else "unpack it and give the path of a file of one of them"
            )
        )
    name = names[0] if names else "NAME.csv"
    missing = [split for split, part in zip(SPLIT_FOLDERS, parts, strict=True) if name not in part]
    raise DataError(
        f"{path} has samples, not events: each row is an item with the history before it; a log is "
        f"put together from train/{name}, valid/{name} and test/{name}, but there is no "
        f"{' and no '.join(f'{split}/{name}' for split in missing)}; add what is missing, or "
        f"prepare the log that the samples were made from (one event in each row)"
    )


def _blocks(tables: Sequence[Table], context: Context) -> Iterator[Block]:
    for split, table in enumerate(tables):
        first = 0
        for batch in table.batches([USER, ITEM, PAST], context.block_bytes):
            lists = _lists(table, batch[PAST], first)
            yield Block(split, batch[USER], batch[ITEM], pa.array(lists, pa.list_(pa.string())))
            first += batch.num_rows


def _lists(table: Table, cells: pa.Array, first: int) -> list[list[str]]:
    """Read lists of ids or texts as Python prints them. ``first``: row of the first in the file."""
    lists = []
    for row, cell in enumerate(cells.to_pylist(), first):
        value: Any = None
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(cell)
        if not isinstance(value, list):
            raise DataError(
                f"{table.where(row)}: {cell[:60]!r} is not a list as Python prints it, such as "
                f"[3, 5]; repair or remove that row"
            )
        lists.append([str(part) for part in value])
    return lists


def _title_batches(
    tables: Sequence[Table], info: File | None, context: Context
) -> Callable[[Sequence[str]], Iterator[pa.RecordBatch]]:
    def catalog(fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
        titles = _titles(tables, info, context)
        column = clean(pl.Series(list(titles.values()), dtype=pl.String), "title")
        columns = {"title": column} if "title" in fields else {}
        yield catalog_batch(
            pa.array(list(titles), pa.string()), columns, lambda _: str(info or tables[0].file)
        )

    return catalog


def _titles(tables: Sequence[Table], info: File | None, context: Context) -> dict[str, str]:
    """Return titles by item: those of the info file, then of the rows, then of the histories."""
    titles = dict(_info_lines(info, context)) if info else {}
    for table in tables:
        for batch in table.batches([ITEM, TITLE], context.block_bytes):
            for item, title in zip(*(batch[n].to_pylist() for n in (ITEM, TITLE)), strict=True):
                titles.setdefault(item, title)
    for table in tables:
        first = 0
        for batch in table.batches([PAST, PAST_TITLES], context.block_bytes):
            for at, past in enumerate(_lists(table, batch[PAST], first)):
                if not all(item in titles for item in past):
                    named = _lists(table, batch[PAST_TITLES][at : at + 1], first + at)[0]
                    named = named if len(named) == len(past) else [""] * len(past)
                    for item, title in zip(past, named, strict=True):
                        titles.setdefault(item, title)
            first += batch.num_rows
    return titles


def _info_lines(file: File, context: Context) -> Iterator[tuple[str, str]]:
    """Yield items and titles, of lines SEMANTIC ID, TITLE, ITEM; a title may have tabs."""
    encoding = context.columns.encoding
    with reading(file, encoding), open_text(file, encoding) as stream:
        for number, line in enumerate(stream, 1):
            _, _, rest = line.decode().rstrip("\r\n").partition("\t")
            title, tab, item = rest.rpartition("\t")
            if tab and item:
                yield item, title
            elif line.strip():
                raise DataError(
                    f"{file}, line {number} is not a semantic id, a title and an item id with tabs "
                    f"between; repair or remove that line"
                )


READER = Reader(
    {"minionerec": "train/, valid/, test/ with a CSV of history_item_id each (MiniOneRec)"},
    detect,
    minionerec,
)
