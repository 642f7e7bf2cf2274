"""Columns of a log that nobody reads: those that hold lists are named, histories are refused.

A file whose rows are samples, a target with the history before it, looks like a file of events.
Read as one, it would lose the histories, and with them the first events of every user.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from l2rec.data.formats.files import File
from l2rec.errors import DataError

SAMPLE_ROWS = 1000
"""Rows that are looked at for lists."""

_HISTORY = re.compile(
    r"hist(ory|ories)?([_.].*)?|(.*[_.])?(hist|history|histories|list|seq|seqs|sequence)", re.I
)
_CERTAIN = re.compile(r"history([_.].*)?|.*[_.]history|item.*[_.](list|seq|sequence)", re.I)
_LISTED = re.compile(r"\s*(\[.*\]|\(.*\)|\{.*\})\s*", re.S)
_PARTS = re.compile(r"[\s,;|]+")


def check_ignored(
    file: File,
    used: Collection[str],
    samples: Mapping[str, Sequence[str]],
    lists: Collection[str],
    notes: list[str],
    instead: str = "the log that the samples were made from (one event in each row)",
) -> None:
    """Refuse a log with a column of histories; add a note on other columns that hold lists.

    Args:
        used: columns that are read.
        samples: the first values of each column, as text; columns may be missing.
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
    other = []
    for name in dict.fromkeys([*samples, *lists]):
        values = samples.get(name, ())
        in_brackets = sum(_LISTED.fullmatch(value) is not None for value in values)
        a_list = name in lists or in_brackets * 2 > len(values) > 0
        several = any(len(_PARTS.split(value.strip())) > 1 for value in values)
        if name in used or not (a_list or _HISTORY.fullmatch(name)):
            continue
        certain = _CERTAIN.fullmatch(name) is not None and any(value.strip() for value in values)
        if _HISTORY.fullmatch(name) and (a_list or several or certain):
            raise DataError(
                f"{file} has samples, not events: column {name!r} holds the history before each "
                f"row's item, which would be lost, the first events of every user with it; prepare "
                f"{instead}, or remove the column if it is something else"
            )
        other.append(name)
    if other:
        notes.append(
            f"{file.name}: not read, though by type, name or content it holds lists: "
            f"{', '.join(map(repr, other))}"
        )
