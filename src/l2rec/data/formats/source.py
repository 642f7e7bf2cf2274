"""Checked batches of events and of the catalog, as every reader returns them."""

from __future__ import annotations

__all__ = ["Source"]

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from l2rec.data.formats.columns import Columns
from l2rec.data.formats.files import File, Where
from l2rec.errors import DataError

BLOCK_BYTES = 1 << 24
SPLITS = ("train", "valid", "test")
"""Splits that a log may come with, in their order in time."""


@dataclass(frozen=True)
class Source:
    """A log to prepare.

    ``events()``: batches of ``user_id`` and ``item_id`` (string, not empty), ``timestamp``
    (float64, finite), perhaps ``event_type`` (string), and ``split`` (int8 into `SPLITS`) where
    the files say which split an event is of; in file order.
    ``catalog(fields)``: batches of ``item_id`` and the named fields, all strings, none null;
    None without a catalog. ``fields`` are always stored and make the default text;
    ``more_fields`` are read only when a text template names them. ``files``: the files read.
    ``notes``: what the user should know of the files, complete when all was read.
    """

    format: str
    files: tuple[Path, ...]
    events: Callable[[], Iterator[pa.RecordBatch]]
    catalog: Callable[[Sequence[str]], Iterator[pa.RecordBatch]] | None = None
    fields: tuple[str, ...] = ()
    more_fields: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Context:
    """Options of a reader. ``notes``: receives what the user should know of the files."""

    columns: Columns
    block_bytes: int
    notes: list[str] = field(default_factory=list)


def _strings(column: pa.Array) -> pa.Array:
    return column if column.type == pa.string() else column.cast(pa.string())


def event_batch(
    users: pa.Array,
    items: pa.Array,
    times: pa.Array,
    types: pa.Array | None,
    where: Where,
    unit: int = 1,
    splits: pa.Array | None = None,
) -> pa.RecordBatch:
    """Check ids and timestamps of one batch.

    ``unit``: how many of a timestamp are a second. ``splits``: int8 into `SPLITS`, of each event.
    """
    columns = {"user_id": _strings(users), "item_id": _strings(items)}
    for what, ids in (("user", columns["user_id"]), ("item", columns["item_id"])):
        missing = pc.fill_null(pc.equal(ids, ""), True)
        if pc.any(missing).as_py():
            row = int(pc.index(missing, True).as_py())
            raise DataError(f"{where(row)} has no {what} id; give it one or remove the row")
    # Divided, not times a fraction: the nearest number, as other formats read 0.288 from text.
    seconds = _seconds(times, where) / unit
    columns["timestamp"] = pa.array(seconds, type=pa.float64())
    if types is not None:
        columns["event_type"] = pc.fill_null(_strings(types), "")
    if splits is not None:
        columns["split"] = splits.cast(pa.int8())
    return pa.RecordBatch.from_pydict(columns)


def _seconds(times: pa.Array, where: Where) -> np.ndarray[Any, np.dtype[np.float64]]:
    column = cast(pl.Series, pl.from_arrow(times))
    if column.dtype.is_temporal():
        numbers = column.cast(pl.Datetime("us")).dt.epoch("us") / 1e6
    elif column.dtype == pl.String:
        column = column.str.strip_chars()
        numbers = column.cast(pl.Float64, strict=False)
        if len(column) and numbers.null_count() == len(column):
            numbers = _seconds_of_dates(column)
    else:
        numbers = column.cast(pl.Float64, strict=False)
    wrong = ~numbers.is_finite().fill_null(False)
    if wrong.any():
        row = cast(int, wrong.arg_max())
        value = column[row]
        shown = "is missing" if value is None or value == "" else f"{value!r} is not a number"
        raise DataError(
            f"{where(row)}: timestamp {shown}; give seconds since 1970 or, in all rows, dates such "
            f"as 2023-11-28 or 2023-11-28T23:08:57Z (or pass --timestamp none if the events are in "
            f"order and have no times)"
        )
    return numbers.to_numpy()


_DATE = (
    r"^(\d{4}-\d{2}-\d{2})(?:[T ](\d{2}:\d{2})(:\d{2}(?:\.\d+)?)?)?"
    r" ?(Z|UTC|[+-]\d{2}:?\d{2})?$"
)


def _seconds_of_dates(texts: pl.Series) -> pl.Series:
    """Turn ISO 8601 dates and times into seconds since 1970; UTC where no offset is given.

    Null where a text is not a date.
    """
    parts = texts.to_frame("text").select(
        pl.col("text").str.extract(_DATE, group).alias(name)
        for group, name in enumerate(("day", "time", "second", "offset"), start=1)
    )
    offset = pl.col("offset").str.replace_all(r"[Z:UTC]", "")
    minutes = offset.str.slice(1, 2).cast(pl.Float64, strict=False) * 60
    minutes += offset.str.slice(3, 2).cast(pl.Float64, strict=False)
    sign = pl.when(offset.str.starts_with("-")).then(-1.0).otherwise(1.0)
    moment = pl.concat_str(
        pl.col("day"),
        pl.lit(" "),
        pl.col("time").fill_null("00:00"),
        pl.col("second").fill_null(":00"),
    ).str.to_datetime("%Y-%m-%d %H:%M:%S%.f", time_unit="us", strict=False)
    seconds = moment.dt.epoch("us") / 1e6 - (sign * minutes * 60).fill_null(0.0)
    return parts.select(seconds.alias("seconds")).to_series()


def catalog_batch(ids: Any, fields: dict[str, Any], where: Where) -> pa.RecordBatch:
    """Make ids and text fields strings without nulls."""
    columns = {
        name: pc.fill_null(_strings(as_arrow(column)), "")
        for name, column in {"item_id": ids, **fields}.items()
    }
    missing = pc.equal(columns["item_id"], "")
    if pc.any(missing).as_py():
        row = int(pc.index(missing, True).as_py())
        raise DataError(f"{where(row)} has no item id; give it one or remove the row")
    return pa.RecordBatch.from_pydict(columns)


def as_arrow(column: Any) -> pa.Array:
    """Turn a Polars or chunked Arrow column into one Arrow array."""
    array = column.to_arrow() if isinstance(column, pl.Series) else column
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


@dataclass(frozen=True)
class CatalogReader:
    """A catalog to read: batches of ids and named fields, and the fields there are."""

    read: Callable[[Sequence[str]], Iterator[pa.RecordBatch]]
    fields: tuple[str, ...]
    more_fields: tuple[str, ...] = ()


OpenCatalog = Callable[[File, Context], CatalogReader]
"""Function that opens a catalog in the format its name says."""


@dataclass(frozen=True)
class Reader:
    """Formats that one module reads.

    ``formats``: name for ``--format`` -> what it looks like and whose data has it, in one line.
    ``detect``: of a path, its files by name, the catalog that was given and the context, returns
    the format; None if it is none of them. ``open``: of the same, with the format after the
    catalog and how to open a catalog at the end, returns the source.
    """

    formats: Mapping[str, str]
    detect: Callable[[Path, dict[str, File], File | None, Context], str | None]
    open: Callable[[Path, dict[str, File], File | None, str, Context, OpenCatalog], Source]


def as_source(
    format: str,
    files: Sequence[File],
    events: Callable[[], Iterator[pa.RecordBatch]],
    catalog: CatalogReader | None,
) -> Source:
    """Build the `Source` of a format from its files, events and catalog."""
    return Source(
        format=format,
        files=tuple(dict.fromkeys(f.path for f in files)),
        events=events,
        catalog=catalog.read if catalog else None,
        fields=catalog.fields if catalog else (),
        more_fields=catalog.more_fields if catalog else (),
    )
