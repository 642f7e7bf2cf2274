"""Columns of a log that nobody reads: those that hold lists are named, histories are refused.

A file whose rows are samples, a target with the history before it, looks like a file of events.
Read as one, it would lose the histories, and with them the first events of every user.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from l2rec.data.formats.files import File
from l2rec.errors import DataError

SAMPLE_ROWS = 1000
"""Rows that are looked at for lists."""

_HISTORY = re.compile(
    r"hist(ory|ories)?([_.].*)?|(.*[_.])?(hist|history|histories|list|seq|seqs|sequence)", re.I
)
_CERTAIN = re.compile(r"history([_.].*)?|.*[_.]history|item.*[_.](list|seq|sequence)", re.I)
_LISTED = re.compile(r"\s*(\[.*\]|\(.*\)|\{.*\})\s*", re.S)
_SEPARATOR = re.compile(r"[,;|]")
_AROUND = " \t\r\n[](){}'\""

Parts = Sequence[str]
"""What a cell is made of."""


def check_ignored(
    file: File,
    used: Sequence[str],
    samples: Mapping[str, Sequence[Any]],
    lists: Collection[str],
    notes: list[str],
    instead: str = "the log that the samples were made from (one event in each row)",
) -> None:
    """Refuse a log with a column of histories; add a note on other columns that hold lists.

    Histories are told by their name, or by what they hold: the item of the user's row before.

    Args:
        used: columns that are read, those of users and of items first.
        samples: the values of the first rows by column; columns may be missing.
        lists: columns that are lists by their type.
        notes: receives the note.
        instead: what to prepare instead of a file of histories.

    Raises:
        DataError: a column that is not read holds histories, or one that is read holds lists.
    """
    for name in used:
        if name in lists:
            raise DataError(
                f"{file}: column {name!r} holds a list in each row, so a row is not one event; "
                f"write one row for each event, and prepare that"
            )
    users, items = ([str(value) for value in samples.get(name, ())] for name in used[:2])
    other = []
    for name in dict.fromkeys([*samples, *lists]):
        if name in used:
            continue
        values = samples.get(name, ())
        in_brackets = sum(isinstance(v, str) and _LISTED.fullmatch(v) is not None for v in values)
        a_list = name in lists or in_brackets * 2 > len(values) > 0
        cells = [_parts(value) for value in values]
        several = any(len(parts) > 1 for parts in cells)
        named = _HISTORY.fullmatch(name) is not None
        certain = _CERTAIN.fullmatch(name) is not None and any(cells)
        if (named and (a_list or several or certain)) or (several and _go_on(users, items, cells)):
            raise DataError(
                f"{file} has samples, not events: column {name!r} holds the history before each "
                f"row's item, which would be lost, the first events of every user with it; prepare "
                f"{instead}, or remove the column if it is something else"
            )
        if named or a_list or _of_items(cells, set(items)):
            other.append(name)
    if other:
        notes.append(
            f"{file.name}: not read, though by type, name or content it holds lists: "
            f"{', '.join(map(repr, other))}"
        )


def _parts(value: Any) -> Parts:
    """Return the parts of a list, or of a text between commas and the like, else between blanks."""
    if isinstance(value, (list, tuple)):
        return [str(part) for part in value]
    if not isinstance(value, str):
        return []
    parts = _SEPARATOR.split(value) if _SEPARATOR.search(value) else value.split()
    return [part for part in (part.strip(_AROUND) for part in parts) if part]


def _of_items(cells: Sequence[Parts], items: Collection[str]) -> bool:
    """Say whether most cells have several parts, and most of these are ids of items."""
    parts = [part for cell in cells if len(cell) > 1 for part in cell]
    lists = sum(len(cell) > 1 for cell in cells)
    return lists * 2 >= sum(map(bool, cells)) and sum(p in items for p in parts) * 2 > len(parts)


def _go_on(users: Parts, items: Parts, cells: Sequence[Parts]) -> bool:
    """Say whether most cells begin or end with the item of the same user's row before, or after
    where rows are newest first.

    What is bought together is so as well, but names the later item in the earlier row too.
    """
    last: dict[str, int] = {}
    pairs = []
    for row, user in enumerate(users):
        if user in last:
            pairs.append((last[user], row))
        last[user] = row
    for way in (pairs, [(after, before) for before, after in pairs]):
        compared = [(before, after) for before, after in way if cells[after]]
        for end in (-1, 0):
            found = sum(
                cells[after][end] == items[before] and items[after] not in cells[before]
                for before, after in compared
            )
            if found * 2 > len(compared):
                return True
    return False
