"""Users of one server: what they did, here and in the data set, and what is popular among them."""

from __future__ import annotations

__all__ = ["Audience", "History", "Popular", "known_of"]

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from l2rec.errors import DataError
from l2rec.service import schemas
from l2rec.service.attributes import Floats, Mask, Rows
from l2rec.service.events import EventLog
from l2rec.service.people import People
from l2rec.service.ranking import Ranked
from l2rec.service.version import Version

POPULAR_SECONDS = 60.0
"""Age at which what is popular is counted anew."""
DAY = 86_400.0
"""Seconds that an event of the log may be ahead."""
SEGMENTS = 64
"""Segments whose popular items are remembered."""

Stored = Callable[..., Awaitable[Any]]
"""Runs a call of the event log in a storage thread, under a name: see `Service.stored`."""


@dataclass(frozen=True)
class History:
    """What a user did. items: the newest that the version knows, oldest first, which are what it
    reads. seen: all items, however long ago. logged: whether any of it is in the event log;
    otherwise all of it is of the data set. unknown: ids of a request that were skipped.
    """

    items: list[str]
    seen: Set[str]
    logged: bool = False
    unknown: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class Popular:
    """Items by how often users clicked or replied to them. rows: [N], best first. counts: [N], by
    row. segment: whose users these are, None for everybody.
    """

    rows: Rows
    counts: Floats
    segment: str | None

    def best(self, k: int, hidden: Mask, without: Rows, only: Mask | None) -> Ranked:
        """Return the k best rows that may be listed."""
        allowed = ~hidden if only is None else only & ~hidden
        allowed[without] = False
        rows = self.rows[allowed[self.rows]][:k]
        return Ranked(rows, self.counts[rows])


class Audience:
    """Histories and popularity, from the event log and the data sets of the loaded runs."""

    def __init__(self, log: EventLog, stored: Stored) -> None:
        self._log, self._stored = log, stored
        self._people: dict[int, People] = {}
        self._popular: dict[tuple[int, int, str | None], tuple[float, Popular]] = {}
        self._counting = asyncio.Lock()

    def people(self, version: Version) -> People:
        """Return the users of the data set of a version's run."""
        # By loading, not by folder: a run may be trained anew in its folder, on other data.
        return self._people.setdefault(version.serial, People(version.run))

    def forget_others(self, versions: Iterable[Version]) -> None:
        """Forget the users of versions that are no longer loaded."""
        serials = {version.serial for version in versions}
        self._people = {n: people for n, people in self._people.items() if n in serials}

    async def history(self, version: Version, user: str, most: int) -> History:
        """Return the newest ``most`` items of a user: what the data set has from before the first
        event in the log, and then what the log has. Empty for a user of neither.

        Raises:
            StorageError: the log is away.
        """
        stored, seen, began = await self._stored("history", self._logged, user, most)
        people = self.people(version)
        past, seen_before = await asyncio.to_thread(
            lambda: (people.history(user, most, began), people.seen(user))
        )
        logged = _known(version, stored)
        items = [*_known(version, past), *logged][-most:]
        return History(items, seen | seen_before, logged=bool(logged))

    async def whose(self, version: Version, latest: Version, who: schemas.Somebody) -> History:
        """Return the history that a request gives, or that of its user. latest: also knows ids of
        items, which this version then skips.

        Raises:
            DataError: ids that neither knows, unless they are to be skipped.
            StorageError: the log is away.
        """
        if who.history is None:
            return await self.history(version, str(who.user), schemas.MAX_HISTORY)
        (items,), unknown = known_of(version, latest, [who.history], who.unknown)
        return History(items, set(items), unknown=unknown)

    def _logged(self, user: str, most: int) -> tuple[list[str], set[str], float | None]:
        """Return a user's newest ``most`` items in the log, all of them, and the time of the first
        event.
        """
        newest = self._log.history(user, most)
        # A shorter history is whole: the log is not asked once more for what nearly all have.
        seen = set(newest) if len(newest) < most else self._log.seen(user)
        return newest, seen, self._log.began(user)

    async def popular(
        self, version: Version, segment: str | None, user: str | None = None
    ) -> Popular:
        """Return what is popular in a segment, by default in the one that the user was put into;
        in all of the catalog where there is none, or nothing is known of it.

        Raises:
            StorageError: the log is away.
        """
        if segment is None and user is not None:
            segment = await self._stored("segment", self._log.segment_of, user)
        async with self._counting:  # who comes meanwhile takes what the first one counted
            popular = await self._counted(version, segment)
            if segment is not None and not popular.counts.any():
                popular = await self._counted(version, None)
        return popular

    async def _counted(self, version: Version, segment: str | None) -> Popular:
        key = (version.serial, len(version), segment)
        known = self._popular.get(key)
        now = time.monotonic()
        if known is not None and now - known[0] < POPULAR_SECONDS:
            return known[1]
        people = self.people(version)
        # The data set may hold what the log has: an event counts once, as one of the data set.
        newest = await asyncio.to_thread(lambda: people.newest)
        if newest is not None and newest > time.time() + DAY:
            newest = None  # later than any event of the log can be: such times are not the log's
        logged, users = await self._stored("counts", self._counts, segment, newest)
        counted = await asyncio.to_thread(people.counts, users)
        popular = await asyncio.to_thread(_by_count, version, (logged, counted), segment)
        self._popular.pop(key, None)
        self._popular[key] = (now, popular)
        while len(self._popular) > SEGMENTS:
            del self._popular[next(iter(self._popular))]
        return popular

    def _counts(
        self, segment: str | None, after: float | None
    ) -> tuple[dict[str, int], list[str] | None]:
        """Return the counts of a segment in the log after a time, and its users; None for
        everybody.
        """
        users = None if segment is None else self._log.users_in(segment)
        return self._log.counts(segment, after), users


def known_of(
    version: Version,
    latest: Version,
    histories: Sequence[Sequence[str]],
    unknown: schemas.Unknown,
) -> tuple[list[list[str]], list[str]]:
    """Return of each history the ids that a version knows, and the others of all of them, once.

    Raises:
        DataError: the latest version does not know them either, and they are not to be skipped.
    """
    row_of = version.predictor.row_of
    others = [item for history in histories for item in history if row_of(item) is None]
    others = list(dict.fromkeys(others))
    if unknown == "fail":
        try:
            latest.predictor.rows([others])
        except DataError as error:
            raise DataError(f'{error} ("unknown": "skip" reads the others)') from None
    return [_known(version, history) for history in histories], others


def _known(version: Version, items: Sequence[str]) -> list[str]:
    return [item for item in items if version.predictor.row_of(item) is not None]


def _by_count(version: Version, parts: Iterable[Mapping[str, int]], segment: str | None) -> Popular:
    """Order the rows of a version by the sum of some counts by item; equals as in the catalog."""
    counts = np.zeros(len(version), dtype=np.float32)
    for part in parts:
        for item, count in part.items():
            row = version.predictor.row_of(item)
            if row is not None:
                counts[row] += count
    return Popular(np.argsort(-counts, kind="stable"), counts, segment)
