"""What a deployment gains and loses against the run before it: items, users, events."""

from __future__ import annotations

__all__ = ["Gains", "gains"]

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from l2rec.errors import L2RecError
from l2rec.runs.folder import open_run_dataset, read_catalog, read_report, unfinished

NAMED = 5
"""Lost items that a line names at most."""


@dataclass(frozen=True)
class Count:
    """Numbers of one thing before and after. gained, lost: None where only these are known."""

    before: int
    after: int
    gained: int | None = None
    lost: int | None = None

    def line(self, name: str) -> str:
        """Describe it in one line."""
        counted = f"{name} {self.before:,} -> {self.after:,}"
        if self.gained is None or self.lost is None:
            return f"{counted} ({self.after - self.before:+,})"
        return f"{counted} ({self.gained:,} gained, {self.lost:,} lost)"


@dataclass(frozen=True)
class Gains:
    """Differences between the data of two runs. lost: ids of items that only the first has."""

    items: Count
    users: Count
    events: Count
    lost: Sequence[str]

    def lines(self) -> list[str]:
        """Describe them, one line for each."""
        lines = [self.items.line("items"), self.users.line("users"), self.events.line("events")]
        if self.lost:
            more = f" and {len(self.lost) - NAMED:,} more" if len(self.lost) > NAMED else ""
            named = ", ".join(map(repr, self.lost[:NAMED]))
            lines.append(f"lost items: {named}{more}")
        return lines


def gains(before: Path, after: Path) -> Gains:
    """Compare the catalogs and data sets of two runs.

    Raises:
        L2RecError: one of them cannot be read.
    """
    old, new = (_ids(read_catalog(run).table["item_id"]) for run in (before, after))
    items = _compared(old, new)
    lost = old.filter(pc.invert(pc.is_in(old, value_set=new))).to_pylist()
    then, now = _data(before), _data(after)
    events = Count(then.get("events", 0), now.get("events", 0))
    try:
        users = _compared(*(_ids(open_run_dataset(run, None).user_ids) for run in (before, after)))
    except L2RecError:  # a data set has moved
        users = Count(then.get("users", 0), now.get("users", 0))
    return Gains(items, users, events, lost)


def _data(run: Path) -> dict[str, Any]:
    """Return what the report of a run says of its data; nothing where it is trained on."""
    return {} if unfinished(run) else read_report(run).get("dataset") or {}


def _ids(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Return ids as one array of one type."""
    column = column.cast(pa.large_string())
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _compared(old: pa.Array, new: pa.Array) -> Count:
    stay = int(pc.sum(pc.is_in(old, value_set=new)).as_py() or 0)
    return Count(len(old), len(new), len(new) - stay, len(old) - stay)
