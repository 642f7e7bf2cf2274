"""Parquet with named columns."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from l2rec.data.catalog import separator_of
from l2rec.data.formats.columns import Columns
from l2rec.data.formats.dates import Clock
from l2rec.data.formats.fields import joined
from l2rec.data.formats.files import (
    File,
    catalog_beside,
    given_splits,
    reading,
    split_note,
    split_of,
    splits_note,
)
from l2rec.data.formats.ignored import SAMPLE_ROWS, check_ignored
from l2rec.data.formats.source import (
    CatalogReader,
    Context,
    OpenCatalog,
    Reader,
    Source,
    as_source,
    catalog_batch,
    event_batch,
    is_compound,
)
from l2rec.data.formats.tables import file_order, missing_column, split_column
from l2rec.errors import DataError


def parquet_file(file: File) -> pq.ParquetFile:
    """Open a Parquet file; DataError if it is torn or no such file."""
    try:
        return pq.ParquetFile(file.path if file.member is None else io.BytesIO(file.open().read()))
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{file} is not a whole Parquet file ({reason}); fetch it again") from error


def detect(path: Path, files: dict[str, File], items: File | None, context: Context) -> str | None:
    """Tell by the end of a file's name."""
    return "parquet" if any(file.ends(".parquet") for file in files.values()) else None


def parquet(
    path: Path,
    files: dict[str, File],
    items: File | None,
    _kind: str,
    context: Context,
    open_catalog: OpenCatalog,
) -> Source:
    """Open one or several files of events, and the catalog that is given or lies beside them."""
    parts = {n: f for n, f in files.items() if f.ends(".parquet")}
    if items is None:
        items = catalog_beside(parts)
    logs = [f for f in parts.values() if items is None or f != items]
    if not logs:
        raise DataError(f"{path} has no Parquet file with events; give the path of the file")
    splits = given_splits(logs, (".parquet",))
    logs = list(splits or logs)
    columns = context.columns
    event_type = columns.event_type
    schemas = {file: parquet_file(file).schema_arrow for file in logs}
    for file in logs:
        names = schemas[file].names
        if set(names) != set(schemas[logs[0]].names):
            raise DataError(
                f"{path} has {len(logs)} Parquet files with different columns, such as "
                f"{logs[0].name} and {file.name}, so they are not parts of one log; give the path "
                f"of the file"
            )
        for name, option in (
            (columns.user, "user"),
            (columns.item, "item"),
            (columns.timestamp, "timestamp"),
            (columns.event_type, "event_type"),
        ):
            if name is not None and name not in names:
                raise missing_column(file, name, option, names)
    if event_type is None and "event_type" in schemas[logs[0]].names:
        event_type = "event_type"
    used = (columns.user, columns.item, columns.timestamp, event_type)
    names = [name for name in used if name is not None]
    for file, schema in schemas.items():
        lists = [f.name for f in schema if is_list(f.type)]
        check_ignored(file, names, _sample(file, names[:2]), lists, context.notes)
    if splits:
        context.notes.append(splits_note(logs))
    elif len(logs) > 1:
        logs = sorted(logs, key=lambda file: split_of(file) or (-1, ""))  # as they follow in time
        context.notes.append(
            f"{len(logs)} files were read as parts of one log: {', '.join(f.name for f in logs)}"
        )
        if len({told[0] for file in logs if (told := split_of(file))}) > 1:
            context.notes.append(
                "splits that the names of these files tell were not kept; they are where train, "
                "valid and test are one file each"
            )
    else:
        context.notes.extend(split_note(logs[0]))
    events = _parquet_events(logs, columns, event_type, context, given=splits is not None)
    catalog = open_catalog(items, context) if items else None
    return as_source("parquet", [*logs, *([items] if items else [])], events, catalog)


def _parquet_events(
    files: list[File], columns: Columns, event_type: str | None, context: Context, *, given: bool
) -> Callable[[], Iterator[pa.RecordBatch]]:
    """Return a function that reads the files. ``given``: they are the splits of a log, in order."""
    wanted = [columns.user, columns.item, columns.timestamp, event_type]
    names = [name for name in wanted if name is not None]
    rows = max(1, context.block_bytes // 32)  # an event takes about so many bytes

    def events() -> Iterator[pa.RecordBatch]:
        total, clock = 0, Clock()
        for number, file in enumerate(files):
            first = 0
            with reading(file):
                for batch in parquet_file(file).iter_batches(batch_size=rows, columns=names):
                    yield event_batch(
                        batch[columns.user],
                        batch[columns.item],
                        batch[columns.timestamp] if columns.timestamp else file_order(total, batch),
                        batch[event_type] if event_type else None,
                        lambda row, file=file, first=first: f"{file}, row {first + row + 1}",  # type: ignore[misc]
                        splits=split_column(number if given else None, batch),
                        clock=clock,
                    )
                    first += batch.num_rows
                    total += batch.num_rows

    return events


def parquet_catalog(file: File, item: str) -> CatalogReader:
    """Open a catalog: text columns make the text, numbers are read when named."""
    schema = parquet_file(file).schema_arrow
    if item not in schema.names:
        raise missing_column(file, item, "item", schema.names)
    kinds = {f.name: f.type for f in schema if f.name != item}
    texts = tuple(name for name, kind in kinds.items() if _is_text(kind))
    more = tuple(n for n, kind in kinds.items() if n not in texts and not is_compound(kind))

    def catalog(fields: Sequence[str]) -> Iterator[pa.RecordBatch]:
        first = 0
        names = list(dict.fromkeys([item, *fields]))
        with reading(file):
            for batch in parquet_file(file).iter_batches(batch_size=1 << 16, columns=names):
                yield catalog_batch(
                    batch[item],
                    {n: joined(cast(pl.Series, pl.from_arrow(batch[n])), ", ") for n in fields}
                    if any(is_list(kinds[n]) for n in fields if n in kinds)
                    else {n: batch[n] for n in fields},
                    lambda row, first=first: f"{file}, row {first + row + 1}",  # type: ignore[misc]
                )
                first += batch.num_rows

    separators = {name: ", " for name in texts if is_list(kinds[name])} | {
        name: between for name in texts if (between := separator_of(schema.field(name))) is not None
    }
    return CatalogReader(catalog, texts, more, separators)


def _sample(file: File, used: Sequence[str]) -> dict[str, list[Any]]:
    """Return the first values by column, of those of ``used`` and of those of texts and of ids."""
    opened = parquet_file(file)
    fields = [
        f for f in opened.schema_arrow if f.name in used or _is_text(f.type) or _is_ids(f.type)
    ]
    with reading(file):
        batches = opened.iter_batches(SAMPLE_ROWS, columns=[f.name for f in fields])
        batch = next(batches, None)
    return {} if batch is None else batch.to_pydict()


def _is_ids(kind: pa.DataType) -> bool:
    """Tell whether a type is a list of whole numbers."""
    return is_list(kind) and bool(pa.types.is_integer(kind.value_type))


def is_list(kind: pa.DataType) -> bool:
    """Tell whether a type is one of Arrow's lists."""
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _is_text(kind: pa.DataType) -> bool:
    if is_list(kind):
        return _is_text(kind.value_type)
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


READER = Reader(
    {"parquet": "a table as Parquet, one file or a folder of parts; --user, ... (yours)"},
    detect,
    parquet,
)
