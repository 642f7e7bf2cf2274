"""Search for items by words, for people who type: the texts of one loading of a run."""

from __future__ import annotations

__all__ = ["Items", "contains", "plain"]

import re
import unicodedata

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

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
                whole = contains(column, f" {word} ")
                begins = contains(column, f" {word}")
                points += 2.0 * whole + begins if column is texts else 0.5 * (whole + begins)
            hit = hit & (contains(texts, word) | contains(ids, word))
        rows = np.flatnonzero(hit)
        if not len(rows):
            return rows
        some = pa.array(rows)
        starts = pc.starts_with(texts.take(some), f" {query}").to_numpy(zero_copy_only=False)
        same = pc.equal(ids.take(some), f" {query} ").to_numpy(zero_copy_only=False)
        lengths = pc.binary_length(texts.take(some)).to_numpy(zero_copy_only=False)
        return rows[np.lexsort((rows, lengths, ~starts, -points[rows], ~same))]


def contains(column: pa.Array, part: str) -> npt.NDArray[np.bool_]:
    """Mark the strings that contain ``part``."""
    hits: npt.NDArray[np.bool_] = pc.match_substring(column, part).to_numpy(zero_copy_only=False)
    return hits
