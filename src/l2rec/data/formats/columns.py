"""Names of columns, for formats that leave them to the user."""

from __future__ import annotations

__all__ = ["Columns"]

from dataclasses import dataclass
from typing import Literal

Quotes = Literal["auto", "none", "backslash"]


@dataclass(frozen=True)
class Columns:
    r"""Column names of formats that leave them to the user, and the encoding of text files.

    ``timestamp=None``: there is none, events are in order. ``event_type=None``: the column
    ``event_type`` if there is one. ``quotes``: ``auto``, a cell of separated text may stand in
    quotes (with tabs: where the whole file keeps to that); ``none``, a quote is a plain character;
    ``backslash``, as ``auto``, and inside quotes ``\"`` is one, as MySQL writes it.
    """

    user: str = "user_id"
    item: str = "item_id"
    timestamp: str | None = "timestamp"
    event_type: str | None = None
    encoding: str = "utf-8"
    quotes: Quotes = "auto"
