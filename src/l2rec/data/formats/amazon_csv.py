"""The benchmark files of Amazon Reviews 2023: CSV with times in milliseconds, whole or in splits.

    rating_only/NAME.csv                  user_id, parent_asin, rating, timestamp
    last_out/NAME.train|valid|test.csv    the same columns; likewise in timestamp/
    last_out_w_his/, timestamp_w_his/     with the column history: the items before the row's item
    meta_NAME.jsonl                       the metadata, beside them or given; all plain or gzipped

Every event is the item of one row of the three splits, so histories tell nothing more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from l2rec.data.formats.dates import in_milliseconds
from l2rec.data.formats.files import (
    File,
    given_splits,
    is_folder,
    listing,
    only_file,
    other_splits,
    split_note,
    splits_note,
    stem,
)
from l2rec.data.formats.ignored import SAMPLE_ROWS, check_ignored
from l2rec.data.formats.source import (
    Context,
    OpenCatalog,
    Reader,
    Source,
    as_source,
    event_batch,
)
from l2rec.data.formats.tables import Table, named_table, read_header, split_column, split_tables
from l2rec.errors import DataError

USER, ITEM, TIME, PAST = "user_id", "parent_asin", "timestamp", "history"
COLUMNS = [USER, ITEM, "rating", TIME]
MILLISECONDS = 1000


def detect(path: Path, files: dict[str, File], items: File | None, context: Context) -> str | None:
    """Tell by the header and times of all CSV files, where no reviews are beside them."""
    columns = context.columns
    named = (columns.user, columns.timestamp) == (USER, TIME) and columns.item in ("item_id", ITEM)
    logs = [file for file in files.values() if file.ends(".csv") and file != items]
    others = [file for file in files.values() if file.ends(".json", ".jsonl")]
    reviews = [file for file in others if not file.name.startswith("meta_") and file != items]
    if not named or reviews or not logs:
        return None
    return "amazon-2023-csv" if all(_is_log(file, context) for file in logs) else None


def _is_log(file: File, context: Context) -> bool:
    with contextlib.suppress(DataError):  # it may well be something else
        header = read_header(file, ",", context.columns.encoding)
        if header in (COLUMNS, [*COLUMNS, PAST]):
            times = named_table(file, context).sample(1)[TIME]
            return all(map(in_milliseconds, times))
    return False


def amazon_csv(
    path: Path,
    files: dict[str, File],
    items: File | None,
    _kind: str,
    context: Context,
    open_catalog: OpenCatalog,
) -> Source:
    """Open a log, or its three splits, and the metadata that is given or lies beside it."""
    logs = {name: file for name, file in files.items() if file.ends(".csv") and file != items}
    splits = given_splits(logs.values(), (".csv",))
    if splits:
        tables = split_tables([named_table(file, context) for file in splits])
        context.notes.append(splits_note(splits))
    else:
        file = only_file(path, logs, (".csv",), ".csv") if is_folder(path) else File(path)
        tables = [named_table(file, context)]
        context.notes.extend(split_note(file))
        sample = tables[0].sample(SAMPLE_ROWS)
        check_ignored(file, [USER, ITEM, TIME], sample, (), context.notes, _instead(file))
    for table in tables:
        table.need_all((USER, ITEM, TIME), "amazon-2023-csv")
    used = [table.file for table in tables]
    items = items or _metadata(used[0], files)
    catalog = open_catalog(items, context) if items else None

    def events() -> Iterator[pa.RecordBatch]:
        return _events(tables, context)

    return as_source("amazon-2023-csv", [*used, *([items] if items else [])], events, catalog)


def _instead(file: File) -> str:
    """Say what to prepare where a file alone is not the log."""
    others = " and ".join(other_splits(file)) or "the other splits"
    return f"a folder with {file.name}, {others} alone, or the log as in rating_only/"


def _metadata(log: File, files: dict[str, File]) -> File | None:
    """Return the metadata beside a log: that of its name, or the only one of a folder or zip."""
    beside = files if log.member is not None else listing(log.path.parent)
    names = [f"meta_{stem(log)}{ending}" for ending in (".jsonl", ".json")]
    named = [beside[name] for name in names if name in beside]
    known = [f for n, f in files.items() if n.startswith("meta_") and f.ends(".json", ".jsonl")]
    return named[0] if named else known[0] if len(known) == 1 else None


def _events(tables: Sequence[Table], context: Context) -> Iterator[pa.RecordBatch]:
    with_past = len(tables) > 1 and PAST in tables[0].names
    names = [USER, ITEM, TIME, *([PAST] if with_past else [])]
    begun = not with_past
    for table in tables:
        first = 0
        for batch in table.batches(names, context.block_bytes):
            begun = begun or bool(pc.any(pc.equal(batch[PAST], "")).as_py())
            yield event_batch(
                batch[USER],
                batch[ITEM],
                batch[TIME],
                None,
                lambda row, table=table, first=first: table.where(first + row),  # type: ignore[misc]
                MILLISECONDS,
                split_column(table.split, batch),
            )
            first += batch.num_rows
    if not begun:
        raise DataError(
            f"{tables[0].file} and the splits beside it have no row with an empty history, so the "
            f"first event of each user is not there as a row; prepare the whole log, as in "
            f"rating_only/, or splits from which no row was removed"
        )


READER = Reader(
    {"amazon-2023-csv": ".csv of user_id, parent_asin, rating, timestamp (ms), or its splits"},
    detect,
    amazon_csv,
)
