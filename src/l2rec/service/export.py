"""Export of an event log to files that `l2rec prepare` reads, so that traffic can be trained on."""

from __future__ import annotations

__all__ = ["export_log", "read_log"]

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from l2rec.data.catalog import Catalog, with_separator
from l2rec.data.dataset import Dataset, open_dataset
from l2rec.data.extend import EARLIER, Known, may_grow
from l2rec.errors import ConfigError, DataError
from l2rec.service.events import POSITIVE, SCHEMA, TYPES, EventLog, Plan, is_event_log

NAMES = {"user": "user_id", "item": "item_id", "type": "event_type", "timestamp": "timestamp"}
"""Columns of the log -> columns of events.parquet."""
EXPORTED = pa.schema([(new, SCHEMA.field(old).type) for old, new in NAMES.items()])


def export_log(
    url: str,
    folder: Path,
    *,
    types: Sequence[str] = POSITIVE,
    catalog: Path | None = None,
    after: Path | None = None,
    per_second: float = 1.0,
) -> tuple[Path, Path]:
    """Write events.parquet and items.parquet into ``folder``, and return their paths.

    The items are those of ``catalog``, in its order, with those added or changed since; deleted
    items stay, since events may name them, and since they may come back.

    Args:
        catalog: Parquet or CSV with item_id and text, such as a run's catalog.parquet; that of
            ``after`` by default.
        after: data set whose events come first. Events of the log that it has already, since it
            was prepared from the same log, are not repeated. Times are in its unit.
        per_second: how many of the unit of time are a second, without ``after``.

    Raises:
        ConfigError: an unknown type.
        DataError: no such events, a catalog without its columns, or a data set that newer events
            cannot follow.
        StorageError: the log cannot be read.
    """
    unknown = [name for name in types if name not in TYPES]
    if unknown or not types:
        raise ConfigError(f"event types {unknown or '()'}: choose from {', '.join(TYPES)}")
    earlier = None if after is None else open_dataset(after)
    if earlier is not None:
        may_grow(earlier)
        per_second = earlier.order.per_second or 1.0
    if catalog is None and earlier is not None:
        catalog = earlier.path / "catalog.parquet"
    log, rows = EventLog(url, create=False), 0

    def logged() -> Iterator[pa.RecordBatch]:
        nonlocal rows
        for batch in log.read(types=types):
            rows += len(batch)
            columns = [batch[name] for name in NAMES]
            columns[-1] = pc.multiply(columns[-1], per_second)
            yield pa.RecordBatch.from_arrays(columns, schema=EXPORTED)

    try:
        known = None
        if earlier is not None:
            known = Known(earlier, since=_oldest(log, types) * per_second, types=True)
        events = folder / "events.parquet"
        with pq.ParquetWriter(events, EXPORTED) as writer:
            for batch in () if earlier is None else _events(earlier):
                writer.write_batch(batch)
            for batch in logged() if known is None else known.without(logged()):
                writer.write_batch(batch)
        put = log.texts()
    finally:
        log.close()
    if not rows:
        raise DataError(f"the event log has no {' or '.join(types)} yet: nothing to prepare")
    items = folder / "items.parquet"
    pq.write_table(_catalog(catalog, put), items)
    return events, items


def _events(dataset: Dataset) -> Iterator[pa.RecordBatch]:
    """Yield the events of a data set as `EXPORTED`."""
    more = {} if dataset.event_types is None else {"type": dataset.event_types}
    names = pa.array(dataset.event_type_names, pa.string())
    for batch in dataset.event_batches(more=more):
        types = names.take(batch["type"]) if more else pa.array([EARLIER] * len(batch))
        columns = [batch["user_id"], batch["item_id"], types, batch["timestamp"]]
        yield pa.RecordBatch.from_arrays(columns, schema=EXPORTED)


def _oldest(log: EventLog, types: Sequence[str]) -> float:
    """Return the time of the oldest event of these types; infinity without one."""
    oldest = [pc.min(batch["timestamp"]).as_py() for batch in log.read(types=types)]
    return min(oldest, default=float("inf"))


def _catalog(path: Path | None, put: Mapping[str, tuple[str, Mapping[str, str]]]) -> pa.Table:
    """Join the catalog of a file with the items that were put, which take the places of those of
    the file.
    """
    fresh = pl.DataFrame(
        [{**fields, "item_id": item, "text": text} for item, (text, fields) in put.items()],
        schema_overrides={"item_id": pl.String, "text": pl.String},
        infer_schema_length=None,
    )
    if path is None:
        if not put:
            raise DataError("the event log knows no item texts; give the catalog with --items")
        return fresh.to_arrow()
    separators: dict[str, str] = {}
    try:
        if path.suffix == ".csv":
            known = pl.read_csv(path, infer_schema=False)
        else:
            known = pl.read_parquet(path)
            separators = Catalog(pq.read_schema(path).empty_table()).separators
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: neither Parquet nor CSV: {reason}") from error
    absent = {"item_id", "text"} - set(known.columns)
    if absent:
        raise DataError(f"{path} has no column {min(absent)!r}; it needs item_id and text")
    joined = known.with_columns(pl.col("item_id").cast(pl.String))
    if put:
        places = {item: place for place, item in enumerate(joined["item_id"])}
        rest = joined.filter(~pl.col("item_id").is_in(list(put)))
        try:
            joined = pl.concat([rest, fresh], how="diagonal_relaxed")
        except pl.exceptions.PolarsError as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{path}: no column for the attributes of items put: {reason}"
            ) from error
        place = [places.get(item, len(places)) for item in joined["item_id"]]
        joined = joined[np.argsort(place, kind="stable")]
    table = joined.to_arrow()
    columns = [with_separator(column, separators.get(column.name)) for column in table.schema]
    return table.cast(pa.schema(columns))


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
