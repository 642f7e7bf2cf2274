"""Ties: events of one user with equal time. Facts about them, and rules for their order.

``docs/ties.md`` has the definitions and what they are on public data sets.
"""

from __future__ import annotations

__all__ = [
    "EventOrder",
    "TieBreaker",
    "Ties",
    "item_ranks",
    "measure_order",
    "per_second_of",
    "unit_of",
]

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from l2rec.data.hashing import GOLDEN, mixed
from l2rec.data.parts import MIN_EVENTS

Ties = Literal["file", "hash", "item"]

COPIES_SHARE = 0.2
"""Share of neighbours that are one event twice from which the log is warned of."""
ARTEFACT_SHARE, ARTEFACT_PAIRS = 0.6, 300
"""Share of ascending pairs, and number of pairs, from which chance does not explain the order."""
UNITS = (
    ("nanoseconds", 1e17, 1e9),
    ("microseconds", 1e14, 1e6),
    ("milliseconds", 1e11, 1e3),
    ("seconds", 1e8, 1.0),
)
"""Unit, its smallest time after 1973, and how many make a second."""
STEPS = (("days", 86_400.0), ("hours", 3_600.0), ("minutes", 60.0), ("seconds", 1.0))
MIXED = "mixed"
"""Unit, resolution or rule of merged parts that differ in it."""
RESOLUTION_SHARE = 0.99
"""Share of times that must be whole steps apart: public files hold times that were filled in."""
SAMPLE_EVENTS, SAMPLE_SHARE = 1024, 0.9
IDS_AT_ONCE = 1 << 16

Longs = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


def unit_of(time: float) -> str:
    """Tell the unit of times since 1970 by the size of one; "unknown" for a small one."""
    return next((name for name, smallest, _ in UNITS if abs(time) >= smallest), "unknown")


def per_second_of(unit: str) -> float | None:
    """Return how many of a unit of time are a second; None where it is not known."""
    return next((per_second for name, _, per_second in UNITS if name == unit), None)


# ---------------------------------------------------------------- facts


@dataclass(frozen=True)
class EventOrder:
    """Facts about the order of events; the counts of several data sets add up.

    ``ties``: rule of the order inside ties. ``unit``: of time, or "order only". ``resolution``:
    coarsest step of time that nearly all events keep to, or None. ``neighbours``: pairs of
    consecutive events of a user. ``tied``: those with equal time. ``tied_items``: those of two
    different items. ``ascending``: those whose second item has the greater id. ``users``: users
    with three events or more. ``last_two``, ``last_three``: those whose last events have one time.
    """

    ties: str
    unit: str
    resolution: str | None
    neighbours: int
    tied: int
    tied_items: int
    ascending: int
    users: int
    last_two: int
    last_three: int

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> EventOrder:
        """Read what `to_json` returned."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def to_json(self) -> dict[str, Any]:
        """Return counts, shares (None where there is nothing to count) and the warning."""
        return {
            **asdict(self),
            "tied_share": _share(self.tied, self.neighbours),
            "ascending_share": _share(self.ascending, self.tied_items),
            "last_two_share": _share(self.last_two, self.users),
            "last_three_share": _share(self.last_three, self.users),
            "warning": self.warning,
        }

    def __add__(self, other: EventOrder) -> EventOrder:
        mine, others = asdict(self), asdict(other)
        for name, value in others.items():
            if isinstance(value, int):
                mine[name] += value
            elif mine[name] != value:
                mine[name] = MIXED
        return EventOrder(**mine)

    @property
    def per_second(self) -> float | None:
        """How many of the unit of time are a second; None where it is not known."""
        return per_second_of(self.unit)

    @property
    def warning(self) -> str | None:
        """Sentence that warns of events that are there twice, or else of an order inside ties that
        did not happen; None where neither is to be seen.
        """
        copies = self.tied - self.tied_items
        if copies > COPIES_SHARE * self.neighbours and copies >= ARTEFACT_PAIRS:
            return (
                f"{_percent(copies, self.neighbours)} of events repeat the one before them, same "
                f"user, item and time: is the log there twice? Where a user's last event is the "
                f"one before it, scores say nothing; remove the copies"
            )
        share = _share(self.ascending, self.tied_items)
        if self.ties == "item" or share is None:
            return None
        if share <= ARTEFACT_SHARE or self.tied_items < ARTEFACT_PAIRS:
            return None
        return (
            f"{share:.1%} of tied neighbours ascend by item id: the order inside ties looks like "
            f"an artefact of how the file was made, and scores of models that learn transitions "
            f"may be inflated; check with --ties hash"
        )

    def lines(self) -> list[str]:
        """Describe the order in one or two lines, and the warning in another."""
        time = self.unit
        if self.resolution is not None:
            time = f"unit {self.unit}, resolution {self.resolution}"
        if not self.tied:
            return [f"time: {time}; no two events of a user have equal time"]
        lines = [
            f"time: {time}; {_percent(self.tied, self.neighbours)} of neighbouring events of a "
            f"user have equal time (ties: {self.ties})",
            f"ties: {_percent(self.last_two, self.users)} of users end on two events of equal "
            f"time, {_percent(self.last_three, self.users)} on three; "
            f"{_percent(self.ascending, self.tied_items)} of tied neighbours ascend by item id",
        ]
        return lines if self.warning is None else [*lines, f"warning: {self.warning}"]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def measure_order(
    offsets: Longs,
    timestamps: npt.NDArray[np.float64],
    items: npt.NDArray[np.int32],
    item_ids: pa.Array | pa.ChunkedArray,
    blocks: Iterable[tuple[int, int]],
    *,
    ties: str,
    log_events: int,
) -> EventOrder:
    """Measure the order of prepared events; in memory is one block of users at a time.

    ``offsets``: [U + 1]. ``timestamps``, ``items``: [E], not descending in time within a user.
    ``item_ids``: [N]. ``blocks``: ranges (first, last) of users that cover all. ``log_events``:
    events of the log before any was dropped, which the position in it cannot exceed.
    """
    parts: list[npt.NDArray[np.float64]] = []
    neighbours, tied, tied_items, ascending = 0, 0, 0, 0
    low_time, high_time = np.inf, -np.inf
    ranks: npt.NDArray[np.int32] | None = None
    for first, last in blocks:
        low, high = int(offsets[first]), int(offsets[last])
        times = np.asarray(timestamps[low:high])
        if not len(times):
            continue
        parts.append(times)
        low_time = min(low_time, float(times.min()))
        high_time = max(high_time, float(times.max()))
        same = times[1:] == times[:-1]
        # Between the last event of a user and the first of the next is no pair.
        cuts = np.unique(offsets[first : last + 1]) - low
        same[cuts[1:-1] - 1] = False
        neighbours += len(times) - (len(cuts) - 1)
        at = np.flatnonzero(same) + low
        tied += len(at)
        if not len(at):
            continue
        left, right = items[at], items[at + 1]
        differ = left != right
        tied_items += int(differ.sum())
        if ranks is None:
            ranks = item_ranks(item_ids)
        ascending += int((ranks[left[differ]] < ranks[right[differ]]).sum())
    ends = offsets[1:][np.diff(offsets) >= MIN_EVENTS]
    final = [timestamps[ends - back] for back in (1, 2, 3)]
    two = final[0] == final[1]
    spread = np.linspace(0, len(items) - 1, min(len(items), SAMPLE_EVENTS)).astype(np.int64)
    unit, resolution = _time_scale(
        _Times(parts, timestamps[spread]),
        low_time,
        high_time,
        position=None if tied else log_events,
    )
    return EventOrder(
        ties=ties,
        unit=unit,
        resolution=resolution,
        neighbours=neighbours,
        tied=tied,
        tied_items=tied_items,
        ascending=ascending,
        users=len(ends),
        last_two=int(two.sum()),
        last_three=int((two & (final[1] == final[2])).sum()),
    )


@dataclass(frozen=True)
class _Times:
    """Times of all events in blocks, and a sample of them spread evenly."""

    blocks: list[npt.NDArray[np.float64]]
    sample: npt.NDArray[np.float64]

    def share_in_steps(self, step: float) -> float:
        """Return the share of times that are whole steps apart; 0 where the sample has few."""
        origin = np.sort(self.sample % step)[len(self.sample) // 2]
        if _in_steps(self.sample, origin, step) < SAMPLE_SHARE * len(self.sample):
            return 0.0
        number = sum(_in_steps(times, origin, step) for times in self.blocks)
        return number / sum(map(len, self.blocks))


def _in_steps(times: npt.NDArray[np.float64], origin: float, step: float) -> int:
    steps = (times - origin) / step
    return int((steps == np.trunc(steps)).sum())


def _time_scale(
    times: _Times, low: float, high: float, *, position: int | None
) -> tuple[str, str | None]:
    """Return unit and resolution of times between ``low`` and ``high``.

    ``position``: the greatest that a position can be; None where times cannot be positions, as a
    user has two events of one time.
    """
    if not times.blocks:
        return "unknown", None
    may_be_position = position is not None and 0 <= low <= high <= position and low.is_integer()
    if may_be_position and times.share_in_steps(1.0) == 1.0:
        return "order only", None
    unit, steps = unit_of(max(abs(low), abs(high))), [("whole numbers", 1.0)]
    per_second = per_second_of(unit)
    if per_second is not None:
        steps = [(step, seconds * per_second) for step, seconds in STEPS]
        if unit != "seconds":
            steps.append((unit, 1.0))
    for name, step in steps:
        if times.share_in_steps(step) >= RESOLUTION_SHARE:
            return unit, name
    return unit, "fractions"


def item_ranks(ids: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.int32]:
    """Return each item's place in the order of ids: [N].

    Whole numbers of up to 18 digits come first, as numbers; the other ids after them, by bytes.
    """
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    digits = pc.if_else(pc.match_substring_regex(ids, r"^[0-9]{1,18}$"), ids, None)
    table = pa.table({"number": digits.cast(pa.int64()), "id": ids})
    # Nulls, the ids that are no numbers, come last.
    order = pc.sort_indices(table, sort_keys=[("number", "ascending"), ("id", "ascending")])
    ranks = np.empty(len(ids), dtype=np.int32)
    ranks[order.to_numpy()] = np.arange(len(ids), dtype=np.int32)
    return ranks


# ---------------------------------------------------------------- rules


@dataclass(frozen=True)
class TieBreaker:
    """Rule for events of equal time that does not ask for their place in the file.

    ``items``: [N] rank or hash of each item. ``users``: [U] hash of each user, or None for the
    order of items alone. ``types``: rank of each event type by name, or None without types.
    """

    items: npt.NDArray[Any]
    users: Words | None = None
    types: npt.NDArray[np.int64] | None = None

    @classmethod
    def by_item(cls, item_ids: pa.Array) -> TieBreaker:
        """Order by item id, equal items as they come."""
        return cls(item_ranks(item_ids))

    @classmethod
    def by_hash(
        cls, user_ids: pa.Array, item_ids: pa.Array, event_types: list[str], seed: int
    ) -> TieBreaker:
        """Order by a hash of user id, item id and occurrence, the same on every machine.

        The n-th occurrence is a user's n-th event with the item; events of one user, item and time
        count by the names of their types.
        """
        types = None
        if event_types:
            types = np.argsort(np.argsort(np.array(event_types, dtype=object)))
        return cls(_hashes(item_ids, b"item", seed), _hashes(user_ids, b"user", seed), types)

    def order(
        self,
        users: Longs,
        items: npt.NDArray[np.int32],
        times: npt.NDArray[np.float64],
        types: npt.NDArray[np.int8] | None,
    ) -> Longs:
        """Return the new order [E] of events that are sorted by user and time, types optional."""
        new = np.ones(len(users), dtype=np.bool_)
        new[1:] = (users[1:] != users[:-1]) | (times[1:] != times[:-1])
        group = np.cumsum(new, dtype=np.int64)
        tied = np.flatnonzero(np.bincount(group)[group] > 1)
        keys = self.items[items[tied]]
        if self.users is not None:
            rank = None if types is None or self.types is None else self.types[types]
            count = _occurrences(users, items, group, rank)[tied].astype(np.uint64)
            keys = mixed(self.users[users[tied]] ^ mixed(keys + count * GOLDEN))
        order = np.arange(len(users))
        order[tied] = tied[np.lexsort((keys, group[tied]))]
        return order


def _occurrences(
    users: Longs, items: npt.NDArray[np.int32], group: Longs, types: npt.NDArray[Any] | None
) -> Longs:
    """Count for each event the earlier ones of its user and item, by time and then type: [E]."""
    pairs = users.astype(np.int64) * (int(items.max(initial=0)) + 1) + items
    keys = (pairs,) if types is None else (types, group, pairs)
    order = np.lexsort(keys)
    pairs = pairs[order]
    starts = np.flatnonzero(np.diff(pairs, prepend=-1))
    lengths = np.diff(starts, append=len(pairs))
    counts = np.empty(len(pairs), dtype=np.int64)
    counts[order] = np.arange(len(pairs)) - np.repeat(starts, lengths)
    return counts


def _hashes(ids: pa.Array, kind: bytes, seed: int) -> Words:
    """Hash strings to 64 bits: [N]. ``kind`` tells a user from an item of the same id."""
    key = seed.to_bytes(8, "little")
    hashes = np.empty(len(ids), dtype=np.uint64)
    for start in range(0, len(ids), IDS_AT_ONCE):
        part = ids.slice(start, IDS_AT_ONCE).to_pylist()
        digests = b"".join(
            hashlib.blake2b(i.encode(), digest_size=8, key=key, person=kind).digest() for i in part
        )
        hashes[start : start + len(part)] = np.frombuffer(digests, dtype="<u8")
    return hashes
