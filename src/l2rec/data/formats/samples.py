"""Samples, each an item with the history before it, put together to the sequences they come from.

Of a log that was cut into samples, every event but the first of a user is the item of one row, and
the history of that row holds the events before it, or the newest of them. So a user's sequence is
the history of the earliest row and then the items of all rows, oldest first. Which row is the
earliest is told by the lengths of the histories, since files have rows in either order; that the
rows belong together is told by each history, which has to end where the rows before it do. Where
rows were left out, the histories of later ones fill in what they can.

In memory are four bytes for each item of a history, and about forty for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from l2rec.data.formats.source import Context, event_batch
from l2rec.errors import DataError

Ints = npt.NDArray[np.signedinteger[Any]]
SHOWN = 5
"""Items of a history that a message shows."""


@dataclass(frozen=True)
class Block:
    """Samples of a part of one file, R rows.

    ``split``: of the file, as a place in `SPLITS`. ``users``, ``items``: strings. ``histories``:
    lists of strings, oldest first.
    """

    split: int
    users: pa.Array
    items: pa.Array
    histories: pa.Array


@dataclass(frozen=True)
class Samples:
    """All samples of a log, R rows with H items of histories, ids as ints.

    ``users``, ``items``, ``splits``: [R]; ``rows``: [R], places in the file of the split;
    ``history``: [H], that of row r from ``starts[r]`` to ``starts[r + 1]``.
    """

    user_ids: pa.Array
    item_ids: pa.Array
    users: Ints
    items: Ints
    splits: npt.NDArray[np.int8]
    rows: Ints
    history: Ints
    starts: Ints

    @classmethod
    def of(cls, blocks: Iterable[Block]) -> Samples:
        """Gather the blocks of the train, valid and test file, in this order."""
        users, words, lengths, splits = [], [], [], []
        for block in blocks:
            if not len(block.users):
                continue
            users.append(block.users.cast(pa.string()).dictionary_encode())
            past, items = (
                array.cast(pa.string()) for array in (block.histories.flatten(), block.items)
            )
            words.append(pa.concat_arrays([past, items]).dictionary_encode())
            lengths.append(block.histories.value_lengths().to_numpy(zero_copy_only=False))
            splits.append(np.full(len(block.users), block.split, dtype=np.int8))
        user_ids, codes = _numbered(users)
        item_ids, word_codes = _numbered(words)
        sizes = [len(part) for part in lengths]
        split = np.concatenate([np.empty(0, np.int8), *splits])
        starts = np.concatenate([[0], np.cumsum(np.concatenate([np.empty(0, int), *lengths]))])
        past_codes = [part[:-size] for part, size in zip(word_codes, sizes, strict=True)]
        item_codes = [part[-size:] for part, size in zip(word_codes, sizes, strict=True)]
        counts = np.bincount(split, minlength=3)
        return cls(
            user_ids,
            item_ids,
            users=np.concatenate([np.empty(0, np.int32), *codes]),
            items=np.concatenate([np.empty(0, np.int32), *item_codes]),
            splits=split,
            rows=np.concatenate([np.arange(count) for count in counts]),
            history=np.concatenate([np.empty(0, np.int32), *past_codes]),
            starts=starts.astype(np.int64),
        )

    def by_position(self) -> bool:
        """Tell whether each user has one valid and one test row: the last two events, not times."""
        counts = [
            np.bincount(self.users[self.splits == split], minlength=len(self.user_ids))
            for split in (1, 2)
        ]
        return bool((np.stack(counts) == 1).all())


def _numbered(parts: list[pa.Array]) -> tuple[pa.Array, list[Ints]]:
    """Give the parts one dictionary; return it and the place in it of each value of each part."""
    if not parts:
        return pa.array([], pa.string()), []
    whole = pa.chunked_array(parts).unify_dictionaries()
    codes = [chunk.indices.to_numpy() for chunk in whole.chunks]
    return whole.chunk(0).dictionary, codes


def sequences(
    samples: Samples, where: Callable[[int, int], str], context: Context
) -> Iterator[pa.RecordBatch]:
    """Yield the events that the samples tell of, user by user, oldest first, with their splits.

    The time of an event is its place in what is yielded. A user's first events, which are in
    histories alone, are of the train split. ``where``: names the line of a row, by its split and
    its place in the file.

    Raises:
        DataError: a history contradicts the rows before it, or splits go back in time.
    """
    joining = _Joining(samples, where)
    order = _in_time(samples, joining.by_position)
    bounds = np.flatnonzero(np.diff(samples.users[order], prepend=-1, append=-1)).tolist()
    room = max(1, context.block_bytes // 32)  # an event takes about so many bytes
    total = 0
    events: list[tuple[int, int, int, int]] = []
    for first, last in pairwise(bounds):
        events += joining.sequence(order[first:last])
        if len(events) >= room or last == bounds[-1]:
            yield _batch(samples, np.array(events), total, where)
            total += len(events)
            events = []
    context.notes.extend(joining.notes())


def _batch(
    samples: Samples, events: Ints, first: int, where: Callable[[int, int], str]
) -> pa.RecordBatch:
    """Return a batch of events [E, 4]: user, item, split, row of the samples."""
    users, items, splits, rows = events.T

    def line(event: int) -> str:
        row = rows[event]
        return where(int(samples.splits[row]), int(samples.rows[row]))

    times = np.arange(first, first + len(events), dtype=np.float64)
    return event_batch(
        samples.user_ids.take(pa.array(users)),
        samples.item_ids.take(pa.array(items)),
        pa.array(times),
        None,
        line,
        splits=pa.array(splits.astype(np.int8)),
    )


def _in_time(samples: Samples, by_position: bool) -> Ints:
    """Order rows by user, split and time. A file may have the rows of a user newest first."""
    lengths = np.diff(samples.starts)
    place = samples.rows.copy()
    for split in range(3):
        at = np.flatnonzero(samples.splits == split)
        grouped = at[np.argsort(samples.users[at], kind="stable")]
        steps = np.diff(lengths[grouped])[np.diff(samples.users[grouped]) == 0]
        if (steps < 0).sum() > (steps > 0).sum():
            place[at] *= -1
    rank = np.arange(len(samples.user_ids))
    if by_position:  # the test file has all users, in the order of the log
        rank[samples.users[samples.splits == 2]] = np.arange(len(rank))
    order: Ints = np.lexsort((place, lengths, samples.splits, rank[samples.users]))
    return order


class _Joining:
    """Joins the rows of each user to a sequence, and counts what cannot be had."""

    def __init__(self, samples: Samples, where: Callable[[int, int], str]) -> None:
        self._samples = samples
        self._where = where
        self.by_position = samples.by_position()
        self._longest = int(np.diff(samples.starts).max(initial=0))
        self._cut = False  # whether some history is shorter than the events before its item
        self._beginnings = 0
        self._breaks = 0
        self._filled = 0

    def sequence(self, rows: Ints) -> list[tuple[int, int, int, int]]:
        """Return a user's events (user, item, split, row), of rows in the order of time."""
        samples = self._samples
        user = int(samples.users[rows[0]])
        items: list[int] = []
        events: list[tuple[int, int, int, int]] = []
        split = 0
        targets, splits = samples.items[rows].tolist(), samples.splits[rows].tolist()
        starts, ends = samples.starts[rows].tolist(), samples.starts[rows + 1].tolist()
        for row, target, of, start, end in zip(
            rows.tolist(), targets, splits, starts, ends, strict=True
        ):
            history = samples.history[start:end].tolist()
            new = history[self._known(items, history, row) :]
            self._cut |= len(items) + len(new) > len(history)
            if items:
                self._filled += len(new)
            elif len(history) == self._longest:
                self._beginnings += 1
            events += [(user, item, split, row) for item in new]
            events.append((user, target, split := of, row))
            items += [*new, target]
        return events

    def _known(self, items: list[int], history: list[int], row: int) -> int:
        """Return how many of the first items of a history the user's sequence ends with."""
        if not items:
            return 0
        if len(history) < self._longest:  # so it was not cut, and holds everything
            if history[: len(items)] == items:
                return len(items)
            raise self._contradiction(items, history, row)
        for size in range(min(len(items), len(history)), 0, -1):
            if items[-size:] == history[:size]:
                return size
        size = len(history)
        again = any(items[at : at + size] == history for at in range(len(items) - size))
        if again or self.by_position:  # where no row is left out
            raise self._contradiction(items, history, row)
        self._breaks += 1
        return 0

    def _contradiction(self, items: list[int], history: list[int], row: int) -> DataError:
        samples = self._samples
        user = samples.user_ids[int(samples.users[row])].as_py()
        line = self._where(int(samples.splits[row]), int(samples.rows[row]))
        size = len(history)
        if any(items[at : at + size] == history for at in range(len(items) - size + 1)):
            return DataError(
                f"{line}: the history of user {user} ({self._shown(history)}) ends before events "
                f"of rows of the same split or of one before it ({self._shown(items)}); splits "
                f"that are given may not go back in time, nor may a row stand twice; prepare the "
                f"log that the samples were made from (one event in each row)"
            )
        return DataError(
            f"{line}: the history of user {user} ({self._shown(history)}) contradicts the rows "
            f"before it in train, valid and test, which tell of the events "
            f"{self._shown(items)}; repair the row, or prepare the log that the samples were made "
            f"from (one event in each row)"
        )

    def _shown(self, items: list[int]) -> str:
        names = [str(self._samples.item_ids[item].as_py()) for item in items[-SHOWN:]]
        return ("..., " if len(items) > SHOWN else "") + ", ".join(names)

    def notes(self) -> list[str]:
        """Say how the log was split, and what of it cannot be had."""
        notes = [
            "the splits that are given are by position: each user's last event is test, the one "
            "before it valid"
            if self.by_position
            else "the splits that are given are not by position (by time over all users, most "
            "likely): a user may have several events in valid and test, or none"
        ]
        if self._filled:
            notes.append(
                f"{self._filled:,} events stand in the history of a later row alone, since their "
                f"own row is not there; they are of the split of the event before them"
            )
        if self._beginnings and self._cut:
            notes.append(
                f"{self._beginnings:,} users may have lost their earliest events: histories are "
                f"cut to {self._longest} items, and that of their first row is full"
            )
        if self._breaks:
            notes.append(
                f"events are missing in {self._breaks:,} places between two rows of a user, where "
                f"the later history (cut to {self._longest} items) does not reach back to the "
                f"earlier row"
            )
        return notes
