"""Export of an event log to files that `l2rec prepare` reads, so that traffic can be trained on."""

from __future__ import annotations

__all__ = ["export_log", "read_log"]

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from l2rec.errors import ConfigError, DataError
from l2rec.service.events import POSITIVE, SCHEMA, TYPES, EventLog, Plan, is_event_log

NAMES = {"user": "user_id", "item": "item_id", "type": "event_type", "timestamp": "timestamp"}
"""Columns of the log -> columns of events.parquet."""
EXPORTED = pa.schema([(new, SCHEMA.field(old).type) for old, new in NAMES.items()])


def export_log(
    url: str, folder: Path, *, types: Sequence[str] = POSITIVE, catalog: Path | None = None
) -> tuple[Path, Path]:
    """Write events.parquet and items.parquet into ``folder``, and return their paths.

    The items are those of ``catalog`` (Parquet or CSV with item_id and text, such as a run's
    catalog.parquet) with those added or changed since; deleted items stay, since events may name
    them.

    Raises:
        ConfigError: an unknown type.
        DataError: no such events, or a catalog without its columns.
        StorageError: the log cannot be read.
    """
    unknown = [name for name in types if name not in TYPES]
    if unknown or not types:
        raise ConfigError(f"event types {unknown or '()'}: choose from {', '.join(TYPES)}")
    log = EventLog(url, create=False)
    try:
        events, rows = folder / "events.parquet", 0
        with pq.ParquetWriter(events, EXPORTED) as writer:
            for batch in log.read(types=types):
                columns = [batch[name] for name in NAMES]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=EXPORTED))
                rows += len(batch)
        put, _ = log.items()
    finally:
        log.close()
    if not rows:
        raise DataError(f"the event log has no {' or '.join(types)} yet: nothing to prepare")
    items = folder / "items.parquet"
    _catalog(catalog, put).write_parquet(items)
    return events, items


def _catalog(path: Path | None, put: dict[str, tuple[str, dict[str, str]]]) -> pl.DataFrame:
    """Join the catalog of a file with the items that were put, which replace those of the file."""
    fresh = pl.DataFrame(
        [{"item_id": item, "text": text, **fields} for item, (text, fields) in put.items()],
        schema_overrides={"item_id": pl.String, "text": pl.String},
        infer_schema_length=None,
    )
    if path is None:
        if not put:
            raise DataError("the event log knows no item texts; give the catalog with --items")
        return fresh
    try:
        if path.suffix == ".csv":
            known = pl.read_csv(path, infer_schema=False)
        else:
            known = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: neither Parquet nor CSV: {reason}") from error
    absent = {"item_id", "text"} - set(known.columns)
    if absent:
        raise DataError(f"{path} has no column {min(absent)!r}; it needs item_id and text")
    if not put:
        return known
    rest = known.with_columns(pl.col("item_id").cast(pl.String))
    rest = rest.filter(~pl.col("item_id").is_in(list(put)))
    try:
        return pl.concat([rest, fresh], how="diagonal_relaxed")
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: no column for the attributes of items put: {reason}") from error


def read_log(source: str) -> tuple[Any, dict[str, Plan]]:
    """Read an event log as a data frame, and the experiments that were served; open a table on disk
    as a lazy frame, which knows of no experiments.

    Raises:
        DataError: neither an event log nor a table.
        StorageError: the log cannot be read.
    """
    if is_event_log(source):
        url = source if "://" in source else f"sqlite:///{source}"
        log = EventLog(url, create=False)
        try:
            return pl.from_arrow(pa.Table.from_batches(log.read(), schema=SCHEMA)), log.plans()
        finally:
            log.close()
    try:
        table = pl.scan_parquet(source)
        table.collect_schema()
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{source}: neither an event log nor a Parquet table: {reason}") from error
    return table, {}
