"""The events of a log as they come: ids to ints, into temporary files, mapped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from l2rec.data.formats.source import Source
from l2rec.data.preparation.config import PrepareConfig
from l2rec.data.preparation.state import Ints, State
from l2rec.data.ties import per_second_of, unit_of
from l2rec.errors import DataError, nearest

CHUNK_EVENTS = 1 << 20
MOST_CHUNKS = 8
"""Read at once where there are many users: a column of Arrow strings ends at 2^31 bytes."""


@dataclass(frozen=True)
class Log:
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


class Ids:
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


def read_events(source: Source, known_items: pa.Array | None, state: State) -> Log:
    """Read all events, number their users and items, and map them.

    ``known_items``: ids of the catalog, in its order; None: items are numbered as they appear.

    Raises:
        DataError: no event, none of a type that is asked for, too many types, or items that the
            catalog does not have.
    """
    users, items, types = Ids(), Ids(known_items), Ids()
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
    return Log(
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

    def tell(self, source: Source, total: int, state: State) -> None:
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
