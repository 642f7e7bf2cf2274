"""From a public log to a prepared data set, in bounded memory.

    catalog file ──► item ids, fields, text                          (in memory: Arrow)
    event file  ──► user int, item int, time, type, in file order    (temporary files, mapped)
                ──► users and items that stay: k-core, by counting   (a few passes)
                ──► grouped by user, in file order                   (counting scatter, mapped)
                ──► sorted by time within each user, ties as `ties` says; cut to the newest
                ──► the folder, renamed into place when everything is written

In memory are the ids, the catalog, a byte or eight per user and item, and one chunk of events.
"""

from __future__ import annotations

__all__ = [
    "CHUNK_EVENTS",
    "PrepareConfig",
    "build",
    "item_text",
    "may_write",
    "prepare",
    "rechunk",
    "write_parquet",
]

import contextlib
import json
import os
import shutil
import string
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, field_validator
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from l2rec.data.catalog import with_separator
from l2rec.data.dataset import (
    FORMAT,
    GIVEN,
    VERSION,
    Dataset,
    content_fingerprint,
    open_dataset,
    order_of,
    user_blocks,
)
from l2rec.data.formats.columns import Columns, Quotes
from l2rec.data.formats.open import open_source
from l2rec.data.formats.source import Source
from l2rec.data.moments import moment
from l2rec.data.parts import MIN_EVENTS, SPLITS, leave_one_out_marks
from l2rec.data.splits import LEAVE_ONE_OUT
from l2rec.data.ties import EventOrder, TieBreaker, Ties, per_second_of, unit_of
from l2rec.disk import replacing_folder, write_json
from l2rec.errors import DataError, nearest

CHUNK_EVENTS = 1 << 20
MOST_CHUNKS = 8
"""Read at once where there are many users: a column of Arrow strings ends at 2^31 bytes."""
ROOM = "free some space (about 60 bytes per event) or choose another disk"
BRACKETS = {"(": ")", "[": "]", "{": "}"}
Ints = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


class PrepareConfig(BaseModel):
    """Options of filtering a log and of making item texts; all are written to dataset.json.

    ``k_core``: drop users and items with fewer events, again and again, until none is left.
    ``min_history``: likewise for users alone. ``max_history``: keep each user's newest events.
    ``text``: a template over catalog fields, such as ``"{title}. {brand}"``, of which empty fields
    are left out with what joins them; by default all fields that are not empty, joined by ". ".
    ``drop_unknown_items``: drop events of items that the catalog does not have, instead of
    refusing. ``drop_textless``: drop items without text.
    ``keep_all_items``: keep catalog items without events. ``duplicate_items``: what to do about
    different catalog rows with one id. ``only``: keep events of these types alone. ``before``:
    keep earlier events (a time in the log's unit, or a date such as 2023-11-28, midnight UTC).
    ``splits``: keep the splits that a log comes with (``given``), or do not (``none``).
    ``ties``: order of a user's events with equal time: that of the file, by item id, or by a hash
    of user id, item id and occurrence that depends on ``ties_seed`` and not on the file.
    ``user`` to ``quotes``: see `Columns`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    k_core: int = Field(default=0, ge=0)
    min_history: int = Field(default=0, ge=0)
    max_history: int | None = Field(default=None, ge=1)
    text: str | None = None
    drop_unknown_items: bool = False
    drop_textless: bool = False
    keep_all_items: bool = False
    duplicate_items: Literal["error", "first"] = "error"
    only: tuple[str, ...] = ()
    before: float | None = None
    splits: Literal["given", "none"] = "given"
    ties: Ties = "file"
    ties_seed: int = Field(default=0, ge=0, lt=1 << 64)
    user: str = Columns.user
    item: str = Columns.item
    timestamp: str | None = Columns.timestamp
    event_type: str | None = Columns.event_type
    encoding: str = Columns.encoding
    quotes: Quotes = Columns.quotes

    @field_validator("timestamp", mode="before")
    @classmethod
    def _none_by_name(cls, value: Any) -> Any:
        # On a command line, None is spelled as a word.
        return None if isinstance(value, str) and value.lower() in ("none", "null", "") else value

    @field_validator("before", mode="before")
    @classmethod
    def _seconds_of_a_date(cls, value: Any) -> Any:
        return moment(value) if isinstance(value, str) else value


def prepare(
    source: str | Path,
    out: str | Path,
    config: PrepareConfig | None = None,
    *,
    items: str | Path | None = None,
    format: str | None = None,
    origin: str | None = None,
    progress: bool = True,
) -> Dataset:
    """Read a log in any of `formats.FORMATS` and write the data set folder ``out``.

    ``items``: the catalog file where it does not lie beside the events. ``origin``: what the log is
    of, if not ``source`` itself: dataset.json and errors name it. ``progress``: report
    rows and notes on standard error. An existing data set at ``out`` is replaced once the new
    one is complete; on any error ``out`` stays as it was.

    Raises:
        DataError: no known format, a log or catalog that cannot be used, nothing left after
            filtering, ``out`` is something else, or the disk is full.
    """
    config = config or PrepareConfig()
    columns = Columns(
        config.user,
        config.item,
        config.timestamp,
        config.event_type,
        config.encoding,
        config.quotes,
    )
    opened = open_source(source, items=items, format=format, columns=columns)
    opened = replace(opened, origin=origin)
    return build(opened, Path(out), config, origin=origin or str(source), progress=progress)


def build(
    source: Source,
    out: Path,
    config: PrepareConfig,
    *,
    origin: str,
    progress: bool = False,
    chunk_events: int = CHUNK_EVENTS,
    order: EventOrder | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> Dataset:
    """Prepare a log that is open already. ``origin``: its name in dataset.json.

    ``chunk_events``: events in memory at a time; the result does not depend on it. ``order``: facts
    about the order of events where they are known; by default they are measured. ``recorded``:
    options that dataset.json names in place of those of ``config``.
    """
    report = _Report(progress)
    may_write(out)
    with replacing_folder(out, error=DataError, remedy=ROOM) as folder, report:
        work = folder / "work"
        work.mkdir()
        state = _State(work, config, chunk_events, report)
        catalog = _read_catalog(source, state)
        log = _read_events(source, catalog.ids if catalog else None, state)
        if catalog is None:
            catalog = _Catalog.of_ids(log.item_ids)
        remaining = _filter(log, catalog, state)
        item_ok = _write_events(log, catalog, remaining, folder, state)
        _write_tables(log, catalog, remaining.users, item_ok, folder)
        options = config.model_dump(mode="json") | dict(recorded or {})
        _write_meta(
            source, catalog, folder, state, options, name=out.name, origin=origin, order=order
        )
        shutil.rmtree(work)
    dataset = open_dataset(out)
    report.notes(dataset)
    return dataset


@dataclass
class _State:
    work: Path
    config: PrepareConfig
    chunk: int
    report: _Report
    counters: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    event_types: list[str] = field(default_factory=list)
    splits: str | None = None
    splits_left_aside: bool = False


# ---------------------------------------------------------------- the catalog


OWN = ("csv", "parquet", "jsonl")
"""Formats whose columns are whatever somebody has: prices and addresses of pictures, perhaps."""


@dataclass(frozen=True)
class _Catalog:
    """Items in catalog order. ``table``: item_id, stored fields, text. ``ids``: one array."""

    table: pa.Table
    ids: pa.Array
    fields: tuple[str, ...]

    @classmethod
    def of_ids(cls, ids: pa.Array) -> _Catalog:
        texts = pa.array(np.full(len(ids), ""), type=pa.string())
        return cls(pa.table({"item_id": ids, "text": texts}), ids, ())


def _read_catalog(source: Source, state: _State) -> _Catalog | None:
    config = state.config
    template = None if config.text is None else _parse_template(config.text)
    if source.catalog is None:
        if template is not None:
            raise DataError(
                f"text={config.text!r} needs a catalog, but {source.files[0].name} comes without "
                f"one; pass --items FILE or leave text out"
            )
        state.notes.append("no catalog: items have no text, only their ids are known")
        return None
    known = (*source.fields, *source.more_fields)
    text = item_text(config.text, source.fields, known)
    if template is None and len(source.fields) > 1 and source.format in OWN:
        state.notes.append(
            f"an item reads as its columns {', '.join(source.fields)}, joined; to choose, pass "
            f'--text "{{{source.fields[0]}}}" or the like'
        )
    named = [name for _, name in template or [] if name is not None]
    extra = [name for name in source.more_fields if name in named]
    fields = (*source.fields, *extra)
    frames = []
    for batch in source.catalog(fields):
        frames.append(cast(pl.DataFrame, pl.from_arrow(batch)))
        state.report.rows("catalog rows", batch.num_rows)
    if not frames:
        raise DataError(
            f"the catalog of {source.files[-1].name} has no rows; "
            f"give a catalog with items, or none at all"
        )
    frame = _without_duplicates(pl.concat(frames), state)
    frame = frame.with_columns(text.alias("__text"))
    if "text" in fields and frame["__text"].equals(frame["text"].str.strip_chars()):
        frame = frame.drop("text")  # it is the text already
        fields = tuple(name for name in fields if name != "text")
    taken = _out_of_the_way(fields)
    frame = frame.rename(taken | {"__id": "item_id", "__text": "text"})
    ids = frame["item_id"].to_arrow().cast(pa.large_string())
    state.counters["catalog_items"] = len(ids)
    names = [taken.get(name, name) for name in fields]
    separators = {
        taken.get(name, name): between
        for name, between in source.separators.items()
        if name in fields
    }
    return _Catalog(_plain(frame, separators), ids, tuple(names))


def _out_of_the_way(fields: Sequence[str]) -> dict[str, str]:
    """Rename fields that are called as columns of the data set are: item_id and text."""
    taken: dict[str, str] = {}
    for name in ("item_id", "text"):
        if name in fields:
            free = f"raw_{name}"
            while free in fields:
                free = f"raw_{free}"
            taken[name] = free
    return taken


def _without_duplicates(frame: pl.DataFrame, state: _State) -> pl.DataFrame:
    frame = frame.rename({"item_id": "__id"})
    rows = len(frame)
    if frame["__id"].n_unique() == rows:
        return frame
    frame = frame.unique(maintain_order=True)
    double = frame["__id"].is_duplicated()
    if double.any() and state.config.duplicate_items == "error":
        ids = frame["__id"].filter(double).unique(maintain_order=True)
        raise DataError(
            f"{len(ids):,} item ids have different rows in the catalog, the first is {ids[0]!r}; "
            f"remove one of the rows or pass --duplicate-items first"
        )
    frame = frame.unique(subset="__id", keep="first", maintain_order=True)
    state.counters["duplicate_catalog_rows"] = rows - len(frame)
    state.notes.append(f"{rows - len(frame):,} repeated catalog rows were left out")
    return frame


def item_text(template: str | None, fields: Sequence[str], known: Sequence[str]) -> pl.Expr:
    """Return the text of an item: the template filled, or by default its ``fields`` joined.

    known: all fields that a template may name.

    Raises:
        DataError: the template is none, or names another field.
    """
    if template is None:
        return _default_text(fields)
    parts = _parse_template(template)
    for _, name in parts:
        if name is not None and name not in known:
            raise DataError(
                f"text={template!r} names the field {name!r}, which the catalog does not "
                f"have{nearest(name, known)}; it has {', '.join(known) or 'only ids'}"
            )
    return _apply(parts)


def _parse_template(template: str) -> list[tuple[str, str | None]]:
    """Split a template into pairs of literal text and the field after it (None at the end)."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(
            f"text={template!r} is not a template ({error}); write fields as {{title}}"
        ) from error
    if not any(name for _, name, _, _ in parts):
        raise DataError(f"text={template!r} names no field; write fields as {{title}}")
    for _, name, spec, conversion in parts:
        if name == "" or spec or conversion:
            raise DataError(
                f"text={template!r} has a field that is not a plain name; write it as {{title}}"
            )
    return [(literal, name) for literal, name, _, _ in parts]


def _apply(template: list[tuple[str, str | None]]) -> pl.Expr:
    """Fill the template without what is empty; an item that has none of the fields has no text."""
    return _filled(_nested(template)).str.strip_chars().fill_null("")


@dataclass
class _Span:
    """A template, or what is between two brackets of it: elements, and the literals around them.

    literals: one more than there are elements, with the brackets.
    """

    literals: list[str]
    elements: list[str | _Span] = field(default_factory=list)

    def add(self, element: str | _Span) -> None:
        """Add a field, or a span of fields."""
        self.elements.append(element)
        self.literals.append("")

    def take(self, other: _Span) -> None:
        """Add what another span has, one by one."""
        self.literals[-1] += other.literals[0]
        self.literals += other.literals[1:]
        self.elements += other.elements


def _nested(template: list[tuple[str, str | None]]) -> _Span:
    """Put fields in brackets together: they are empty as one, brackets included."""
    spans = [_Span([""])]
    for literal, name in template:
        for sign in literal:
            if sign in BRACKETS:
                spans.append(_Span([sign]))
                continue
            spans[-1].literals[-1] += sign
            if len(spans) > 1 and sign == BRACKETS[spans[-1].literals[0][0]]:
                closed = spans.pop()
                if closed.elements:
                    spans[-1].add(closed)
                else:
                    spans[-1].take(closed)
        if name is not None:
            spans[-1].add(name)
    while len(spans) > 1:  # never closed
        left = spans.pop()
        spans[-1].take(left)
    return spans[0]


def _filled(span: _Span) -> pl.Expr:
    """Write the elements that are not empty, each after the literal before it, the first of them
    without; null where all are empty.
    """
    first, *between, last = span.literals
    parts, some = [pl.lit(first)], pl.lit(False)
    for joint, element in zip(["", *between], span.elements, strict=True):
        if isinstance(element, _Span):
            value = _filled(element)
        else:
            value = pl.when(pl.col(element).str.strip_chars() != "").then(pl.col(element))
        parts.append(
            (pl.when(some).then(pl.lit(joint)).otherwise(pl.lit("")) + value).fill_null("")
        )
        some = some | value.is_not_null()
    return pl.when(some).then(pl.concat_str([*parts, pl.lit(last)]))


def _default_text(fields: Sequence[str]) -> pl.Expr:
    if not fields:
        return pl.lit("")
    trimmed = [pl.col(name).str.strip_chars() for name in fields]
    filled = [pl.when(column != "").then(column) for column in trimmed]
    return pl.concat_str(filled, separator=". ", ignore_nulls=True).fill_null("")


def _plain(frame: pl.DataFrame, separators: Mapping[str, str]) -> pa.Table:
    """Return the table as strings; fields of several values say what stands between these."""
    table = frame.to_arrow()
    columns = [
        with_separator(pa.field(name, _string_type(table[name])), separators.get(name))
        for name in table.column_names
    ]
    return table.cast(pa.schema(columns))


def _string_type(column: pa.ChunkedArray) -> pa.DataType:
    """Choose strings with offsets of four bytes where these suffice."""
    return pa.string() if column.nbytes < 1 << 30 else pa.large_string()


# ---------------------------------------------------------------- events, as they come


@dataclass(frozen=True)
class _Log:
    """Events in file order, memory-mapped: ``users``, ``items`` [E] int32 (item -1: unknown),
    ``times`` [E] float64, ``types`` and ``splits`` [E] int8 or None.
    """

    users: Ints
    items: Ints
    times: npt.NDArray[np.float64]
    types: npt.NDArray[np.int8] | None
    splits: npt.NDArray[np.int8] | None
    user_ids: pa.Array
    item_ids: pa.Array

    def chunks(self, events: int) -> Iterator[slice]:
        return (slice(at, at + events) for at in range(0, len(self.users), events))


class _Ids:
    """Ints for strings, in order of first appearance, without a Python object per string."""

    def __init__(self, known: pa.Array | None = None) -> None:
        self.closed = known is not None
        self.values = known if known is not None else pa.array([], type=pa.large_string())

    def encode(self, column: pa.Array) -> Ints:
        """Return the strings' ints; new strings get the next ones, or -1 if the ids are closed."""
        encoded = column.dictionary_encode()
        distinct = encoded.dictionary.cast(pa.large_string())
        found = pc.index_in(distinct, value_set=self.values)
        if not self.closed and found.null_count:
            new = pc.is_null(found)
            fresh = distinct.filter(new)
            codes = pc.fill_null(found, -1).to_numpy(zero_copy_only=False).copy()
            at = new.to_numpy(zero_copy_only=False)
            codes[at] = np.arange(len(self.values), len(self.values) + len(fresh))
            self.values = pa.concat_arrays([self.values, fresh])
        else:
            codes = pc.fill_null(found, -1).to_numpy(zero_copy_only=False)
        ints: Ints = codes.astype(np.int32)[encoded.indices.to_numpy()]
        return ints


def _read_events(source: Source, known_items: pa.Array | None, state: _State) -> _Log:
    users, items, types = _Ids(), _Ids(known_items), _Ids()
    unknown, wanted = _Unknown(), _Wanted(state.config)
    total, has_splits = 0, False

    def at_once() -> int:
        """Count whole chunks, no more events than there are users to look them up among."""
        return state.chunk * min(MOST_CHUNKS, max(1, len(users.values) // state.chunk))

    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context((state.work / name).open("wb"))
            for name in ("users", "items", "times", "types", "splits")
        }
        for read in rechunk(source.events(), at_once):
            table = wanted.of(read)
            item_ints = items.encode(_one(table["item_id"]))
            unknown.see(item_ints, table["item_id"])
            _append(files["users"], users.encode(_one(table["user_id"])))
            _append(files["items"], item_ints)
            _append(files["times"], _one(table["timestamp"]).to_numpy())
            if "event_type" in table.column_names:
                codes = types.encode(_one(table["event_type"]))
                if len(types.values) > 127:
                    raise DataError(
                        f"event_type has more than 127 different values, the last is "
                        f"{types.values[-1].as_py()!r}; name another column"
                    )
                _append(files["types"], codes.astype(np.int8))
            if "split" in table.column_names:
                has_splits = state.config.splits == "given"
                state.splits_left_aside = not has_splits
                if has_splits:
                    _append(files["splits"], _one(table["split"]).to_numpy())
            total += len(item_ints)
            state.report.rows("events", len(read))
    wanted.check(source)
    if not total:
        raise DataError(f"{source.called} has no events; give a log with at least one")
    if wanted.left_out:
        state.counters["events_left_out"] = wanted.left_out
        read = wanted.left_out + wanted.passed
        state.notes.append(
            f"{wanted.left_out:,} of {read:,} events are left out by {wanted.limits}"
        )
    state.counters |= {
        "events_read": total,
        "users_read": len(users.values),
        "events_of_unknown_items": unknown.events,
    }
    state.event_types = types.values.to_pylist()
    if unknown.events:
        unknown.tell(source, total, state)
    return _Log(
        users=np.memmap(state.work / "users", np.int32, "r"),
        items=np.memmap(state.work / "items", np.int32, "r"),
        times=np.memmap(state.work / "times", np.float64, "r"),
        types=np.memmap(state.work / "types", np.int8, "r") if state.event_types else None,
        splits=np.memmap(state.work / "splits", np.int8, "r") if has_splits else None,
        user_ids=users.values,
        item_ids=items.values,
    )


class _Wanted:
    """Filter of the events by the options ``only`` and ``before``, while they are read."""

    def __init__(self, config: PrepareConfig) -> None:
        self.only, self.before = config.only, config.before
        if self.before is not None and config.timestamp is None:
            raise DataError("--before needs times, and --timestamp none leaves the order alone")
        self.left_out = self.passed = 0
        self.types: dict[str, None] = {}

    def of(self, table: pa.Table) -> pa.Table:
        """Return the rows that pass the filter, and count the others."""
        rows = table
        if self.only:
            if "event_type" not in table.column_names:
                raise DataError(
                    f"only={','.join(self.only)}: the log has no event types; name their column "
                    f"with --event-type or leave --only out"
                )
            self.types |= dict.fromkeys(pc.unique(table["event_type"]).to_pylist())
            known = pa.array(self.only, pa.string())
            rows = rows.filter(pc.is_in(rows["event_type"].cast(pa.string()), value_set=known))
        if self.before is not None:
            rows = rows.filter(pc.less(rows["timestamp"], self._limit(rows["timestamp"])))
        self.left_out += len(table) - len(rows)
        self.passed += len(rows)
        return rows

    @property
    def limits(self) -> str:
        """The options, as errors and notes name them."""
        only = [f"only={','.join(self.only)}"] if self.only else []
        return " ".join([*only, *([] if self.before is None else [f"before={self.before}"])])

    def _limit(self, times: pa.ChunkedArray) -> float:
        """Return ``before`` in the unit of these times, where it is in seconds, as of a date."""
        assert self.before is not None
        if not len(times) or (per_second_of(unit_of(self.before)) or 1.0) > 1:
            return self.before
        ends = pc.min_max(times).as_py()
        unit = unit_of(max(abs(ends["min"]), abs(ends["max"])))
        return self.before * (per_second_of(unit) or 1.0)

    def check(self, source: Source) -> None:
        """Raise DataError for a type that no event has, or where no event passed."""
        for name in self.only:
            if name not in self.types:
                shown = ", ".join(list(self.types)[:10])
                log = source.origin or source.files[0].name
                raise DataError(
                    f"only={name}: no event of {log} is of this type"
                    f"{nearest(name, self.types)}; there are {shown}"
                )
        if self.left_out and not self.passed:
            raise DataError(
                f"none of the {self.left_out:,} events is kept by {self.limits}; choose wider "
                f"limits"
            )


@dataclass
class _Unknown:
    """Events of items that the catalog does not have."""

    events: int = 0
    examples: dict[str, None] = field(default_factory=dict)

    def see(self, items: Ints, ids: pa.ChunkedArray) -> None:
        at = np.flatnonzero(items < 0)
        self.events += len(at)
        if len(at) and len(self.examples) < 5:
            seen = ids.take(pa.array(at[:1000])).to_pylist()
            self.examples |= dict.fromkeys(seen)

    def tell(self, source: Source, total: int, state: _State) -> None:
        shown = ", ".join(repr(i) for i in list(self.examples)[:5])
        if not state.config.drop_unknown_items:
            raise DataError(
                f"{self.events:,} of {total:,} events are of items that the catalog "
                f"{source.files[-1].name} does not have (such as {shown}); complete the catalog "
                f"or pass --drop-unknown-items"
                f"{''.join(f'; {note}' for note in dict.fromkeys(source.notes))}"
            )
        state.notes.append(
            f"{self.events:,} of {total:,} events were dropped: their items are not in the "
            f"catalog (such as {shown})"
        )


def rechunk(batches: Iterable[pa.RecordBatch], rows: Callable[[], int]) -> Iterator[pa.Table]:
    """Join or cut batches to ``rows()`` rows, the last to fewer: the cost of looking ids up grows
    with the number of all ids, so it must not happen for every small batch.
    """
    waiting: list[pa.RecordBatch] = []
    waiting_rows = 0
    for batch in batches:
        waiting.append(batch)
        waiting_rows += batch.num_rows
        while waiting_rows >= (size := rows()):
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, size)
            waiting = table.slice(size).to_batches()
            waiting_rows -= size
    if waiting_rows:
        yield pa.Table.from_batches(waiting)


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _append(file: IO[bytes], array: npt.NDArray[Any]) -> None:
    file.write(np.ascontiguousarray(array).data)


# ---------------------------------------------------------------- filtering


@dataclass(frozen=True)
class _Remaining:
    """Users and items that stay: ``users`` [users] and ``items`` [items + 1] bool (the last item
    is "unknown", so item -1 never stays). ``counts`` [users] int64: events that stay.
    """

    users: Mask
    items: Mask
    counts: npt.NDArray[np.int64]


def _filter(log: _Log, catalog: _Catalog, state: _State) -> _Remaining:
    config = state.config
    items = np.ones(len(catalog.ids) + 1, dtype=np.bool_)
    items[-1] = False
    if config.drop_textless:
        has_text = pc.not_equal(pc.utf8_trim_whitespace(catalog.table["text"]), "")
        items[:-1] = has_text.to_numpy()
        state.counters["textless_items_dropped"] = int((~items[:-1]).sum())
    remaining = core(
        log.users,
        log.items,
        items,
        n_users=len(log.user_ids),
        user_min=max(config.k_core, config.min_history, 1),
        item_min=config.k_core,
        chunk=state.chunk,
    )
    if not remaining.users.any():
        if (np.asarray(log.items) < 0).all():
            raise DataError(
                f"no event is left: {'; '.join(state.notes)}; the catalog's ids are such as "
                f"{catalog.ids[0].as_py()!r} (are zeros at the front of ids lost?)"
            )
        limits = f"k_core={config.k_core}, min_history={config.min_history}"
        raise DataError(
            f"no event is left of {len(log.users):,} after filtering with {limits}, "
            f"drop_textless={config.drop_textless}; choose smaller limits"
        )
    if config.keep_all_items and config.k_core > 1:
        # What has no event at all does not have too few: it is kept as an item without events.
        seen = np.zeros(len(items), dtype=np.bool_)
        for at in log.chunks(state.chunk):
            seen[log.items[at]] = True
        return replace(remaining, items=remaining.items | (items & ~seen))
    return remaining


def core(
    users: Ints,
    items: Ints,
    item_ok: Mask,
    *,
    n_users: int,
    user_min: int,
    item_min: int,
    chunk: int = CHUNK_EVENTS,
) -> _Remaining:
    """Find the largest set of events with ``user_min`` for each user, ``item_min`` for each item.

    Events count, not distinct pairs. ``users``, ``items``: [E]; ``item_ok``: [items + 1], False
    for items that are dropped from the start, the last one always. The set does not depend on the
    order of dropping.
    """
    user_ok = np.ones(n_users, dtype=np.bool_)
    chunk = max(chunk, n_users, len(item_ok))  # each chunk adds up counts of all of them
    while True:
        user_counts = np.zeros(n_users, dtype=np.int64)
        item_counts = np.zeros(len(item_ok), dtype=np.int64)
        for at in range(0, len(users), chunk):
            u, i = np.asarray(users[at : at + chunk]), np.asarray(items[at : at + chunk])
            alive = user_ok[u] & item_ok[i]
            if not alive.all():
                u, i = u[alive], i[alive]
            user_counts += np.bincount(u, minlength=n_users)
            if item_min > 1:
                item_counts += np.bincount(i, minlength=len(item_ok))
        users_left = user_ok & (user_counts >= user_min)
        items_left = item_ok & (item_counts >= item_min) if item_min > 1 else item_ok
        # Dropping users who have no event left changes nothing for the items.
        stable = not (user_counts[user_ok & ~users_left]).any() and not (
            item_counts[item_ok & ~items_left].any()
        )
        user_ok, item_ok = users_left, items_left
        if stable:
            return _Remaining(user_ok, item_ok, np.where(user_ok, user_counts, 0))


# ---------------------------------------------------------------- sequences


def _write_events(
    log: _Log, catalog: _Catalog, remaining: _Remaining, folder: Path, state: _State
) -> Mask:
    """Write the four arrays; return which catalog items stay, [items] bool."""
    counts = remaining.counts[remaining.users]
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    grouped = _group_by_user(log, remaining, offsets, state)
    limit = state.config.max_history
    lengths = counts if limit is None else np.minimum(counts, limit)
    final = np.zeros_like(offsets)
    np.cumsum(lengths, out=final[1:])
    np.save(folder / "offsets.npy", final)
    written = {
        name: _allocate_npy(folder / f"{name}.npy", array.dtype, int(final[-1]))
        for name, array in grouped.items()
    }
    item_counts = np.zeros(len(remaining.items) - 1, dtype=np.int64)
    breaker = _tie_breaker(log, catalog, remaining, state)
    for first, last in user_blocks(offsets, 4 * state.chunk):
        low, high = offsets[first], offsets[last]
        order = _time_order(grouped["timestamps"][low:high], offsets[first : last + 1] - low)
        if breaker is not None:
            block_users = np.repeat(np.arange(first, last), counts[first:last])
            order = _with_ties_broken(breaker, grouped, block_users, slice(low, high), order)
        keep = _newest(offsets[first : last + 1], lengths[first:last])
        for name, array in grouped.items():
            block = np.asarray(array[low:high])
            block = block if order is None else block[order]
            block = block if keep is None else block[keep]
            written[name][final[first] : final[last]] = block
            if name == "items":
                item_counts += np.bincount(block, minlength=len(item_counts))
    if log.splits is not None:
        users = log.user_ids.filter(pa.array(remaining.users))
        _check_splits(written["splits"], final, users, state)
        if np.array_equal(written["splits"], leave_one_out_marks(final)):
            state.splits = LEAVE_ONE_OUT
            (folder / "splits.npy").unlink()
        else:
            state.splits = GIVEN
    item_ok = remaining.items[:-1] if state.config.keep_all_items else item_counts > 0
    if unused := int((item_ok & (item_counts == 0)).sum()):
        state.notes.append(
            f"{unused:,} items without events are kept; --no-keep-all-items leaves them out"
        )
    left_out = int((~item_ok & (item_counts == 0)).sum())
    if left_out and catalog.fields:
        state.notes.append(
            f"{left_out:,} items of the catalog without events (after filtering) are left out; "
            f"--keep-all-items keeps them, to serve them by their texts"
        )
    _renumber(written["items"], item_ok, state.chunk)
    for array in written.values():
        array.flush()
    state.counters |= {
        "users": len(lengths),
        "items": int(item_ok.sum()),
        "events": int(final[-1]),
        "users_dropped": len(log.user_ids) - len(lengths),
        "items_dropped": len(item_ok) - int(item_ok.sum()),
    }
    short = int((lengths < MIN_EVENTS).sum())
    if short and state.splits != GIVEN:
        state.notes.append(
            f"{short:,} users have fewer than {MIN_EVENTS} events; they are trained on "
            f"but cannot be evaluated"
        )
    return item_ok


def _check_splits(
    splits: npt.NDArray[np.int8], offsets: npt.NDArray[np.int64], users: pa.Array, state: _State
) -> None:
    """Refuse splits that a model of sequences would see through: a user's test events before his
    training events.
    """
    for at in range(0, max(len(splits) - 1, 0), state.chunk):
        block = np.asarray(splits[at : at + state.chunk + 1])
        falls = np.flatnonzero(block[1:] < block[:-1]) + at + 1
        places = np.searchsorted(offsets, falls)
        wrong = falls[offsets[places] != falls]
        if len(wrong):
            event = int(wrong[0])
            user = int(np.searchsorted(offsets, event, side="right")) - 1
            raise DataError(
                f"user {users[user].as_py()!r} has an event of {SPLITS[splits[event - 1]]} before "
                f"one of {SPLITS[splits[event]]}: these splits do not follow time, and a model "
                f"of sequences would be trained on what comes after its test; pass --splits none "
                f"to leave them aside, and split leave-one-out or by time"
            )


def _group_by_user(
    log: _Log, remaining: _Remaining, offsets: npt.NDArray[np.int64], state: _State
) -> dict[str, npt.NDArray[Any]]:
    """Scatter the events that stay to their users, in file order within each."""
    sources: dict[str, npt.NDArray[Any]] = {"items": log.items, "timestamps": log.times}
    if log.types is not None:
        sources["event_types"] = log.types
    if log.splits is not None:
        sources["splits"] = log.splits
    total = int(offsets[-1])
    grouped = {
        name: _allocate(state.work / f"grouped_{name}", array.dtype, total)
        for name, array in sources.items()
    }
    renumbered = np.cumsum(remaining.users) - 1
    cursor = offsets[:-1].copy()
    for at in log.chunks(state.chunk):
        users = np.asarray(log.users[at])
        alive = np.flatnonzero(remaining.users[users] & remaining.items[log.items[at]])
        users = renumbered[users[alive]]
        order = np.argsort(users, kind="stable")
        users = users[order]
        starts = np.flatnonzero(np.diff(users, prepend=-1))
        runs = np.diff(starts, append=len(users))
        places = np.arange(len(users)) + np.repeat(cursor[users[starts]] - starts, runs)
        cursor[users[starts]] += runs
        for name, array in sources.items():
            grouped[name][places] = np.asarray(array[at])[alive[order]]
        state.report.rows("events sorted", len(users))
    return grouped


def _time_order(
    times: npt.NDArray[np.float64], offsets: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64] | None:
    """Sort a block of whole users by time, stably; None if it is in order already."""
    times = np.asarray(times)
    falls = np.flatnonzero(times[1:] < times[:-1]) + 1
    if np.isin(falls, offsets).all():
        return None
    users = np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))
    order: npt.NDArray[np.int64] = np.lexsort((times, users))
    return order


def _tie_breaker(
    log: _Log, catalog: _Catalog, remaining: _Remaining, state: _State
) -> TieBreaker | None:
    config = state.config
    if config.ties == "item":
        return TieBreaker.by_item(catalog.ids)
    if config.ties == "hash":
        users = log.user_ids.filter(pa.array(remaining.users))
        return TieBreaker.by_hash(users, catalog.ids, state.event_types, config.ties_seed)
    return None


def _with_ties_broken(
    breaker: TieBreaker,
    grouped: dict[str, npt.NDArray[Any]],
    users: npt.NDArray[np.int64],
    at: slice,
    order: npt.NDArray[np.int64] | None,
) -> npt.NDArray[np.int64]:
    """Refine the order in time of a block of whole users; ``users``: [E], of each event."""
    order = np.arange(len(users)) if order is None else order
    arrays = {name: np.asarray(array[at])[order] for name, array in grouped.items()}
    times = arrays["timestamps"]
    if "splits" in arrays:  # an event stays in its split: only within one, equal times are a tie
        parts = arrays["splits"]
        starts = np.flatnonzero(
            (np.diff(users) != 0) | (np.diff(times) != 0) | (np.diff(parts) != 0)
        )
        times = np.zeros(len(times))
        times[starts + 1] = 1.0
        times = np.cumsum(times)
    return order[breaker.order(users, arrays["items"], times, arrays.get("event_types"))]


def _newest(offsets: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> Mask | None:
    """Mark the events of a block that are among each user's last ``lengths``; None if all are."""
    before = np.diff(offsets) - lengths
    if not before.any():
        return None
    runs = np.stack([before, lengths], axis=1).reshape(-1)
    return np.repeat(np.tile(np.array([False, True]), len(lengths)), runs)


def _renumber(items: npt.NDArray[np.int32], item_ok: Mask, chunk: int) -> None:
    if item_ok.all():
        return
    numbers = (np.cumsum(item_ok) - 1).astype(np.int32)
    for at in range(0, len(items), chunk):
        items[at : at + chunk] = numbers[items[at : at + chunk]]


def _allocate(path: Path, dtype: np.dtype[Any], length: int, offset: int = 0) -> Any:
    """Map a new array whose disk space is reserved: on a full disk, reserving raises an error,
    where writing to a map would kill the process.
    """
    with path.open("r+b" if offset else "w+b") as file:
        _reserve(file, offset + dtype.itemsize * length)
    return np.memmap(path, dtype, "r+", offset=offset, shape=(length,))


def _reserve(file: IO[bytes], size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:  # no such call on macOS and Windows
        file.truncate(size)


def _allocate_npy(path: Path, dtype: np.dtype[Any], length: int) -> Any:
    header = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        offset = file.tell()
    return _allocate(path, dtype, length, offset)


# ---------------------------------------------------------------- the folder


def _write_tables(log: _Log, catalog: _Catalog, users: Mask, items: Mask, folder: Path) -> None:
    user_ids = log.user_ids.filter(pa.array(users))
    table = pa.table({"user_id": user_ids})
    table = table.cast(pa.schema([("user_id", _string_type(table["user_id"]))]))
    write_parquet(table, folder / "users.parquet")
    write_parquet(catalog.table.filter(pa.array(items)), folder / "catalog.parquet")


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a table of a data set."""
    pq.write_table(table.combine_chunks(), path, compression="zstd", row_group_size=1 << 17)


def _write_meta(
    source: Source,
    catalog: _Catalog,
    folder: Path,
    state: _State,
    options: Mapping[str, Any],
    *,
    name: str,
    origin: str,
    order: EventOrder | None,
) -> None:
    arrays = [np.load(folder / f"{n}.npy", mmap_mode="r") for n in _array_names(state)]
    users = pq.read_table(folder / "users.parquet")["user_id"]
    table = pq.read_table(folder / "catalog.parquet", columns=["item_id", "text"])
    trimmed = pc.utf8_trim_whitespace(table["text"])
    textless = int(pc.sum(pc.equal(trimmed, "")).as_py() or 0)
    state.counters["items_without_text"] = textless
    if textless and source.catalog is not None:
        state.notes.append(
            f"{textless:,} items have no text; they can be read in a history but only their id "
            f"is known; use --drop-textless to drop them"
        )
    notes = [*state.notes, *dict.fromkeys(source.notes)]
    if state.splits_left_aside:
        notes.append("the splits that the log came with are left aside (--splits none)")
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "users": len(users),
        "items": len(table),
        "events": len(arrays[1]),
        "fingerprint": content_fingerprint(
            len(users), len(table), arrays, [users, table["item_id"], table["text"]]
        ),
        "fields": list(catalog.fields),
        "event_types": state.event_types,
        "splits": state.splits,
        "source": {
            "origin": origin,
            "format": source.format,
            "files": [{"name": f.name, "bytes": f.stat().st_size} for f in source.files],
            **({"parts": dict(source.parts)} if source.parts else {}),
        },
        "options": dict(options),
        "counters": state.counters,
        "notes": notes,
    }
    offsets, items, times = arrays[:3]
    order = order or order_of(meta, offsets, items, times, table["item_id"])
    meta["order"] = order.to_json()
    write_json(folder / "dataset.json", meta, error=DataError, remedy=ROOM)


def _array_names(state: _State) -> list[str]:
    names = ["offsets", "items", "timestamps"]
    if state.event_types:
        names.append("event_types")
    return [*names, "splits"] if state.splits == GIVEN else names


def may_write(out: Path) -> None:
    """Raise DataError for an ``out`` that is neither empty nor a data set to be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out} is a file, not a folder; choose another out")
    if (out / "dataset.json").is_file():
        with contextlib.suppress(ValueError, AttributeError):
            known = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
            if known.get("format") == FORMAT:
                return
    elif not any(out.iterdir()):
        return
    raise DataError(
        f"{out} exists and is not a prepared data set, so it is not overwritten; "
        f"choose another out or remove it"
    )


# ---------------------------------------------------------------- progress


class _Report:
    """Rows and rates on standard error: a live line on a terminal, else now and then."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, on: bool) -> None:
        self._on = on
        self._console = Console(stderr=True) if on else None
        self._live: Progress | None = None
        self._counts: dict[str, int] = {}
        self._since: dict[str, float] = {}
        self._printed = time.monotonic()

    def __enter__(self) -> _Report:
        if self._console is not None and self._console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed:,.0f}  {task.fields[rate]:,.0f}/s"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def rows(self, what: str, more: int) -> None:
        if not self._on:
            return
        now = time.monotonic()
        self._counts[what] = self._counts.get(what, 0) + more
        start = self._since.setdefault(what, now)
        rate = self._counts[what] / (now - start) if now > start else 0.0
        if self._live is not None:
            tasks = {task.description: task.id for task in self._live.tasks}
            task = tasks.get(what)
            if task is None:
                task = self._live.add_task(what, total=None, rate=0.0)
            self._live.update(task, completed=self._counts[what], rate=rate)
        elif now - self._printed >= self.SECONDS_BETWEEN_LINES:
            self._printed = now
            print(f"{what}: {self._counts[what]:,} ({rate:,.0f}/s)", file=sys.stderr)

    def notes(self, dataset: Dataset) -> None:
        """Print all warnings, once. The result is for who called."""
        if not self._on:
            return
        for note in dataset.meta["notes"]:
            print(f"note: {note}", file=sys.stderr)
        for line in dataset.order.lines():
            print(line, file=sys.stderr)
