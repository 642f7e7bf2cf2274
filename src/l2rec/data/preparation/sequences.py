"""The sequences of users: grouped by counting, sorted by time, cut to the newest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from l2rec.data.dataset import GIVEN, user_blocks
from l2rec.data.parts import MIN_EVENTS, SPLITS, leave_one_out_marks
from l2rec.data.preparation.events import Log
from l2rec.data.preparation.filtering import Remaining
from l2rec.data.preparation.items import RawCatalog
from l2rec.data.preparation.state import Mask, State
from l2rec.data.splits import LEAVE_ONE_OUT
from l2rec.data.ties import TieBreaker
from l2rec.errors import DataError


def write_sequences(
    log: Log, catalog: RawCatalog, remaining: Remaining, folder: Path, state: State
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
    splits: npt.NDArray[np.int8], offsets: npt.NDArray[np.int64], users: pa.Array, state: State
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
    log: Log, remaining: Remaining, offsets: npt.NDArray[np.int64], state: State
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
    log: Log, catalog: RawCatalog, remaining: Remaining, state: State
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
