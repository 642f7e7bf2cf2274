"""The service behind the routes: threads, batches, the cache, and the change of versions.

Its methods run in one event loop; models run in one thread, storage in a few others.
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
from l2rec.errors import CheckpointError, L2RecError
from l2rec.service.audience import Audience
from l2rec.service.batching import Batcher, Worker
from l2rec.service.events import EventLog
from l2rec.service.experiments import record_arms
from l2rec.service.live import Live
from l2rec.service.metrics import Metrics
from l2rec.service.ranking import Query, Ranked, User, encode, rank
from l2rec.service.security import Refused
from l2rec.service.settings import Settings
from l2rec.service.version import Change, ItemState, ItemTexts, Version

T = TypeVar("T")

logger = logging.getLogger("l2rec.service")

RANKED_TOGETHER = 256
"""Requests that are ranked in one batch at most."""
CACHED_NUMBERS = 1 << 26
"""Numbers of all cached vectors at most."""
STORAGE_THREADS = 4
READY_SECONDS = 5.0
"""Time that a check of readiness may take."""
READY_REUSED = 1.0
"""Seconds for which the result of a check is reused."""


@dataclass(frozen=True, eq=False)
class _Encode:
    """Job of the encoder: one history, as item rows of one version."""

    version: Version
    row: npt.NDArray[np.integer]


def encode_jobs(jobs: Sequence[_Encode]) -> list[User]:
    """Encode histories, those of one version together. Runs in the models' thread."""
    users: dict[int, User] = {}
    groups: dict[int, list[int]] = {}
    for number, job in enumerate(jobs):
        groups.setdefault(id(job.version), []).append(number)
    for numbers in groups.values():
        rows = Ragged.from_rows([jobs[n].row for n in numbers])
        users |= dict(zip(numbers, encode(jobs[numbers[0]].version, rows), strict=True))
    return [users[number] for number in range(len(jobs))]


class Service:
    """Threads, batches, cache and versions of one server.

    ``worker``: the thread of all models that serve. Anything else that runs a model, such as an
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
        # No waiting here: requests that come while one batch is ranked are the next batch.
        self.ranking: Batcher[Query, Ranked] = Batcher(
            rank, self._ranker, max_cost=RANKED_TOGETHER, max_wait=0.0, limit=settings.inflight
        )
        self.audience = Audience(log, self.stored)
        self._cache: OrderedDict[tuple[int, bytes], User] = OrderedDict()
        self.changing = asyncio.Lock()
        """Lock for deriving a version from a loaded one and putting it in its place."""
        self._items: ItemState | None = None
        self._ready: tuple[float, asyncio.Future[list[str]]] | None = None
        self.metrics.gauge(
            "l2rec_queue_histories", "Histories that wait.", lambda: len(self.encoding)
        )
        self.metrics.gauge(
            "l2rec_user_cache_entries", "User vectors in the cache.", lambda: len(self._cache)
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
        """Return the user of a history, from the cache or encoded now.

        Raises:
            DataError: unknown ids; all are named.
            Busy: the queue is full.
        """
        rows = version.predictor.rows([history])
        key = (version.serial, rows.values.tobytes())
        cached = self._cache.get(key)
        if cached is not None:
            self._cache.move_to_end(key)
            self.metrics.cache.labels("hit").inc()
            return cached
        self.metrics.cache.labels("miss").inc()
        cost = int(version.predictor.costs(rows)[0])
        user = await self.encoding.submit(_Encode(version, rows[0]), cost)
        if self.settings.cache and any(
            loaded.serial == version.serial for loaded in self.live.all().values()
        ):
            self._cache[key] = user
            # The vector of a method that only ranks is as long as the catalog.
            most = min(self.settings.cache, max(1, CACHED_NUMBERS // user.vector.numel()))
            while len(self._cache) > most:
                self._cache.popitem(last=False)
        return user

    async def users(self, version: Version, histories: Sequence[Sequence[str]]) -> list[User]:
        """Return the users of several histories: all, or the first error and none.

        Raises:
            DataError: unknown ids; all are named.
            Busy: the queue is full.
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
        """Run a call of the event log in a storage thread; count it as ``call`` if it fails."""
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._storage, lambda: function(*args)
            )
        except Exception:
            self.metrics.storage_failures.labels(call).inc()
            raise

    # -- versions --------------------------------------------------------------------------------

    def changed(self) -> None:
        """Update the metrics, and drop cached users of versions that are gone."""
        versions = self.live.all()
        self.metrics.loaded(versions)
        self.audience.forget_others(versions.values())
        serials = {version.serial for version in versions.values()}
        for key in [key for key in self._cache if key[0] not in serials]:
            del self._cache[key]

    def thread_of(self, role: str) -> Worker:
        """Return the thread that runs the model of a role."""
        return self.shadow_worker if role == "shadow" else self.worker

    async def put(self, items: ItemTexts) -> dict[str, Change]:
        """Add or replace items: on disk when this returns, and in every answer from then on.

        Returns:
            What became of each in the live version: see `Version.changes`.

        Raises:
            Refused: 409, the live model takes no new items, or there is no room.
            DataError: a text that the model reads nothing in.
            StorageError: nothing was changed.
        """
        # Shielded, so that items on disk are also served if the client goes away.
        return await asyncio.shield(asyncio.ensure_future(self._put(items)))

    async def _put(self, items: ItemTexts) -> dict[str, Change]:
        async with self.changing:
            live = self.live.current()
            changes = live.changes(items)
            rows = sum(change != "kept" for change in changes.values())
            if rows and not live.takes_new_items:
                raise Refused(
                    409,
                    f"{live.name} ranks the items that it was trained on, with the texts that they "
                    "had; deploy a model that reads texts",
                )
            if rows and live.added + rows > self.settings.new_items:
                raise Refused(
                    409,
                    f"{live.added} rows were added since {live.name} was loaded, at most "
                    f"{self.settings.new_items} may be; restart or deploy to make room",
                )
            # First the steps that the items can fail, then the disk, then the swap.
            fresh = {"live": await self._with(live, "live", items)}
            await self.stored("put_items", self.log.put_items, dict(items))
            for role, version in self.live.all().items():
                if role != "live":
                    fresh[role] = await self._with(version, role, items)
            self._swap(fresh)
        for change in changes.values():
            self.metrics.items.labels(change).inc()
        return changes

    async def _with(self, version: Version, role: str, items: ItemTexts) -> Version:
        state = (items, frozenset[str]())
        return await self.thread_of(role).run(version.brought_to, state, urgent=True)

    async def delete(self, ids: Sequence[str]) -> None:
        """Take items out of every answer, from the next one on.

        Raises:
            Refused: 404, ids that are not in the catalog; all are named.
            StorageError: nothing was changed.
        """
        await asyncio.shield(asyncio.ensure_future(self._delete(ids)))

    async def _delete(self, ids: Sequence[str]) -> None:
        async with self.changing:
            live = self.live.current()
            unknown = [item for item in ids if live.predictor.row_of(item) is None]
            if unknown:
                raise Refused(404, f"unknown item ids: {', '.join(map(repr, unknown))}")
            await self.stored("delete_items", self.log.delete_items, list(ids))
            self._swap({role: v.without_items(ids) for role, v in self.live.all().items()})
        self.metrics.items.labels("deleted").inc(len(ids))

    async def sync(self) -> bool:
        """Bring all versions up to the items of the event log, where other servers write too.

        Returns:
            Whether anything was new.

        Raises:
            StorageError: the database is away.
        """
        async with self.changing:
            state = await self.stored("items", self.log.items)
            if state == self._items:
                return False
            fresh = {}
            for role, version in self.live.all().items():
                updated = await self.thread_of(role).run(version.brought_to, state, urgent=True)
                if updated is not version:
                    fresh[role] = updated
            self._items = state
            self._swap(fresh)
            return bool(fresh)

    async def replace(self, role: str, version: Version | None) -> None:
        """Put a version into a role, with the items that came while it was loaded.

        Raises:
            StorageError: the database is away.
        """
        async with self.changing:
            if version is not None:
                state = await self.stored("items", self.log.items)
                version = await self.thread_of(role).run(version.brought_to, state, urgent=True)
                if self.settings.experiment is not None and role != "shadow":
                    roles = self.live.all() | {role: version}
                    await self.stored(
                        "arms", record_arms, self.log, self.settings.experiment, roles
                    )
            self.live.swap(role, version)
            self.changed()

    def _swap(self, fresh: Mapping[str, Version]) -> None:
        for role, version in fresh.items():
            self.live.swap(role, version)
        self.changed()

    # -- readiness -------------------------------------------------------------------------------

    async def problems(self) -> list[str]:
        """List the reasons why requests would fail, by a real inference and a look into the log.

        Concurrent calls share one check, as do calls within `READY_REUSED` seconds.
        """
        now = time.monotonic()
        if self._ready is None or (self._ready[1].done() and now - self._ready[0] > READY_REUSED):
            self._ready = (now, asyncio.ensure_future(self._problems()))
        return await asyncio.shield(self._ready[1])

    async def _problems(self) -> list[str]:
        problems = []
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self.worker.run(_infer, self.live.current(), urgent=True)
        except TimeoutError:
            problems.append(f"the model gave no answer within {READY_SECONDS:g} s")
        except CheckpointError as error:
            logger.error("not ready: %s", error)
            problems.append(f"the model is not the one that was trained: {error}")
        except Exception as error:
            logger.exception("the model cannot infer")
            problems.append(f"the model cannot infer: {type(error).__name__}")
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self.stored("ping", self.log.ping)
        except TimeoutError:
            problems.append(f"the event log gave no answer within {READY_SECONDS:g} s")
        except L2RecError as error:
            problems.append(str(error))
        return problems

    async def close(self) -> None:
        """End the threads; jobs that wait are cancelled."""
        await self.encoding.close()
        await self.ranking.close()
        for worker in (self.worker, self.shadow_worker, self._ranker):
            worker.close()
        self._storage.shutdown(wait=True)


def _infer(version: Version) -> None:
    """Put one history through the model and the index, and a user of the run's sample through the
    model.

    Raises:
        ArithmeticError: scores that are not finite numbers.
        CheckpointError: the vectors of users are not those that the trained model gave them.
    """
    row = int(np.flatnonzero(~version.hidden)[0])
    user = encode(version, Ragged.from_rows([[row]]))[0]
    ranked = rank([Query(version, user, 1)])[0]
    if not len(ranked.rows) or not np.isfinite(ranked.scores).all():
        raise ArithmeticError("scores that are not finite numbers")
    version.predictor.verify_users(1)
