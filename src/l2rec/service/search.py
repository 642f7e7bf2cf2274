"""Search for items by words and for users by their ids, for people who type.

- `Items`: the texts of one loading of a run, prepared once and extended as items come
- `People`: the users of a run's data set, if it is still where it was
"""

from __future__ import annotations

__all__ = ["Items", "People", "Person", "plain"]

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from l2rec.data.dataset import Dataset
from l2rec.data.parts import MIN_EVENTS
from l2rec.errors import L2RecError
from l2rec.runs.folder import open_run_dataset
from l2rec.service.version import Version

Rows = npt.NDArray[np.int64]

WORDS = 16
"""Words of a query that are searched for; the others are ignored."""


def plain(text: str) -> str:
    """Fold a text: lower case, no accents, one space for whatever is neither letter nor digit."""
    folded = unicodedata.normalize("NFKD", text.casefold())
    bare = "".join(c for c in folded if not unicodedata.combining(c)) if folded else ""
    return re.sub(r"[\W_]+", " ", bare).strip()


class Items:
    """Search index over the ids and texts of one loading of a run (a `Version.serial`).

    A row never changes its item, so that versions with more items only add rows.
    """

    def __init__(self, serial: int) -> None:
        self.serial = serial
        self._ids = self._texts = pa.array([], pa.large_string())

    def __len__(self) -> int:
        return len(self._ids)

    def extend(self, version: Version) -> None:
        """Add the rows that are new since the last call. Not safe in two threads at once."""
        assert version.serial == self.serial
        new = slice(len(self), len(version))
        # With a space on both sides, " word" is the beginning of a word, and " word " a whole one.
        ids = pa.array([f" {plain(i)} " for i in version.ids[new]], pa.large_string())
        texts = pa.array([f" {plain(t)} " for t in version.texts[new]], pa.large_string())
        self._texts = pa.concat_arrays([self._texts, texts])
        self._ids = pa.concat_arrays([self._ids, ids])

    def find(self, version: Version, words: str) -> Rows:
        """Return the rows of items that have every word in their text or id, best first.

        An id equal to the query comes first; then items with more of the words as whole words or
        as beginnings of words; among equals, texts that begin with the query, then shorter texts.
        """
        n = len(version)
        served = ~version.hidden
        query = plain(words)
        wanted = list(dict.fromkeys(query.split()))[:WORDS]
        if not wanted:
            return np.flatnonzero(served)
        ids, texts = self._ids[:n], self._texts[:n]
        hit, points = served, np.zeros(n)
        for word in wanted:
            for column in (texts, ids):
                whole = _has(column, f" {word} ")
                begins = _has(column, f" {word}")
                points += 2.0 * whole + begins if column is texts else 0.5 * (whole + begins)
            hit = hit & (_has(texts, word) | _has(ids, word))
        rows = np.flatnonzero(hit)
        if not len(rows):
            return rows
        some = pa.array(rows)
        starts = pc.starts_with(texts.take(some), f" {query}").to_numpy(zero_copy_only=False)
        same = pc.equal(ids.take(some), f" {query} ").to_numpy(zero_copy_only=False)
        lengths = pc.binary_length(texts.take(some)).to_numpy(zero_copy_only=False)
        return rows[np.lexsort((rows, lengths, ~starts, -points[rows], ~same))]


def _has(column: pa.Array, part: str) -> npt.NDArray[np.bool_]:
    hits: npt.NDArray[np.bool_] = pc.match_substring(column, part).to_numpy(zero_copy_only=False)
    return hits


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
        except L2RecError:
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
            inside = _has(ids, words) & some
            begins = pc.starts_with(ids, words).to_numpy(zero_copy_only=False) & some
            rows = np.concatenate((np.flatnonzero(begins), np.flatnonzero(inside & ~begins)))
        else:
            rows = np.flatnonzero(some)
        return [(self._ids[int(r)].as_py(), int(lengths[r])) for r in rows[:limit]]

    def get(self, user: str, most: int) -> Person | None:
        """Return a user with the newest ``most`` items of the history, or None."""
        if self._data is None:
            return None
        row = pc.index(self._ids, pa.scalar(user, self._ids.type)).as_py()
        if row < 0 or not self._data.sequences.lengths[row]:
            return None
        ids, items = self._data.item_ids, self._data.sequences[row]
        tested = len(items) >= MIN_EVENTS
        history = items[: len(items) - tested][-most:]
        return Person(
            user,
            [ids[int(i)].as_py() for i in history],
            ids[int(items[-1])].as_py() if tested else None,
        )
