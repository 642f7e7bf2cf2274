"""Three .inter files of samples, the splits of one log, as UniSRec and its kin write them.

    NAME.train.inter, NAME.valid.inter, NAME.test.inter    user, history (blanks), item; tabs
    NAME.user2index or .user2id, NAME.item2index or .item2id    raw id, id in .inter; no header
    NAME.text                                              raw id, text; a line may lack its tab
    NAME.data_maps                                         ids and texts as one JSON object

The files of UniSRec, VQ-Rec and LC-Rec leave each user's last two events out and have the rows of a
user newest first; those of AmazonReviews2023 and MiniOneRec are split by time and have them oldest
first. `samples` tells which from the rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import polars as pl
import pyarrow as pa

from l2rec.data.formats.fields import clean
from l2rec.data.formats.files import (
    File,
    beside,
    is_folder,
    line_blocks,
    line_in_block,
    only_file,
    open_text,
    other_splits,
    reading,
    split_logs,
    split_of,
    splits_note,
    stem,
)
from l2rec.data.formats.ignored import SAMPLE_ROWS, check_ignored
from l2rec.data.formats.names import tab_names
from l2rec.data.formats.objects import object_catalog
from l2rec.data.formats.recbole import atomic_catalog, atomic_table
from l2rec.data.formats.samples import Block, Samples, sequences
from l2rec.data.formats.source import (
    CatalogReader,
    Context,
    OpenCatalog,
    Reader,
    Source,
    as_arrow,
    as_source,
    catalog_batch,
)
from l2rec.data.formats.tables import Table, read_header
from l2rec.errors import DataError

SUFFIX = ".inter"
_PADDING = "[PAD]"


def detect(path: Path, files: dict[str, File], items: File | None, context: Context) -> str | None:
    """Tell by a split that has the list of an item before the item."""
    logs = [file for file in files.values() if file.ends(SUFFIX) and split_of(file)]
    return "unisrec" if any(_has_histories(file, context) for file in logs) else None


def _has_histories(file: File, context: Context) -> bool:
    header = read_header(file, "\t", context.columns.encoding, quotes=False)
    return f"{context.columns.item}_list:token_seq" in header


def unisrec(
    path: Path,
    files: dict[str, File],
    items: File | None,
    _kind: str,
    context: Context,
    open_catalog: OpenCatalog,
) -> Source:
    """Open the three splits, with the ids and texts that lie beside them."""
    logs, files = _splits(path, files)
    columns = context.columns
    past = f"{columns.item}_list"
    tables = [atomic_table(file, context)[0] for file in logs]
    for table in tables:
        table.need(columns.user, "user")
        table.need(columns.item, "item")
        table.need(past, "item")
        used = (columns.user, past, columns.item)
        read = (columns.user, columns.item, past)
        check_ignored(table.file, read, table.sample(SAMPLE_ROWS), (), context.notes)
    name = stem(logs[0])
    raw_users = files.get(f"{name}.user2index") or files.get(f"{name}.user2id")
    raw_items = files.get(f"{name}.item2index") or files.get(f"{name}.item2id")
    encoding = context.columns.encoding
    users, names = (tab_names(f, encoding) if f else None for f in (raw_users, raw_items))
    context.notes.append(splits_note(logs))
    vectors = [n for n in files if n.startswith(f"{name}.") and ".feat" in n]
    if vectors:
        context.notes.append(f"vectors of the items' texts are not read: {', '.join(vectors)}")

    def events() -> Iterator[pa.RecordBatch]:
        samples = Samples.of(_blocks(tables, used, context))
        if users:
            samples = replace(samples, user_ids=pa.array(users.of(samples.user_ids.to_pylist())))
        if names:
            samples = replace(samples, item_ids=pa.array(names.of(samples.item_ids.to_pylist())))
        yield from sequences(samples, lambda split, row: tables[split].where(row), context)

    catalog: CatalogReader | None = None
    catalogs = [files.get(name + end) for end in (".text", ".data_maps", ".item", ".item.json")]
    items = items or next((file for file in catalogs if file), None)
    if items is not None and items.ends(".data_maps"):
        catalog = _maps_catalog(items, context)
    elif items is not None and items.ends(".item.json"):
        catalog = object_catalog(items, context, names)
    elif items is not None:
        catalog = open_catalog(items, context)
    used_files = [*logs, *(file for file in (raw_users, raw_items, items) if file)]
    return as_source("unisrec", used_files, events, catalog)


def _splits(path: Path, files: dict[str, File]) -> tuple[tuple[File, ...], dict[str, File]]:
    """Return the train, valid and test file of the log, and all files that lie beside them.

    Raises:
        DataError: one of the three is missing, or there are several logs.
    """
    given = None if is_folder(path) else File(path)
    files = beside(path, files)
    logs = [file for file in files.values() if file.ends(SUFFIX)]
    found = split_logs(logs)
    if given is not None:
        found = [log for log in found if given.name in [file.name for file in log]]
    if len(found) == 1:
        return found[0], files
    if found:
        raise DataError(
            f"{path} has the splits of {len(found)} logs "
            f"({', '.join(stem(log[0]) for log in found[:5])}), not of one; "
            + (
                f"give the path of a file of one of them, such as {found[0][0]}"
                if path.is_dir()
                else "unpack it and give the path of a file of one of them"
            )
        )
    file = (
        given
        or next((f for f in logs if split_of(f)), None)
        or only_file(path, files, (SUFFIX,), SUFFIX)
    )
    missing = [name for name in other_splits(file) if name not in files]
    lack = (
        f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not beside it; add "
        f"{'it' if len(missing) == 1 else 'them'}"
        if missing
        else "the names of the files do not tell one train, one valid and one test file; name them "
        "NAME.train.inter, NAME.valid.inter and NAME.test.inter"
    )
    raise DataError(
        f"{file} has samples, not events: each row is an item with the history before it; a log is "
        f"put together from its three splits, but {lack}, or prepare the log that the samples were "
        f"made from (one event in each row)"
    )


def _blocks(tables: Sequence[Table], names: Sequence[str], context: Context) -> Iterator[Block]:
    """Read samples; ``names``: columns of the user, the history and the item."""
    user, past, item = names
    for split, table in enumerate(tables):
        for batch in table.batches(list(names), context.block_bytes):
            words = cast(pl.Series, pl.from_arrow(batch[past])).str.extract_all("[^ ]+")
            yield Block(split, batch[user], batch[item], as_arrow(words))


def text_catalog(file: File, context: Context) -> CatalogReader:
    """Open a .text file: an id and a text in each line, or an id alone where it has no text."""
    encoding = context.columns.encoding
    header = [cell.rpartition(":")[0] for cell in read_header(file, "\t", encoding, quotes=False)]
    if len(header) != 2:
        return atomic_catalog(file, context)
    name = header[1]

    def catalog(fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with reading(file, encoding):
            for block, first in line_blocks(file, context.block_bytes, encoding):
                lines = pl.Series(block.decode().split("\n")).str.strip_chars_end("\r")
                lines = lines.slice(1 if first == 1 else 0)
                rows = lines.filter(lines != "").str.splitn("\t", 2).struct.unnest()
                texts = {name: clean(rows["field_1"], name)} if name in fields else {}
                where = line_in_block(file, block, first)
                skipped = int(first == 1)
                yield catalog_batch(
                    rows["field_0"],
                    texts,
                    lambda row, where=where, skipped=skipped: where(row + skipped),  # type: ignore[misc]
                )

    return CatalogReader(catalog, (name,))


def _maps_catalog(file: File, context: Context) -> CatalogReader:
    """Open the ids and texts of AmazonReviews2023, one JSON object: item2id and id2meta."""
    encoding = context.columns.encoding

    def catalog(fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with reading(file, encoding), open_text(file, encoding) as stream:
            try:
                maps = json.load(stream)
                ids = {item: str(at) for item, at in maps["item2id"].items() if item != _PADDING}
                texts = [maps["id2meta"].get(at, "") for at in ids.values()]
            except (ValueError, KeyError, AttributeError) as error:
                raise DataError(
                    f"{file} is not one JSON object with item2id and id2meta ({error!r}); fetch it "
                    f"again, or give the texts by --items"
                ) from error
        column = clean(pl.Series(texts, dtype=pl.String), "text")
        columns = {"text": column} if "text" in fields else {}
        yield catalog_batch(pa.array(list(ids), pa.string()), columns, lambda _: str(file))

    return CatalogReader(catalog, ("text",))


READER = Reader(
    {"unisrec": "NAME.train, .valid, .test.inter with item_id_list (UniSRec, VQ-Rec, LC-Rec)"},
    detect,
    unisrec,
)
