"""The parts that events are divided into, and how many a user needs to be in all of them."""

from __future__ import annotations

__all__ = ["MIN_EVENTS", "SPLITS", "TEST", "TRAIN", "VALID"]

SPLITS = ("train", "valid", "test")
"""Parts of the events, in their order in time."""
TRAIN, VALID, TEST = range(3)
"""Places in `SPLITS`, as ``Dataset.splits`` has them."""
MIN_EVENTS = 3
"""Fewest events of a user whom leave-one-out evaluates: one to learn from, two to be tested on."""
