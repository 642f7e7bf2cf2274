"""Checked batches of events and of the catalog, as every reader returns them."""

from __future__ import annotations

__all__ = ["Source"]

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from l2rec.data.formats.columns import Columns
from l2rec.data.formats.dates import Clock
from l2rec.data.formats.files import File, Where
from l2rec.errors import DataError

BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Source:
    """A log to prepare.

    ``events()``: batches of ``user_id`` and ``item_id`` (string, not empty), ``timestamp``
    (float64, finite), perhaps ``event_type`` (string), and ``split`` (int8 into `SPLITS`) where
    the files say which split an event is of; in file order.
    ``catalog(fields)``: batches of ``item_id`` and the named fields, all strings, none null;
    None without a catalog. ``fields`` are always stored and make the default text;
    ``more_fields`` are read only when a text template names them. ``separators``: what stands
    between the values of a field that has several. ``files``: the files read.
    ``notes``: what the user should know of the files, complete when all was read. ``parts``:
    fingerprints of the data sets that were merged, by name. ``chosen``: whether the events are
    those of chosen types already. ``origin``: what they are of, where the files are made of it.
    """

    format: str
    files: tuple[Path, ...]
    events: Callable[[], Iterator[pa.RecordBatch]]
    catalog: Callable[[Sequence[str]], Iterator[pa.RecordBatch]] | None = None
    fields: tuple[str, ...] = ()
    more_fields: tuple[str, ...] = ()
    separators: Mapping[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    parts: Mapping[str, str] = field(default_factory=dict)
    chosen: bool = False
    origin: str | None = None

    @property
    def called(self) -> str:
        """What errors call the log."""
        return self.origin or str(self.files[0])


@dataclass(frozen=True)
class Context:
    """Options of a reader. ``notes``: receives what the user should know of the files."""

    columns: Columns
    block_bytes: int
    notes: list[str] = field(default_factory=list)


WHOLE_UP_TO = 2.0**53
"""Whole numbers that a float64 tells apart."""


def _strings(column: pa.Array) -> pa.Array:
    return column if column.type == pa.string() else column.cast(pa.string())


def is_compound(kind: pa.DataType) -> bool:
    """Tell whether a type has parts, or a meaning that its plain value does not show."""
    return pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType)


def _no_plain(what: str, kind: pa.DataType, where: Where) -> DataError:
    return DataError(f"{where(0)}: {what} of type {kind}; write them as text or as numbers")


def _ids(column: pa.Array, what: str, where: Where) -> pa.Array:
    """Return ids as strings. Whole numbers that come as floats, as where one was missing, are
    written as whole numbers, and UUIDs as UUIDs are.

    Raises:
        DataError: they are neither texts nor numbers.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _ids(column.dictionary_decode(), what, where)
    if getattr(kind, "extension_name", "") == "arrow.uuid":
        return pa.array([None if one is None else str(one) for one in column.to_pylist()])
    if is_compound(kind) or pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind):
        raise _no_plain(f"{what} ids", kind, where)
    if pa.types.is_floating(kind):
        numbers = column.cast(pa.float64())
        fits = pc.less(pc.abs(numbers), WHOLE_UP_TO)
        if pc.all(pc.and_(fits, pc.equal(pc.floor(numbers), numbers))).as_py():
            column = numbers.cast(pa.int64())
    return _strings(column)


def event_batch(
    users: pa.Array,
    items: pa.Array,
    times: pa.Array,
    types: pa.Array | None,
    where: Where,
    unit: int = 1,
    splits: pa.Array | None = None,
    clock: Clock | None = None,
) -> pa.RecordBatch:
    """Check ids and timestamps of one batch.

    ``unit``: how many of a timestamp are a second. ``splits``: int8 into `SPLITS`, of each event.
    ``clock``: that of the batches before, where times may be texts.
    """
    columns = {"user_id": _ids(users, "user", where), "item_id": _ids(items, "item", where)}
    for what, ids in (("user", columns["user_id"]), ("item", columns["item_id"])):
        missing = pc.fill_null(pc.equal(ids, ""), True)
        if pc.any(missing).as_py():
            row = int(pc.index(missing, True).as_py())
            raise DataError(f"{where(row)} has no {what} id; give it one or remove the row")
    seconds = (clock or Clock()).seconds(times, where, unit)
    columns["timestamp"] = pa.array(seconds, type=pa.float64())
    if types is not None:
        if is_compound(types.type):
            raise _no_plain("event types", types.type, where)
        columns["event_type"] = pc.fill_null(_strings(types), "")
    if splits is not None:
        columns["split"] = splits.cast(pa.int8())
    return pa.RecordBatch.from_pydict(columns)


def catalog_batch(ids: Any, fields: dict[str, Any], where: Where) -> pa.RecordBatch:
    """Make ids and text fields strings without nulls."""
    columns = {"item_id": pc.fill_null(_ids(as_arrow(ids), "item", where), "")}
    for name, column in fields.items():
        columns[name] = pc.fill_null(_strings(as_arrow(column)), "")
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
    """A catalog to read: batches of ids and named fields, the fields there are, and what stands
    between the values of those that have several.
    """

    read: Callable[[Sequence[str]], Iterator[pa.RecordBatch]]
    fields: tuple[str, ...]
    more_fields: tuple[str, ...] = ()
    separators: Mapping[str, str] = field(default_factory=dict)


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
        separators=catalog.separators if catalog else {},
    )
