"""Users of the data set that a run was made on, if it is still where it was."""

from __future__ import annotations

__all__ = ["People", "Person"]

import bisect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from l2rec.data.dataset import Dataset
from l2rec.data.parts import MIN_EVENTS
from l2rec.data.ragged import IntArray
from l2rec.errors import L2RecError
from l2rec.runs.folder import open_run_dataset
from l2rec.service.attributes import Rows
from l2rec.service.search import contains

logger = logging.getLogger("l2rec.service")


@dataclass(frozen=True)
class Person:
    """A user of a data set.

    history: item ids, oldest first. next: item of the newest event, which the model was not trained
    on; None for a user with too few events for a test.
    """

    id: str
    history: list[str]
    next: str | None


class People:
    """Users of a run's data set; none if it was moved or changed."""

    def __init__(self, run: Path | None) -> None:
        self._run = run

    @cached_property
    def _data(self) -> Dataset | None:
        if self._run is None:
            return None
        try:
            return open_run_dataset(self._run, None)
        except L2RecError as error:
            logger.warning("users of the data set of %s are not known: %s", self._run.name, error)
            return None

    @cached_property
    def _ids(self) -> pa.Array:
        assert self._data is not None
        return self._data.user_ids

    def find(self, words: str, limit: int) -> list[tuple[str, int]]:
        """Return (id, number of events) of the users whose id contains ``words``.

        Those whose id begins with it come first.
        """
        if self._data is None:
            return []
        words = words.strip()
        lengths = self._data.sequences.lengths
        some = lengths > 0
        if words:
            ids = self._ids
            inside = contains(ids, words) & some
            begins = pc.starts_with(ids, words).to_numpy(zero_copy_only=False) & some
            rows = np.concatenate((np.flatnonzero(begins), np.flatnonzero(inside & ~begins)))
        else:
            rows = np.flatnonzero(some)
        return [(self._ids[int(r)].as_py(), int(lengths[r])) for r in rows[:limit]]

    @cached_property
    def _order(self) -> Rows:
        """Rows in order of their ids."""
        order: Rows = pc.sort_indices(self._ids).to_numpy()
        return order

    def _row(self, user: str) -> int | None:
        """Return the row of a user with events; by halving, since there may be millions."""
        if self._data is None:
            return None
        ids, order = self._ids, self._order
        place = bisect.bisect_left(order, user, key=lambda row: ids[int(row)].as_py())
        if place == len(order) or ids[int(order[place])].as_py() != user:
            return None
        row = int(order[place])
        return row if self._data.sequences.lengths_of(np.array([row]))[0] else None

    def get(self, user: str, most: int) -> Person | None:
        """Return a user with the newest ``most`` items of the history, or None."""
        row = self._row(user)
        if row is None or self._data is None:
            return None
        items = self._data.sequences[row]
        tested = len(items) >= MIN_EVENTS
        history = items[: len(items) - tested][-most:]
        return Person(user, self._names(history), self._names(items[-1:])[0] if tested else None)

    def history(self, user: str, most: int, before: float | None = None) -> list[str]:
        """Return the newest ``most`` items of a user, all events included, or only those before a
        time, in seconds since 1970; none of a user who is not known.
        """
        row = self._row(user)
        if row is None or self._data is None:
            return []
        items = self._data.sequences[row]
        if before is not None:
            start, stop = self._data.offsets[row : row + 2]
            before *= self._per_second
            items = items[: np.searchsorted(self._data.timestamps[start:stop], before)]
        return self._names(items[-most:])

    def seen(self, user: str) -> set[str]:
        """Return all items of a user; none of a user who is not known."""
        row = self._row(user)
        if row is None or self._data is None:
            return set()
        return set(self._names(np.unique(self._data.sequences[row])))

    @cached_property
    def newest(self) -> float | None:
        """Time of the newest event, in seconds since 1970; None without one."""
        if self._data is None or not len(self._data.timestamps):
            return None
        return float(self._data.timestamps.max()) / self._per_second

    @property
    def _per_second(self) -> float:
        """How many of the data set's unit of time are a second."""
        assert self._data is not None
        return self._data.order.per_second or 1.0

    def _names(self, items: IntArray) -> list[str]:
        assert self._data is not None
        return [self._data.item_ids[int(item)].as_py() for item in items]

    def counts(self, users: Sequence[str] | None = None) -> dict[str, int]:
        """Count the events of each item that has any: of all users, or of these."""
        if self._data is None:
            return {}
        sequences = self._data.sequences
        if users is not None:
            wanted = pa.array(list(users), self._ids.type)
            rows = pc.index_in(wanted, value_set=self._ids).drop_null().to_numpy()
            sequences = sequences.take(rows.astype(np.int64))
        often = np.bincount(sequences.values, minlength=self._data.n_items)
        some = np.flatnonzero(often)
        return dict(zip(self._names(some), often[some].tolist(), strict=True))
