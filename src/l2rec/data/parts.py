"""The parts that events are divided into, and how many a user needs to be in all of them."""

from __future__ import annotations

__all__ = [
    "MIN_EVENTS",
    "SPLITS",
    "TEST",
    "TRAIN",
    "VALID",
    "leave_one_out_marks",
    "with_validation",
]

import numpy as np
import numpy.typing as npt

Marks = npt.NDArray[np.int8]

SPLITS = ("train", "valid", "test")
"""Parts of the events, in their order in time."""
TRAIN, VALID, TEST = range(3)
"""Places in `SPLITS`, as ``Dataset.splits`` has them."""
MIN_EVENTS = 3
"""Fewest events of a user whom leave-one-out evaluates: one to learn from, two to be tested on."""


def leave_one_out_marks(offsets: npt.NDArray[np.int64]) -> Marks:
    """Mark events as leave-one-out divides them: [E] int8. ``offsets``: [U + 1] of the users."""
    marks = np.full(int(offsets[-1]), TRAIN, dtype=np.int8)
    ends = offsets[1:][np.diff(offsets) >= MIN_EVENTS]
    marks[ends - 2], marks[ends - 1] = VALID, TEST
    return marks


def with_validation(marks: Marks, offsets: npt.NDArray[np.int64]) -> Marks:
    """Return marks that have validation: where no event is of it, each user's last training event
    is taken, of two or more.

    ``marks``: [E], not descending within a user. ``offsets``: [U + 1] of the users.
    """
    marks = np.asarray(marks)
    if (marks == VALID).any():
        return marks
    before = np.zeros(len(marks) + 1, dtype=np.int64)
    np.cumsum(marks == TRAIN, out=before[1:])
    n_train = np.diff(before[offsets])
    several = n_train > 1
    marks = marks.copy()
    marks[offsets[:-1][several] + n_train[several] - 1] = VALID
    return marks
