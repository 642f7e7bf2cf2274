"""A prepared data set: event sequences and a catalog in one folder, opened without a scan.

    dataset.json      format version, counts, fingerprint, source, options, counters, notes, order
    offsets.npy       [U + 1] int64    events of user u: offsets[u]:offsets[u + 1]
    items.npy         [E] int32        item ints, oldest first within each user
    timestamps.npy    [E] float64      seconds (or whatever the source counts time in)
    event_types.npy   [E] int8         optional; names in dataset.json
    splits.npy        [E] int8         optional; 0 train, 1 valid, 2 test, as the log says
    users.parquet     user_id          row u is user int u
    catalog.parquet   item_id, raw text fields ..., text; row i is item int i; the last are cold
                      where dataset.json says so (l2rec.data.cold)

The arrays are memory-mapped, the two tables are read at first use: opening costs no scan.
``l2rec.data.prepare`` writes such folders.
"""

from __future__ import annotations

__all__ = ["FORMAT", "VERSION", "Dataset", "content_fingerprint", "open_dataset"]

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from l2rec.data.ids import as_ids
from l2rec.data.parts import MIN_EVENTS, TEST, VALID, with_validation
from l2rec.data.ragged import Ragged
from l2rec.data.ties import EventOrder, measure_order
from l2rec.errors import DataError, nearest

FORMAT = "l2rec-dataset"
GIVEN = "given"
"""Value of ``splits`` in dataset.json where splits.npy holds what the log says."""
VERSION = 1

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
EVENTS_AT_ONCE = 1 << 20
"""Events of a batch that is handed out, about."""
EVENT_COLUMNS = {"user_id": pa.string(), "item_id": pa.string(), "timestamp": pa.float64()}
BLOCK_EVENTS = 1 << 22  # events read at once when a statistic needs a scan


@dataclass(frozen=True, eq=False)
class Dataset:
    """Event sequences of U users over N items, and the catalog. Get one from `open_dataset`
    or `Dataset.from_frames`.

    ``offsets``: [U + 1] int64. ``items``: [E] int32. ``timestamps``: [E] float64, not
    descending within a user. ``event_types``: [E] int8 into ``event_type_names``, or None.
    ``splits``: [E] int8, 0 train, 1 valid, 2 test, not descending within a user; None where the
    log did not say, or said leave-one-out. ``fingerprint``: 16 hex digits over counts, events,
    splits, ids and texts. ``meta``: dataset.json.
    """

    path: Path
    name: str
    offsets: npt.NDArray[np.int64]
    items: npt.NDArray[np.int32]
    timestamps: npt.NDArray[np.float64]
    event_types: npt.NDArray[np.int8] | None
    splits: npt.NDArray[np.int8] | None
    fingerprint: str
    meta: dict[str, Any]

    def __reduce__(self) -> tuple[Callable[[Path], Dataset], tuple[Path]]:
        # A worker process maps the same files instead of receiving copies of the arrays.
        return open_dataset, (self.path,)

    @classmethod
    def from_frames(
        cls,
        events: Any,
        items: Any = None,
        out: str | Path | None = None,
        *,
        progress: bool = True,
        **options: Any,
    ) -> Dataset:
        """Prepare a data set from tables in memory, with the checks that files get.

        Args:
            events: a polars, pandas or pyarrow table of events. Columns ``user_id``, ``item_id``,
                ``timestamp`` and perhaps ``event_type``; or as ``options`` name them.
            items: likewise the catalog: the item's id, and columns that make its text.
            out: folder to write. By default a temporary one, deleted with the data set that is
                returned: give a folder if runs that are trained on it will be evaluated later.
            progress: report rows and notes on standard error.
            options: fields of `PrepareConfig`, such as ``k_core=5``, ``user="reviewer"``, or
                ``timestamp=None`` for events that are in order.

        Raises:
            DataError: something that is not a table, and whatever `prepare` refuses.
            ConfigError: an unknown option, or a value that is not allowed.
        """
        from l2rec.data.frames import prepare_frames  # which imports this module

        folder = None if out is None else Path(out)
        return prepare_frames(events, items, folder, options, progress=progress)

    @property
    def identity(self) -> dict[str, Any]:
        """What a report says of the data it is about: name, fingerprint, counts."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "users": self.n_users,
            "items": self.n_items,
            "events": self.n_events,
        }

    @property
    def n_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_items(self) -> int:
        return int(self.meta["items"])

    @property
    def n_cold(self) -> int:
        """How many items, the last of the catalog, are held out of training: `l2rec.data.cold`."""
        return int((self.meta.get("cold") or {}).get("items", 0))

    @property
    def n_warm(self) -> int:
        """How many items, the first of the catalog, training may know."""
        return self.n_items - self.n_cold

    @property
    def warm_catalog(self) -> pa.Table:
        """The catalog without cold items."""
        return self.catalog.slice(0, self.n_warm)

    def warm_items(self, user: int) -> npt.NDArray[np.integer]:
        """Return the item ints of a user that training may know, oldest first."""
        row = self.sequences[user]
        return row[row < self.n_warm]

    def warm(self, users: npt.NDArray[np.integer]) -> Ragged:
        """Return the rows of `warm_items` of many users, in the given order."""
        rows = self.sequences.take(users)
        known = rows.values < self.n_warm
        before = np.concatenate(([0], np.cumsum(known)))
        return Ragged(rows.values[known], before[rows.offsets])

    @property
    def n_events(self) -> int:
        return len(self.items)

    @property
    def event_type_names(self) -> list[str]:
        """Names that ``event_types`` points into; empty without event types."""
        return list(self.meta.get("event_types", []))

    @property
    def parts(self) -> dict[str, str]:
        """Fingerprints of the data sets that it was merged from, by name."""
        return dict((self.meta.get("source") or {}).get("parts", {}))

    @property
    def sequences(self) -> Ragged:
        """Item ints of each user, oldest first: ``Ragged(items, offsets)`` with U rows."""
        return Ragged(self.items, self.offsets)

    @cached_property
    def user_ids(self) -> pa.StringArray:
        """External user ids, row u for user int u."""
        return _one_array(_read_parquet(self.path / "users.parquet")["user_id"])

    @cached_property
    def catalog(self) -> pa.Table:
        """Row i is item int i: ``item_id``, the raw text fields, ``text``; all strings."""
        return _read_parquet(self.path / "catalog.parquet")

    @cached_property
    def item_ids(self) -> pa.StringArray:
        """External item ids, row i for item int i."""
        return _one_array(self.catalog["item_id"])

    def texts(self) -> list[str]:
        """Return one text per item, in item order; empty where an item has none."""
        texts: list[str] = self.catalog["text"].to_pylist()
        return texts

    def user_index(self, user_id: str) -> int:
        """Return the user int of an external id. Raises DataError if there is none."""
        index: int = pc.index(self.user_ids, pa.scalar(str(user_id), self.user_ids.type)).as_py()
        if index < 0:
            raise DataError(
                f"user {user_id!r} is not among the {self.n_users:,} users of data set "
                f"{self.name!r}{_nearest_id(str(user_id), self.user_ids)}"
            )
        return index

    def user_indices(self, ids: Sequence[str]) -> npt.NDArray[np.int32]:
        """Return user ints of external ids, [len(ids)] int32. Raises DataError for unknown ids."""
        return self._indices("user", ids, self.user_ids)

    def item_indices(self, ids: Sequence[str]) -> npt.NDArray[np.int32]:
        """Return item ints of external ids, [len(ids)] int32. Raises DataError for unknown ids."""
        return self._indices("item", ids, self.item_ids)

    def _indices(self, kind: str, ids: Sequence[str], known: pa.Array) -> npt.NDArray[np.int32]:
        """Return the places of ids among those that are known."""
        texts = as_ids(ids, f"{kind}s", f"{kind} ids")
        wanted = pa.array(texts, type=known.type)
        rows = pc.fill_null(pc.index_in(wanted, value_set=known), -1)
        indices: npt.NDArray[np.int32] = rows.to_numpy(zero_copy_only=False).astype(np.int32)
        unknown = list(dict.fromkeys(texts[i] for i in np.flatnonzero(indices < 0)))
        if unknown:
            shown = ", ".join(repr(i) for i in unknown[:5])
            more = f" and {len(unknown) - 5:,} more" if len(unknown) > 5 else ""
            named = f"{kind} {shown} is" if len(unknown) == 1 else f"{kind}s {shown}{more} are"
            raise DataError(
                f"{named} not among the {len(known):,} {kind}s of data set "
                f"{self.name!r}{_nearest_id(unknown[0], known)}"
            )
        return indices

    @cached_property
    def order(self) -> EventOrder:
        """Facts about the order of events; measured where an earlier version wrote none."""
        if "order" in self.meta:
            return EventOrder.of_json(self.meta["order"])
        return order_of(
            self.meta, self.offsets, self.items, self.timestamps, self.catalog["item_id"]
        )

    def describe(self) -> dict[str, Any]:
        """Return counts and distributions as plain JSON values. Scans all events once."""
        lengths = np.diff(self.offsets)
        texts = self.catalog["text"]
        has_text = pc.not_equal(pc.utf8_trim_whitespace(texts), "")
        words = pc.list_value_length(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(texts)))
        words = pc.if_else(has_text, words, 0)
        cells = self.n_users * self.n_items
        return {
            "name": self.name,
            "users": self.n_users,
            "items": self.n_items,
            "cold_items": self.n_cold,
            "events": self.n_events,
            "density": self.n_events / cells if cells else 0.0,
            "history_length": _quantiles(lengths),
            "text_characters": _quantiles(pc.utf8_length(texts).to_numpy()),
            "text_words": _quantiles(words.to_numpy()),
            "items_without_text": self.n_items - int(pc.sum(has_text).as_py() or 0),
            "users_evaluated": self.users_tested,
            "repeats_share": self._repeats() / self.n_events if self.n_events else 0.0,
            "event_types": self._event_type_counts(),
            "order": self.order.to_json(),
            "splits": self.meta.get("splits"),
            "fingerprint": self.fingerprint,
            "source": self.meta.get("source"),
            "options": self.meta.get("options"),
            "counters": self.meta.get("counters"),
            "notes": self.meta.get("notes"),
        }

    @property
    def users_tested(self) -> int:
        """Users who are tested where no split is named; 0 if there is nobody to validate."""
        if self.splits is None:
            return int((np.diff(self.offsets) >= MIN_EVENTS).sum())
        splits = with_validation(self.splits, self.offsets)

        def of(split: int) -> int:
            at = np.flatnonzero(splits == split)
            users = np.searchsorted(self.offsets, at, side="right") - 1
            return len(np.unique(users[at > self.offsets[users]]))

        return of(TEST) if of(VALID) else 0

    def event_batches(
        self,
        *,
        users: pa.Array | None = None,
        items: pa.Array | None = None,
        more: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Yield the events as user_id, item_id (string) and timestamp (float64): users in their
        order, about a million events at a time, no user cut.

        users, items: other names, [U] and [N]. more: further columns by name, [E] each.
        """
        users = self.user_ids if users is None else users
        items = self.item_ids if items is None else items
        for first, last in user_blocks(self.offsets, EVENTS_AT_ONCE):
            start, stop = int(self.offsets[first]), int(self.offsets[last])
            counts = np.diff(self.offsets[first : last + 1])
            columns = {
                "user_id": users.take(pa.array(np.repeat(np.arange(first, last), counts))),
                "item_id": items.take(pa.array(np.asarray(self.items[start:stop]))),
                "timestamp": pa.array(np.asarray(self.timestamps[start:stop])),
            }
            arrays = [columns[name].cast(kind) for name, kind in EVENT_COLUMNS.items()]
            arrays += [pa.array(np.asarray(of_all[start:stop])) for of_all in (more or {}).values()]
            yield pa.RecordBatch.from_arrays(arrays, [*EVENT_COLUMNS, *(more or {})])

    def _repeats(self) -> int:
        """Count the events whose user has an earlier event with the same item."""
        import polars as pl  # slow to import, and only this needs it

        repeats = 0
        for first, last in user_blocks(self.offsets, BLOCK_EVENTS):
            low, high = self.offsets[first], self.offsets[last]
            users = np.repeat(np.arange(last - first), np.diff(self.offsets[first : last + 1]))
            pairs = users * self.n_items + self.items[low:high]
            repeats += len(pairs) - pl.Series(pairs).n_unique()
        return repeats

    def _event_type_counts(self) -> dict[str, int]:
        if self.event_types is None:
            return {}
        counts = np.zeros(len(self.event_type_names), dtype=np.int64)
        for start in range(0, self.n_events, BLOCK_EVENTS):
            counts += np.bincount(
                self.event_types[start : start + BLOCK_EVENTS], minlength=len(counts)
            )
        return dict(zip(self.event_type_names, counts.tolist(), strict=True))


def open_dataset(path: str | Path) -> Dataset:
    """Open a prepared folder; its arrays are memory-mapped.

    Raises:
        DataError: it is missing, torn, of another version, or its parts disagree on the counts.
    """
    if not isinstance(path, str | Path):
        raise DataError(
            f"a data set is opened by its folder, not by a {type(path).__name__}; "
            "l2rec.Dataset.from_frames makes one of tables"
        )
    path = Path(path)
    meta = _read_meta(path)
    offsets = _load_array(path, "offsets.npy", np.dtype(np.int64))
    items = _load_array(path, "items.npy", np.dtype(np.int32))
    timestamps = _load_array(path, "timestamps.npy", np.dtype(np.float64))
    event_types = None
    if meta.get("event_types"):
        event_types = _load_array(path, "event_types.npy", np.dtype(np.int8))
        _same_count(path, "event_types.npy", len(event_types), meta["events"], "events")
    splits = None
    if meta.get("splits") == GIVEN:
        splits = _load_array(path, "splits.npy", np.dtype(np.int8))
        _same_count(path, "splits.npy", len(splits), meta["events"], "events")
    _same_count(path, "offsets.npy", len(offsets) - 1, meta["users"], "users")
    _same_count(path, "items.npy", len(items), meta["events"], "events")
    _same_count(path, "timestamps.npy", len(timestamps), meta["events"], "events")
    for file, what, column in (("users", "users", "user_id"), ("catalog", "items", "text")):
        rows, names = _parquet_shape(path / f"{file}.parquet")
        _same_count(path, f"{file}.parquet", rows, meta[what], what)
        if column not in names or (file == "catalog" and "item_id" not in names):
            raise DataError(
                f"{path / file}.parquet lacks the column {column!r}; it has {', '.join(names)}; "
                f"prepare the data set again"
            )
    if offsets[0] != 0 or offsets[-1] != len(items) or np.any(np.diff(offsets) < 0):
        raise DataError(
            f"{path / 'offsets.npy'} does not cut the {len(items):,} events into users; "
            f"prepare the data set again"
        )
    return Dataset(
        path=path,
        name=meta["name"],
        offsets=offsets,
        items=items,
        timestamps=timestamps,
        event_types=event_types,
        splits=splits,
        fingerprint=meta["fingerprint"],
        meta=meta,
    )


def content_fingerprint(
    n_users: int,
    n_items: int,
    arrays: Sequence[npt.NDArray[Any]],
    columns: Sequence[pa.ChunkedArray],
) -> str:
    """Hash counts, the arrays' bytes and the columns' strings; return 16 hex digits.

    Independent of how files are compressed and of how columns are chunked.
    """
    digest = hashlib.blake2b(f"{VERSION} {n_users} {n_items}".encode())
    for array in arrays:
        digest.update(f" {array.dtype.str} {len(array)} ".encode())
        for start in range(0, len(array), BLOCK_EVENTS):
            digest.update(np.ascontiguousarray(array[start : start + BLOCK_EVENTS]).data)
    for column in columns:
        lengths, contents = hashlib.blake2b(), hashlib.blake2b()
        for chunk in column.chunks:
            strings = pc.fill_null(chunk.cast(pa.large_string()), "")
            ends = np.frombuffer(strings.buffers()[1], dtype=np.int64)
            ends = ends[strings.offset : strings.offset + len(strings) + 1]
            if not len(strings):
                continue
            lengths.update(np.diff(ends).data)
            data = strings.buffers()[2]
            if data is not None:
                contents.update(memoryview(data)[ends[0] : ends[-1]])
        digest.update(lengths.digest() + contents.digest())
    return digest.hexdigest()[:16]


def order_of(
    meta: dict[str, Any],
    offsets: npt.NDArray[np.int64],
    items: npt.NDArray[np.int32],
    timestamps: npt.NDArray[np.float64],
    item_ids: pa.ChunkedArray,
) -> EventOrder:
    """Measure the facts about the order of events; ``meta``: dataset.json, without them."""
    counters = meta.get("counters", {})
    read = counters.get("events_read", len(items)) + counters.get("events_left_out", 0)
    return measure_order(
        offsets,
        timestamps,
        items,
        item_ids,
        user_blocks(offsets, BLOCK_EVENTS),
        ties=meta.get("options", {}).get("ties", "file"),
        log_events=read,
    )


def user_blocks(offsets: npt.NDArray[np.int64], events: int) -> Iterator[tuple[int, int]]:
    """Yield ranges (first, last) of users, each of about ``events`` events; no user is cut."""
    n_users = len(offsets) - 1
    first = 0
    while first < n_users:
        limit = offsets[first] + events
        last = max(first + 1, int(np.searchsorted(offsets, limit, side="right")) - 1)
        yield first, min(last, n_users)
        first = last


def _read_meta(path: Path) -> dict[str, Any]:
    file = path / "dataset.json"
    if not file.is_file():
        missing = "has no dataset.json" if path.is_dir() else "does not exist"
        raise DataError(
            f"{path} {missing}, so it is not a prepared data set; make one with "
            f"`l2rec prepare SOURCE --out {path}`"
        )
    try:
        meta: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        known = meta["format"] == FORMAT
        version = meta["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} cannot be read ({error}); prepare the data set again") from error
    if not known or version != VERSION:
        raise DataError(
            f"{file} has format {meta['format']!r} version {version}; this l2rec reads "
            f"{FORMAT!r} version {VERSION}; prepare the data set again"
        )
    absent = [k for k in ("name", "users", "items", "events", "fingerprint") if k not in meta]
    if absent:
        raise DataError(f"{file} lacks {', '.join(absent)}; prepare the data set again")
    return meta


def _load_array(path: Path, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    file = path / name
    try:
        array: npt.NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        state = "is torn" if file.exists() else "is missing"
        raise DataError(f"{file} {state} ({error}); prepare the data set again") from error
    if array.dtype != dtype or array.ndim != 1:
        raise DataError(
            f"{file} holds {array.dtype} of shape {array.shape}, not {dtype} of one dimension; "
            f"prepare the data set again"
        )
    return array


def _parquet_shape(file: Path) -> tuple[int, list[str]]:
    try:
        footer = pq.read_metadata(file)
    except (OSError, pa.ArrowInvalid) as error:
        state = "is torn" if file.exists() else "is missing"
        reason = str(error).splitlines()[0]
        raise DataError(f"{file} {state} ({reason}); prepare the data set again") from error
    return footer.num_rows, list(footer.schema.names)


def _read_parquet(file: Path) -> pa.Table:
    try:
        return pq.ParquetFile(file).read()
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{file} is torn ({reason}); prepare the data set again") from error


def _same_count(path: Path, file: str, found: int, expected: int, what: str) -> None:
    if found != expected:
        raise DataError(
            f"{path / file} has {found:,} {what}, dataset.json says {expected:,}; "
            f"prepare the data set again"
        )


def _one_array(column: pa.ChunkedArray) -> pa.StringArray:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _nearest_id(wanted: str, ids: pa.StringArray) -> str:
    # Edit distance to millions of ids takes minutes; ids with the same start will do.
    start = wanted[: max(1, len(wanted) // 2)]
    alike = ids if len(ids) <= 20_000 else ids.filter(pc.starts_with(ids, pattern=start))
    return nearest(wanted, alike[:20_000].to_pylist())


def _quantiles(values: npt.NDArray[Any]) -> dict[str, float]:
    if not len(values):
        return {}
    quantiles = np.quantile(values, QUANTILES)
    named = {f"q{round(100 * q):02d}": float(v) for q, v in zip(QUANTILES, quantiles, strict=True)}
    return {"mean": float(np.mean(values)), **named}
