"""Labelled exposures, and counters of users and items as they stood when each day began.

Counters of day d count only events of days before d. So a feature never contains what the models
are to predict: neither an event of the same day nor a later one, on training days as on test days.
Days are UTC days of timestamps in seconds.
"""

from __future__ import annotations

__all__ = ["DAY", "Counts", "DailyLog", "Exposures", "Known", "daily_log", "exposures"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from l2rec.data.dataset import Dataset
from l2rec.data.ragged import Ragged
from l2rec.errors import DataError

DAY = 86_400.0
"""Seconds of a day."""
MOST_DAYS = 4000
"""Longest log; a longer one has timestamps of several units."""
EXPOSURE, CLICK, REPLY = KINDS = ("exposure", "click", "reply")
"""Event types of the study."""
SMOOTHING = 20.0
"""Exposures at the average rate that are added to those of a user or item to compute a rate."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DailyLog:
    """E events, sorted by user and then by time.

    ``user``, ``item``: [E] int64. ``time``: [E] float64 seconds. ``day``: [E] int64 days since
    1970. ``kind``: [E] int8, an index into `KINDS`.
    """

    user: Ints
    item: Ints
    time: Doubles
    day: Ints
    kind: npt.NDArray[np.int8]
    n_users: int
    n_items: int

    @cached_property
    def days(self) -> tuple[int, int]:
        """The first and the last day."""
        return int(self.day.min()), int(self.day.max())

    def of(self, kind: str) -> Ints:
        """Find the events of a kind: row numbers, ascending."""
        return np.flatnonzero(self.kind == KINDS.index(kind))


def daily_log(dataset: Dataset) -> DailyLog:
    """Read the exposures, clicks and replies of a data set; other event types are left out.

    Raises:
        DataError: no event types, no exposures or no clicks, or timestamps that are not seconds.
    """
    names = dataset.event_type_names
    missing = [name for name in (EXPOSURE, CLICK) if name not in names]
    if dataset.event_types is None or missing:
        raise DataError(
            f"{dataset.path} has no events of type {(missing or [EXPOSURE])[0]!r} "
            f"(it has: {', '.join(names) or 'no types'}); prepare a log of exposures, clicks and "
            "replies, and name the column with --event-type"
        )
    codes = np.full(len(names), -1, dtype=np.int8)
    for number, name in enumerate(KINDS):
        if name in names:
            codes[names.index(name)] = number
    kind = codes[dataset.event_types]
    kept = np.flatnonzero(kind >= 0)
    time = np.asarray(dataset.timestamps)[kept]
    days = np.floor(time / DAY).astype(np.int64)
    if (dataset.order.per_second or 1.0) > 1 or days.max() - days.min() >= MOST_DAYS:
        raise DataError(
            f"{dataset.path}: timestamps from {time.min():.0f} to {time.max():.0f} would be "
            f"{days.max() - days.min() + 1:,} days; prepare the log with seconds"
        )
    user = np.repeat(np.arange(dataset.n_users), np.diff(dataset.offsets))[kept]
    item = np.asarray(dataset.items)[kept].astype(np.int64)
    return DailyLog(user, item, time, days, kind[kept], dataset.n_users, dataset.n_items)


@dataclass(frozen=True)
class Exposures:
    """n exposures, sorted by user and time.

    ``user``, ``item``: [n]. ``day``: [n] days since 1970. ``time``: [n] seconds. ``labels``:
    [n, 2] float32, 1 if the exposure was clicked, and if it was replied to.
    """

    user: Ints
    item: Ints
    day: Ints
    time: Doubles
    labels: Floats

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: Ints) -> Exposures:
        """Select rows."""
        return Exposures(
            self.user[rows], self.item[rows], self.day[rows], self.time[rows], self.labels[rows]
        )


def exposures(log: DailyLog, *, cut: int, window: float = DAY) -> Exposures:
    """Label all exposures.

    A click or reply is a label of the newest earlier exposure of the same user to the same item, if
    that is at most ``window`` seconds ago; otherwise it is ignored. Labels of exposures before day
    ``cut`` ignore what happened on that day or later.
    """
    order = np.lexsort((log.kind, log.time, log.item, log.user))  # exposures first at equal times
    shown = log.kind[order] == 0
    newest = np.maximum.accumulate(np.where(shown, np.arange(len(order)), -1))
    cause = order[np.maximum(newest, 0)]  # of each event in this order, the row of its exposure
    same = (log.user[cause] == log.user[order]) & (log.item[cause] == log.item[order])
    waited = log.time[order] - log.time[cause]
    unknown = (log.day[cause] < cut) & (log.day[order] >= cut)
    valid = (newest >= 0) & same & (waited <= window) & ~unknown
    labels = np.zeros((len(order), 2), dtype=np.float32)
    for column in (0, 1):
        led = valid & (log.kind[order] == column + 1)
        labels[cause[led], column] = 1.0
    rows = log.of(EXPOSURE)
    return Exposures(log.user[rows], log.item[rows], log.day[rows], log.time[rows], labels[rows])


class Counts:
    """Counts of keys before a day, each found in O(log events).

    keys, days: [events] int64. period: the first and the last day.
    """

    def __init__(self, keys: Ints, days: Ints, period: tuple[int, int]) -> None:
        self.first, self.span = period[0], period[1] - period[0] + 2
        self.sorted = np.sort(keys * self.span + (days - self.first))

    def _ends(self, keys: Ints, days: Ints) -> tuple[Ints, Ints]:
        """Find the range in ``sorted`` of each key's events before its day."""
        day = np.clip(days - self.first, 0, self.span - 1)
        low = np.searchsorted(self.sorted, keys * self.span)
        return low, np.searchsorted(self.sorted, keys * self.span + day)

    def before(self, keys: Ints, days: Ints) -> Ints:
        """Count occurrences [n] of keys [n] on days before ``days`` [n]."""
        low, high = self._ends(keys, days)
        return high - low

    def since_last(self, keys: Ints, days: Ints) -> Ints:
        """Return days [n] since the last occurrence before the day, at least 1; 0 if none."""
        low, high = self._ends(keys, days)
        some = high > low
        last = np.zeros_like(high)
        last[some] = self.sorted[high[some] - 1] % self.span + self.first
        return np.where(some, days - last, 0)

    def since_first(self, keys: Ints, days: Ints) -> Ints:
        """Return days [n] since the first occurrence before the day, at least 1; 0 if none."""
        low, high = self._ends(keys, days)
        some = high > low
        first = np.zeros_like(high)
        first[some] = self.sorted[low[some]] % self.span + self.first
        return np.where(some, days - first, 0)


class Known:
    """Counters of users, items and pairs as a day begins.

    Args:
        log: all events.
        fields: values [N] int64 of each attribute of items, from 0 on.
        average: day before which the average rates are taken; rates of few exposures are smoothed
            towards them.
    """

    def __init__(self, log: DailyLog, fields: Mapping[str, Ints], average: int) -> None:
        self.log, self.fields = log, fields
        self.clicks = log.of(CLICK)
        self._by_user = self._count(log.user)
        self._by_item = self._count(log.item)
        self._by_pair = self._count(log.user * log.n_items + log.item)[:2]
        self._by_field = {name: self._count(self._crossed(name))[:2] for name in fields}
        early = log.kind[log.day < average]
        shown = max(1, int((early == 0).sum()))
        self.rates = [int((early == kind).sum()) / shown for kind in (1, 2)]

    def _crossed(self, name: str, user: Ints | None = None, item: Ints | None = None) -> Ints:
        """Assign numbers to pairs of a user and an attribute's value; by default of all events."""
        values = self.fields[name]
        user = self.log.user if user is None else user
        item = self.log.item if item is None else item
        crossed: Ints = user * (int(values.max(initial=0)) + 1) + values[item]
        return crossed

    def _count(self, keys: Ints) -> list[Counts]:
        """Count keys [E] separately for each kind of event."""
        rows = [self.log.of(kind) for kind in KINDS]
        return [Counts(keys[at], self.log.day[at], self.log.days) for at in rows]

    def _volumes(self, counts: Sequence[Counts], keys: Ints, days: Ints) -> list[Floats]:
        """Compute log(1 + n) of exposures, clicks, replies; then rates of clicks and replies."""
        n = [count.before(keys, days) for count in counts]
        rates = [
            (n[kind] + SMOOTHING * self.rates[kind - 1]) / (n[0] + SMOOTHING) for kind in (1, 2)
        ]
        return [np.log1p(each).astype(np.float32) for each in n] + [
            rate.astype(np.float32) for rate in rates
        ]

    @property
    def names(self) -> dict[str, list[str]]:
        """Names of the columns of `users`, `items` and `pairs`."""
        volumes = ["exposures", "clicks", "replies", "click rate", "reply rate"]
        crossed = ["item", *self.fields]
        return {
            "user": [*volumes, "days since a click"],
            "item": [*volumes, "age", "days since an exposure", "new"],
            "pair": [f"{what} of this {of}" for of in crossed for what in ("exposures", "clicks")],
        }

    def users(self, users: Ints, days: Ints) -> Floats:
        """Compute features [n, K] float32 of users [n] on days [n]."""
        since = self._by_user[1].since_last(users, days)
        columns = [*self._volumes(self._by_user, users, days), np.log1p(since)]
        return np.stack(columns, axis=1).astype(np.float32)

    def items(self, items: Ints, days: Ints) -> Floats:
        """Compute features [n, K] float32 of items [n] on days [n]."""
        shown = self._by_item[0]
        age, since = shown.since_first(items, days), shown.since_last(items, days)
        columns = [*self._volumes(self._by_item, items, days), np.log1p(age), np.log1p(since)]
        return np.stack([*columns, age == 0], axis=1).astype(np.float32)

    def pairs(self, users: Ints, items: Ints, days: Ints) -> Floats:
        """Compute features [n, K] float32 of pairs of users [n] and items [n] on days [n].

        They count what the user saw and clicked of the item, and of items with the same attribute.
        """
        keys = [users * self.log.n_items + items]
        keys += [self._crossed(name, users, items) for name in self.fields]
        counts = [self._by_pair, *self._by_field.values()]
        columns = [
            np.log1p(count.before(key, days))
            for pair, key in zip(counts, keys, strict=True)
            for count in pair
        ]
        return np.stack(columns, axis=1).astype(np.float32)

    def shown_before(self, items: Ints, days: Ints) -> npt.NDArray[np.bool_]:
        """Tell which items [n] were shown to anybody before days [n]: [n] bool."""
        return self._by_item[0].before(items, days) > 0

    def item_clicks(self, items: Ints, days: Ints) -> Ints:
        """Count clicks [n] of items [n] before days [n]."""
        return self._by_item[1].before(items, days)

    def histories(self, users: Ints, days: Ints, limit: int) -> Ragged:
        """Gather the ``limit`` newest items that users [n] clicked before days [n].

        Returns n rows, oldest item first.
        """
        starts = np.searchsorted(self.log.user[self.clicks], users)
        lengths = self.n_clicks(users, days)
        newest = np.minimum(lengths, limit)
        clicked = Ragged(self.log.item[self.clicks], np.array([0, len(self.clicks)]))
        return clicked.gather(starts + lengths - newest, newest)

    def n_clicks(self, users: Ints, days: Ints) -> Ints:
        """Count clicks [n] of users [n] before days [n]."""
        return self._by_user[1].before(users, days)
