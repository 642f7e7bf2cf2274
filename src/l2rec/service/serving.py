"""What the routes share: the threads, the batches, the cache, and how versions change.

Everything here runs in one event loop; models run in one thread, storage in a few others.
"""

from __future__ import annotations

__all__ = ["Service"]

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from l2rec.data.ragged import Ragged
from l2rec.errors import L2RecError
from l2rec.service.batching import Batcher, Worker
from l2rec.service.events import EventLog
from l2rec.service.live import Live
from l2rec.service.metrics import Metrics
from l2rec.service.ranking import Query, Ranked, User, encode, rank
from l2rec.service.security import Refused
from l2rec.service.settings import Settings
from l2rec.service.version import ItemState, ItemTexts, Version

T = TypeVar("T")

logger = logging.getLogger("l2rec.service")

RANKED_TOGETHER = 256
CACHED_NUMBERS = 1 << 26
STORAGE_THREADS = 4
READY_SECONDS, READY_KEPT = 5.0, 1.0


@dataclass(frozen=True, eq=False)
class _Encode:
    """One history, to be encoded by one version."""

    version: Version
    row: npt.NDArray[np.integer]


def encode_jobs(jobs: Sequence[_Encode]) -> list[User]:
    """Histories -> users, those of one version together. In the thread of the models."""
    found: dict[int, User] = {}
    groups: dict[int, list[int]] = {}
    for number, job in enumerate(jobs):
        groups.setdefault(id(job.version), []).append(number)
    for numbers in groups.values():
        rows = Ragged.from_rows([jobs[n].row for n in numbers])
        found |= dict(zip(numbers, encode(jobs[numbers[0]].version, rows), strict=True))
    return [found[number] for number in range(len(jobs))]


class Service:
    """Threads, batches, cache and versions of one server.

    ``worker``: the thread of all models that serve. Whatever else runs a model, such as an
    explanation, runs there too: ``await service.worker.run(function, ...)``.
    """

    def __init__(self, settings: Settings, live: Live, log: EventLog) -> None:
        self.settings, self.live, self.log = settings, live, log
        self.metrics = Metrics()
        self.worker = Worker("model", limit=settings.queue)
        self.shadow_worker = Worker("shadow", nice=19)
        self._ranker = Worker("ranking", limit=settings.inflight)
        self._storage = ThreadPoolExecutor(STORAGE_THREADS, thread_name_prefix="l2rec-storage")
        self.encoding: Batcher[_Encode, User] = Batcher(
            encode_jobs,
            self.worker,
            max_cost=settings.batch_tokens,
            max_wait=settings.batch_ms / 1000,
            limit=settings.queue,
            observe=self._batched,
        )
        # No waiting here: what comes while one batch is ranked is the next batch.
        self.ranking: Batcher[Query, Ranked] = Batcher(
            rank, self._ranker, max_cost=RANKED_TOGETHER, max_wait=0.0, limit=settings.inflight
        )
        self._cache: OrderedDict[tuple[int, bytes], User] = OrderedDict()
        self.changing = asyncio.Lock()
        """Held by whoever makes a version out of one that is held and puts it in its place."""
        self._items: ItemState | None = None
        self._ready: tuple[float, asyncio.Future[list[str]]] | None = None
        self.metrics.gauge(
            "l2rec_queue_histories", "Histories that wait.", lambda: len(self.encoding)
        )
        self.metrics.gauge(
            "l2rec_user_cache_entries", "User vectors that are kept.", lambda: len(self._cache)
        )
        self.changed()

    def _batched(self, jobs: int, tokens: int, waited: float) -> None:
        self.metrics.batch_jobs.observe(jobs)
        self.metrics.batch_tokens.observe(tokens)
        self.metrics.batch_wait.observe(waited)

    @property
    def idle(self) -> bool:
        """Whether no request waits for the models."""
        return not len(self.encoding) and not self.worker.calls

    # -- users -----------------------------------------------------------------------------------

    async def user(self, version: Version, history: Sequence[str]) -> User:
        """A history of known ids, encoded now or before.

        Raises:
            DataError: unknown ids, all named. Busy: the queue is full.
        """
        rows = version.predictor.rows([history])
        key = (version.serial, rows.values.tobytes())
        known = self._cache.get(key)
        if known is not None:
            self._cache.move_to_end(key)
            self.metrics.cache.labels("hit").inc()
            return known
        self.metrics.cache.labels("miss").inc()
        cost = int(version.predictor.costs(rows)[0])
        user = await self.encoding.submit(_Encode(version, rows[0]), cost)
        if self.settings.cache and any(
            held.serial == version.serial for held in self.live.all().values()
        ):
            self._cache[key] = user
            # Of a method that only ranks, a user is as long as the catalog.
            most = min(self.settings.cache, max(1, CACHED_NUMBERS // user.vector.numel()))
            while len(self._cache) > most:
                self._cache.popitem(last=False)
        return user

    async def users(self, version: Version, histories: Sequence[Sequence[str]]) -> list[User]:
        """Several at once: all, or the first error and none.

        Raises:
            DataError: unknown ids. Busy: the queue is full.
        """
        version.predictor.rows(histories)
        tasks = [asyncio.ensure_future(self.user(version, history)) for history in histories]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    # -- storage ---------------------------------------------------------------------------------

    async def stored(self, call: str, function: Callable[..., T], *args: Any) -> T:
        """A call of the event log, in a thread of its own; failures are counted."""
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._storage, lambda: function(*args)
            )
        except Exception:
            self.metrics.storage_failures.labels(call).inc()
            raise

    # -- versions --------------------------------------------------------------------------------

    def changed(self) -> None:
        """After versions were exchanged: metrics, and the cache of those that are gone."""
        held = self.live.all()
        self.metrics.held(held)
        serials = {version.serial for version in held.values()}
        for key in [key for key in self._cache if key[0] not in serials]:
            del self._cache[key]

    def thread_of(self, role: str) -> Worker:
        """Where the model of a role runs."""
        return self.shadow_worker if role == "shadow" else self.worker

    async def put(self, items: ItemTexts) -> None:
        """Add or replace items: on disk when this returns, and in every answer from then on.

        Raises:
            Refused: 409, the live model cannot, or there is no room. DataError: a text that
            cannot be read. StorageError: nothing was changed.
        """
        # To its end, whether the client waits or not: what is on disk is also served.
        await asyncio.shield(asyncio.ensure_future(self._put(items)))

    async def _put(self, items: ItemTexts) -> None:
        async with self.changing:
            live = self.live.current()
            if not live.takes_new_items:
                raise Refused(
                    409,
                    f"{live.name} ranks the items that it was trained on; deploy a model that "
                    "reads texts",
                )
            if live.added + len(items) > self.settings.new_items:
                raise Refused(
                    409,
                    f"{live.added} rows were added since {live.name} was loaded, at most "
                    f"{self.settings.new_items} may be; restart or deploy to make room",
                )
            # First what may fail for the items' sake, then the disk, then the swap.
            fresh = {"live": await self._with(live, "live", items)}
            await self.stored("put_items", self.log.put_items, dict(items))
            for role, version in self.live.all().items():
                if role != "live" and version.takes_new_items:
                    fresh[role] = await self._with(version, role, items)
            self._swap(fresh)
        self.metrics.items.labels("put").inc(len(items))

    async def _with(self, version: Version, role: str, items: ItemTexts) -> Version:
        return await self.thread_of(role).run(version.with_items, items, urgent=True)

    async def delete(self, ids: Sequence[str]) -> None:
        """Items that no answer has any more, from the next on.

        Raises:
            Refused: 404, ids that are not in the catalog; all are named. StorageError.
        """
        await asyncio.shield(asyncio.ensure_future(self._delete(ids)))

    async def _delete(self, ids: Sequence[str]) -> None:
        async with self.changing:
            live = self.live.current()
            unknown = [item for item in ids if live.predictor.row_of(item) is None]
            if unknown:
                raise Refused(404, f"unknown item ids: {', '.join(map(repr, unknown))}")
            await self.stored("delete_items", self.log.delete_items, list(ids))
            self._swap({r: held.without_items(ids) for r, held in self.live.all().items()})
        self.metrics.items.labels("delete").inc(len(ids))

    async def sync(self) -> bool:
        """Brings what is held up to the items of the event log, which other servers may have
        changed. Whether anything was new.

        Raises:
            StorageError: the database is away.
        """
        async with self.changing:
            state = await self.stored("items", self.log.items)
            if state == self._items:
                return False
            fresh = {}
            for role, version in self.live.all().items():
                brought = await self.thread_of(role).run(version.brought_to, state, urgent=True)
                if brought is not version:
                    fresh[role] = brought
            self._items = state
            self._swap(fresh)
            return bool(fresh)

    async def replace(self, role: str, version: Version | None) -> None:
        """Another version takes the place of the one that has this role, with the items that came
        while it was loaded.

        Raises:
            StorageError: the database is away.
        """
        async with self.changing:
            if version is not None:
                state = await self.stored("items", self.log.items)
                version = await self.thread_of(role).run(version.brought_to, state, urgent=True)
            self.live.swap(role, version)
            self.changed()

    def _swap(self, fresh: Mapping[str, Version]) -> None:
        for role, version in fresh.items():
            self.live.swap(role, version)
        self.changed()

    # -- readiness -------------------------------------------------------------------------------

    async def problems(self) -> list[str]:
        """Why requests could not be answered: of a real inference, and of the log.

        Asked for by many at once, or within a second, it is found out once.
        """
        now = time.monotonic()
        if self._ready is None or (self._ready[1].done() and now - self._ready[0] > READY_KEPT):
            self._ready = (now, asyncio.ensure_future(self._problems()))
        return await asyncio.shield(self._ready[1])

    async def _problems(self) -> list[str]:
        found = []
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self.worker.run(_infer, self.live.current(), urgent=True)
        except TimeoutError:
            found.append(f"the model gave no answer within {READY_SECONDS:g} s")
        except Exception as error:
            logger.exception("the model cannot infer")
            found.append(f"the model cannot infer: {type(error).__name__}")
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self.stored("ping", self.log.ping)
        except TimeoutError:
            found.append(f"the event log gave no answer within {READY_SECONDS:g} s")
        except L2RecError as error:
            found.append(str(error))
        return found

    async def close(self) -> None:
        """Ends the threads; what still waits is cancelled."""
        await self.encoding.close()
        await self.ranking.close()
        for worker in (self.worker, self.shadow_worker, self._ranker):
            worker.close()
        self._storage.shutdown(wait=True)


def _infer(version: Version) -> None:
    """One history through the model and the index. AssertionError if scores are not numbers."""
    row = int(np.flatnonzero(~version.hidden)[0])
    user = encode(version, Ragged.from_rows([[row]]))[0]
    ranked = rank([Query(version, user, 1)])[0]
    if not len(ranked.rows) or not np.isfinite(ranked.scores).all():
        raise ArithmeticError("scores that are not finite numbers")
