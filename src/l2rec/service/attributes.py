"""Attributes of items, by which answers can be filtered."""

from __future__ import annotations

__all__ = ["Attributes"]

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from l2rec.data.catalog import Catalog
from l2rec.errors import DataError, nearest

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]


class Attributes:
    """Attributes of the items of a catalog, by row.

    Several values of one item stand in its string with ``|`` between them, or with what the column
    of the catalog says. Where that is a blank, commas come before it: RecBole's ``token_seq`` are
    words between blanks, but some of its files have lists between commas in them.

    Args:
        rows: number of items, N.
        columns: [N] strings by name of the attribute.
        separators: what else stands between values, by name of the attribute.
    """

    MOST = 64
    """Attributes in all, unless the catalog has more."""

    def __init__(
        self,
        rows: int,
        columns: Mapping[str, pa.Array],
        separators: Mapping[str, str] | None = None,
    ) -> None:
        self._rows, self._columns, self._separators = rows, dict(columns), dict(separators or {})
        self._parts: dict[str, tuple[pa.Array, Rows]] = {}

    @classmethod
    def of_catalog(cls, catalog: Catalog) -> Attributes:
        """Take the raw fields of a catalog, empty where they are missing."""
        columns = {
            name: pc.fill_null(catalog.table[name].cast(pa.string()), "").combine_chunks()
            for name in catalog.fields
        }
        return cls(len(catalog), columns, catalog.separators)

    @property
    def names(self) -> list[str]:
        """Names of the attributes."""
        return list(self._columns)

    def __len__(self) -> int:
        return self._rows

    def of(self, row: int) -> dict[str, str]:
        """Return the attributes of one item without the empty ones."""
        values = {name: column[row].as_py() for name, column in self._columns.items()}
        return {name: value for name, value in values.items() if value}

    def check(self, names: Iterable[str]) -> None:
        """Check that all attributes exist.

        Raises:
            DataError: one does not; the message names those that do.
        """
        for name in names:
            if name not in self._columns:
                known = ", ".join(self.names) or "none"
                raise DataError(
                    f"no attribute {name!r}{nearest(name, self.names)} (the catalog has: {known})"
                )

    def mask(self, filters: Mapping[str, Sequence[str]]) -> Mask:
        """Return the [N] bool mask of items that have one of the values of each filter: as their
        whole string, or among its values.

        Raises:
            DataError: there is no such attribute.
        """
        self.check(filters)
        mask = np.ones(len(self), dtype=np.bool_)
        for name, values in filters.items():
            parts, row = self._split(name)
            wanted = pa.array(list(values), pa.string())
            hit = pc.is_in(parts, value_set=wanted).to_numpy(zero_copy_only=False)
            one = pc.is_in(self._columns[name], value_set=wanted).to_numpy(zero_copy_only=False)
            one = one.copy()
            one[row[hit]] = True
            mask &= one
        return mask

    def parts(self, name: str, value: str) -> list[str]:
        """Return the values in a string of a column."""
        listed = self._listed(name, pa.array([value], pa.string()))
        return [part for part in listed[0].as_py().split("|") if part]

    def values(self, name: str, served: Mask, most: int) -> tuple[list[tuple[str, int]], int]:
        """Return the commonest values of an attribute with the number of items that have each, at
        most ``most`` and commonest first, and how many values there are.

        served: [N] bool, the items that are counted.
        """
        parts, rows = self._split(name)
        wanted = pc.and_(pa.array(served[rows]), pc.not_equal(parts, ""))
        counts = pa.Table.from_struct_array(pc.value_counts(parts.filter(wanted)))
        order = [("counts", "descending"), ("values", "ascending")]
        first = counts.take(pc.sort_indices(counts, order)[:most])
        found = zip(first["values"].to_pylist(), first["counts"].to_pylist(), strict=True)
        return list(found), len(counts)

    def _split(self, name: str) -> tuple[pa.Array, Rows]:
        """Return the values of a column and the row of each; a column is split once."""
        if name not in self._parts:
            lists = pc.split_pattern(self._listed(name, self._columns[name]), "|")
            rows = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
            self._parts[name] = (pc.list_flatten(lists), rows.astype(np.int64))
        return self._parts[name]

    def _listed(self, name: str, column: pa.Array) -> pa.Array:
        """Return strings of a column with ``|`` between their values."""
        separator = self._separators.get(name)
        if separator is None:
            return column
        listed = pc.replace_substring(column, separator, "|")
        if separator == " ":
            commas = pc.replace_substring_regex(column, r",\s*", "|")
            listed = pc.if_else(pc.match_substring(column, ","), commas, listed)
        return pc.if_else(pc.match_substring(column, "|"), column, listed)

    def changed(self, rows: Mapping[int, Mapping[str, str]]) -> Attributes:
        """Return a copy in which these rows have these attributes and no others.

        Raises:
            DataError: more than `MOST` attributes.
        """
        if not rows:
            return self
        at = sorted(rows)
        mask = np.zeros(len(self), dtype=np.bool_)
        mask[at] = True
        return self._with(
            rows.values(),
            lambda name, known: pc.replace_with_mask(
                known, mask, pa.array([rows[row].get(name, "") for row in at], pa.string())
            ),
            len(self),
        )

    def extended(self, rows: Sequence[Mapping[str, str]]) -> Attributes:
        """Return a copy with these rows at the end.

        Raises:
            DataError: more than `MOST` attributes.
        """
        return self._with(
            rows,
            lambda name, known: pa.concat_arrays(
                [known, pa.array([row.get(name, "") for row in rows], pa.string())]
            ),
            len(self) + len(rows),
        )

    def _with(
        self,
        fresh: Iterable[Mapping[str, str]],
        column: Callable[[str, pa.Array], pa.Array],
        rows: int,
    ) -> Attributes:
        """Return a copy whose columns are ``column`` of those before; all that ``fresh`` names."""
        names = list(dict.fromkeys((*self.names, *(name for row in fresh for name in row))))
        if len(names) > max(self.MOST, len(self.names)):
            raise DataError(
                f"{len(names)} different attributes; items have at most {self.MOST} in all"
            )
        empty = pa.repeat(pa.scalar("", pa.string()), len(self))
        columns = {name: column(name, self._columns.get(name, empty)) for name in names}
        return Attributes(rows, columns, self._separators)
