"""Tasks beside the requests: following live.json, comparing the shadow, taking over items.

- `Follower` loads and checks what live.json names, then swaps it in, or refuses it.
- `Shadow` ranks answered requests with the candidate while the models are idle, and compares.
- `keep_in_sync` takes over items that other servers of the same database have put or deleted.
"""

from __future__ import annotations

__all__ = ["Follower", "Shadow", "keep_in_sync", "load_first", "load_with_items"]

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from l2rec.errors import L2RecError, StorageError
from l2rec.service.batching import Worker
from l2rec.service.events import EventLog
from l2rec.service.live import FILE, Deployment, read_deployment
from l2rec.service.loading import check_version, load_version
from l2rec.service.ranking import Query, encode, rank, score
from l2rec.service.serving import Service
from l2rec.service.version import Version

logger = logging.getLogger("l2rec.service")

IDLE_SECONDS = 0.01
"""Seconds until the shadow looks again whether the models are idle."""


def load_with_items(
    run: Path, log: EventLog, *, index: str = "auto", expected: str | None = None
) -> Version:
    """Load a run with the items of the event log, and check it. May take long; needs no event loop.

    Raises:
        L2RecError: the run cannot be served.
    """
    version = load_version(run, index=index, expected=expected, items=log.items())
    with torch.inference_mode():
        check_version(version)
    return version


def load_first(
    deployment: Deployment, log: EventLog, *, index: str = "auto"
) -> tuple[Version, Path, str | None]:
    """Load the current run of a deployment, or else the newest previous one that can be served.

    Returns:
        The version, its run, and why it is not the current run (None if it is).

    Raises:
        L2RecError: no run can be served; the message is about the current one.
    """
    problem: L2RecError | None = None
    for run in (deployment.current, *deployment.previous):
        try:
            version = load_with_items(run, log, index=index, expected=deployment.expected(run))
            return version, run, None if problem is None else str(problem)
        except L2RecError as error:
            logger.error("%s cannot be served: %s", run.name, error)
            problem = problem or error
    assert problem is not None
    raise problem


async def keep_in_sync(service: Service) -> None:
    """Take over items that other servers of the same database have changed, until cancelled."""
    while True:
        await asyncio.sleep(service.settings.sync)
        try:
            if await service.sync():
                logger.info("took over items of another server")
        except Exception as error:
            logger.warning("items were not synced, trying again: %s", error)


class Follower:
    """Task that keeps the live and the shadow version at what live.json of a folder says.

    Args:
        current, shadow: runs that are loaded already.
    """

    def __init__(
        self, service: Service, folder: Path, current: Path, shadow: Path | None = None
    ) -> None:
        self.service, self.folder = service, folder
        self.current, self.shadow = current, shadow
        self._seen: tuple[int, int, int] | None = None
        self._poke = asyncio.Event()
        self._loader = Worker("loader", nice=5)

    def poke(self) -> None:
        """Look now, and try again a candidate that was refused."""
        self._seen = None
        self._poke.set()

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            try:
                await self.look()
            except Exception:
                logger.exception("following %s failed; trying again", self.folder / FILE)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.service.settings.poll):
                    await self._poke.wait()
            self._poke.clear()

    async def look(self) -> None:
        """Look once: if the file has changed, load what it names and swap it in."""
        try:
            stat = (self.folder / FILE).stat()
        except OSError:
            return  # nothing to follow: the live version stays
        seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            wanted = read_deployment(self.folder)
        except L2RecError as error:
            self._refuse(self.folder, error)
            return
        try:
            await self._apply(wanted)
        except StorageError as error:
            logger.warning("no version was exchanged, trying again: %s", error)
            self._seen = None
            return
        if not self._others(wanted):
            self.service.live.refused = None

    def _others(self, wanted: Deployment) -> bool:
        """Tell whether live.json names anything that is not what is loaded."""
        live = self.service.live
        return _is_other(wanted.current, live.version.run, live.version, wanted) or _is_other(
            wanted.shadow, self.shadow, live.shadow, wanted
        )

    async def _apply(self, wanted: Deployment) -> None:
        live = self.service.live
        if _is_other(wanted.current, self.current, live.version, wanted):
            version = await self._load(wanted.current, wanted)
            if version is not None:
                if not self._still(wanted, "current"):
                    return
                await self.service.replace("live", version)
                self.current = wanted.current
                logger.info("live: %s, version %s", version.name, version.version)
        if _is_other(wanted.shadow, self.shadow, live.shadow, wanted):
            candidate = None
            if wanted.shadow is not None:
                candidate = await self._load(wanted.shadow, wanted)
                if candidate is None or not self._still(wanted, "shadow"):
                    return
            await self.service.replace("shadow", candidate)
            self.shadow = wanted.shadow
            logger.info("shadow: %s", "none" if candidate is None else candidate.name)

    def _still(self, wanted: Deployment, role: Literal["current", "shadow"]) -> bool:
        """Tell whether live.json still names a run, and these weights of it, now that it is loaded:
        it may have been rolled back meanwhile. Otherwise the next look sees what it names instead.
        """
        run: Path = getattr(wanted, role)
        with contextlib.suppress(L2RecError):
            now = read_deployment(self.folder)
            if getattr(now, role) == run and now.expected(run) == wanted.expected(run):
                return True
        logger.info("%s was loaded, but is no longer what is deployed", run.name)
        return False

    async def _load(self, run: Path, wanted: Deployment) -> Version | None:
        """Load a run in the thread beside; None where it is refused."""
        service = self.service
        try:
            version = await self._loader.run(
                lambda: load_with_items(
                    run,
                    service.log,
                    index=service.settings.index,
                    expected=wanted.expected(run),
                )
            )
        except StorageError:
            raise  # no fault of the candidate
        except Exception as error:
            if not isinstance(error, L2RecError):
                logger.exception("loading %s failed", run.name)
            self._refuse(run, error)
            return None
        service.metrics.swaps.labels("loaded").inc()
        return version

    def _refuse(self, run: Path, error: Exception) -> None:
        reason = str(error) if isinstance(error, L2RecError) else type(error).__name__
        logger.error("refused %s: %s", run.name, reason)
        self.service.live.refuse(run, reason)
        self.service.metrics.swaps.labels("refused").inc()

    def close(self) -> None:
        """End the thread that loads."""
        self._loader.close()


def _is_other(
    run: Path | None, loaded: Path | None, version: Version | None, wanted: Deployment
) -> bool:
    """Tell whether a run is another one than is loaded, or the same folder with other weights."""
    if run is None or run != loaded:
        return run != loaded
    return version is not None and wanted.expected(run) not in (None, version.version)


# -- shadow --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    """An answer: its ids, best first, the history that it is for, and the ids left out of it."""

    history: tuple[str, ...]
    without: tuple[str, ...]
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Compared:
    """Comparison of a candidate with an answer.

    overlap: share of the answer that the candidate lists too. correlation: Spearman's, between the
    orders of the answer's items; None where there is no order. seconds: time that it took.
    """

    overlap: float
    correlation: float | None
    seconds: float


def compare(candidate: Version, answered: Answered) -> Compared | None:
    """Rank the same request with a candidate; None where it knows no item of the history."""
    started = time.perf_counter()
    row_of = candidate.predictor.row_of
    history = [item for item in answered.history if row_of(item) is not None]
    if not history or not answered.ids:
        return None
    user = encode(candidate, candidate.predictor.rows([history]))[0]
    without = np.asarray(
        [row for item in answered.without if (row := row_of(item)) is not None], dtype=np.int64
    )
    k = len(answered.ids)
    ranked = rank([Query(candidate, user, k, without)])[0]
    seconds = time.perf_counter() - started
    listed = {candidate.ids[row] for row in ranked.rows}
    overlap = len(listed & set(answered.ids)) / k
    known = [row for item in answered.ids if (row := row_of(item)) is not None]
    if len(known) < 2:
        return Compared(overlap, None, seconds)
    from scipy.stats import rankdata  # slow to import, and only a shadow needs it

    theirs = rankdata(-score(candidate, user, np.asarray(known, dtype=np.int64)))
    if not np.ptp(theirs):
        return Compared(overlap, None, seconds)
    correlation = float(np.corrcoef(np.arange(len(known)), theirs)[0, 1])
    return Compared(overlap, correlation, seconds)


@dataclass
class Shadow:
    """Queue of answers that are compared while the models are idle.

    Beyond ``shadow_queue`` answers the oldest is dropped.
    """

    service: Service
    _waiting: deque[Answered] = field(default_factory=deque)
    _came: asyncio.Event = field(default_factory=asyncio.Event)

    def offer(self, history: Sequence[str], without: Sequence[str], ids: Sequence[str]) -> None:
        """Queue an answer for comparison, if there is a candidate."""
        if self.service.live.shadow is None:
            return
        if len(self._waiting) >= self.service.settings.shadow_queue:
            self._waiting.popleft()
            self.service.metrics.shadow.labels("dropped").inc()
        self._waiting.append(Answered(tuple(history), tuple(without), tuple(ids)))
        self._came.set()

    async def run(self) -> None:
        """Compare answers, until cancelled."""
        service, metrics = self.service, self.service.metrics
        while True:
            while not self._waiting:
                self._came.clear()
                await self._came.wait()
            if not service.idle:
                await asyncio.sleep(IDLE_SECONDS)
                continue
            answered, candidate = self._waiting.popleft(), service.live.shadow
            if candidate is None:
                self._waiting.clear()
                continue
            try:
                compared = await service.shadow_worker.run(compare, candidate, answered)
            except Exception:
                logger.exception("the shadow %s failed", candidate.name)
                metrics.shadow.labels("failed").inc()
                continue
            if compared is None:
                metrics.shadow.labels("unknown").inc()
                continue
            metrics.shadow_overlap.observe(compared.overlap)
            metrics.shadow_seconds.observe(compared.seconds)
            if compared.correlation is not None:
                metrics.shadow_correlation.observe(compared.correlation)
            metrics.shadow.labels("ranked").inc()
