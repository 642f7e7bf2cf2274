"""Texts and fields of the items: all that a method knows of them before it sees an event."""

from __future__ import annotations

__all__ = ["Catalog", "separator_of", "with_separator"]

from collections.abc import Sequence
from functools import cached_property

import pyarrow as pa

from l2rec.errors import DataError, nearest

ID, TEXT = "item_id", "text"
SEPARATOR = b"between_values"
"""Key in the metadata of a column whose strings hold several values each."""


def with_separator(column: pa.Field, separator: str | None) -> pa.Field:
    """Return a column that says what stands between several values of one string; the same column
    for None.
    """
    return column if separator is None else column.with_metadata({SEPARATOR: separator.encode()})


def separator_of(column: pa.Field) -> str | None:
    """Return what `with_separator` has said of a column."""
    known = (column.metadata or {}).get(SEPARATOR)
    return None if known is None else str(known.decode())


class Catalog:
    """Items by int: row i of ``table`` is item i.

    ``table``: columns ``item_id``, ``text`` and any raw fields, all strings. A field of several
    values has them in one string: `separator_of` its column stands between them.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> Catalog:
        """Make a catalog of texts alone; the ids are the numbers of the items."""
        ids = [str(number) for number in range(len(texts))]
        return cls(pa.table({ID: pa.array(ids, pa.string()), TEXT: pa.array(texts, pa.string())}))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def texts(self) -> list[str]:
        """One text per item, empty where it has none."""
        return self._strings(TEXT)

    @property
    def fields(self) -> list[str]:
        """Names of the raw fields."""
        return [name for name in self.table.column_names if name not in (ID, TEXT)]

    @property
    def separators(self) -> dict[str, str]:
        """What stands between the values of the raw fields that have several."""
        known = {column.name: separator_of(column) for column in self.table.schema}
        return {name: between for name, between in known.items() if between is not None}

    def field(self, name: str) -> list[str]:
        """Return one raw field of every item, empty where it is missing.

        Raises:
            DataError: there is no such field; those that exist are named.
        """
        if name not in self.fields:
            raise DataError(
                f"the catalog has no field {name!r}{nearest(name, self.fields)} "
                f"(it has: {', '.join(self.fields) or 'none'})"
            )
        return self._strings(name)

    def require_texts(self, method: str) -> list[str]:
        """Return the texts, for a method that reads them.

        Raises:
            DataError: no item has a text.
        """
        if len(self) and not any(text.strip() for text in self.texts):
            raise DataError(
                f"{method} reads item texts and no item of this data set has one; prepare it with "
                "an item file or --text"
            )
        return self.texts

    def _strings(self, name: str) -> list[str]:
        return [value or "" for value in self.table[name].to_pylist()]
