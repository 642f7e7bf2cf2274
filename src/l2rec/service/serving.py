"""The service behind the routes: threads, batches, the cache, and the change of versions.

Its methods run in one event loop; models run in one thread, storage in a few others.
"""

from __future__ import annotations

__all__ = ["Service"]

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from l2rec.data.ragged import Ragged
from l2rec.errors import CheckpointError, L2RecError
from l2rec.modules.memory import trim
from l2rec.service.audience import Audience
from l2rec.service.batching import Batcher, Worker, slices
from l2rec.service.cache import Users, key_of
from l2rec.service.events import Event, EventLog
from l2rec.service.experiments import record_arms
from l2rec.service.live import Live
from l2rec.service.metrics import Metrics
from l2rec.service.ranking import Query, Ranked, User, are_numbers, encode, rank
from l2rec.service.security import Refused, charge, current_key
from l2rec.service.settings import Settings
from l2rec.service.version import Change, ItemState, ItemTexts, Version

T = TypeVar("T")
J = TypeVar("J", bound="_Encode | _Embed")

logger = logging.getLogger("l2rec.service")

RANKED_TOGETHER = 256
"""Requests that are ranked in one batch at most."""
CHARACTERS_OF_TOKEN = 4
"""Characters of a text that count as one token, before it is known how many they are."""
CACHED_BYTES = 1 << 28
"""Bytes of all cached users at most."""
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


@dataclass(frozen=True, eq=False)
class _Embed:
    """Job of the encoder: one text."""

    version: Version
    text: str


def encode_jobs(jobs: Sequence[_Encode]) -> list[User]:
    """Encode histories, those of one version together. Runs in the models' thread."""
    return _by_version(
        jobs, lambda version, some: encode(version, Ragged.from_rows([job.row for job in some]))
    )


def embed_jobs(jobs: Sequence[_Embed]) -> list[Tensor]:
    """Embed texts, those of one version together. Runs in the models' thread."""
    return _by_version(
        jobs, lambda version, some: version.embed_texts([job.text for job in some]).unbind()
    )


def _by_version(jobs: Sequence[J], run: Callable[[Version, list[J]], Sequence[T]]) -> list[T]:
    """Run the jobs of each version together; return the results in the order of the jobs."""
    results: dict[int, T] = {}
    groups: dict[int, list[int]] = {}
    for number, job in enumerate(jobs):
        groups.setdefault(id(job.version), []).append(number)
    for numbers in groups.values():
        some = [jobs[n] for n in numbers]
        results |= dict(zip(numbers, run(some[0].version, some), strict=True))
    return [results[number] for number in range(len(jobs))]


class Service:
    """Threads, batches, cache and versions of one server.

    ``worker``: the thread of all models that serve. Anything else that runs a model runs there too:
    ``await service.worker.run(function, ...)``; with ``later=True``, and in slices, where nobody
    waits for a recommendation.
    """

    def __init__(self, settings: Settings, live: Live, log: EventLog) -> None:
        self.settings, self.live, self.log = settings, live, log
        self.metrics = Metrics()
        self.worker = Worker("model")
        self.shadow_worker = Worker("shadow", nice=19)
        self._ranker = Worker("ranking")
        self._storage = ThreadPoolExecutor(STORAGE_THREADS, thread_name_prefix="l2rec-storage")
        self.encoding: Batcher[_Encode, User] = Batcher(
            encode_jobs,
            self.worker,
            max_cost=settings.batch_tokens,
            max_wait=settings.batch_ms / 1000,
            patience=settings.queue,
            observe=self._batched,
        )
        # What nobody waits for to be recommended something runs in slices, between the batches.
        self.encoding_later: Batcher[_Encode, User] = Batcher(
            encode_jobs,
            self.worker,
            max_cost=settings.slice_tokens,
            max_wait=settings.batch_ms / 1000,
            patience=settings.queue,
            later=True,
            observe=self._batched,
        )
        self.embedding: Batcher[_Embed, Tensor] = Batcher(
            embed_jobs,
            self.worker,
            max_cost=settings.slice_tokens,
            patience=settings.queue,
            later=True,
        )
        # No waiting here: requests that come while one batch is ranked are the next batch.
        self.ranking: Batcher[Query, Ranked] = Batcher(rank, self._ranker, max_cost=RANKED_TOGETHER)
        self.audience = Audience(log, self.stored)
        self._cache = Users(settings.cache, CACHED_BYTES)
        self.changing = asyncio.Lock()
        """Lock for deriving a version from a loaded one and putting it in its place."""
        self._items: ItemState | None = None
        self._unstored: tuple[Version, ItemTexts, Version] | None = None
        """The live version, items that could not be stored, and the version with them, for when
        they are put again: the rows that they take in the model are not given back."""
        self._ready: tuple[float, asyncio.Future[list[str]]] | None = None
        self.metrics.gauge(
            "l2rec_queue_histories", "Histories that wait.", lambda: len(self.encoding)
        )
        self.metrics.gauge(
            "l2rec_queue_slices",
            "Texts and histories that wait to be embedded or explained.",
            lambda: len(self.embedding) + len(self.encoding_later),
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
        return not self.encoding.busy and not self.worker.calls

    # -- users -----------------------------------------------------------------------------------

    async def user(self, version: Version, history: Sequence[str]) -> User:
        """Return the user of a history, from the cache or encoded now.

        Raises:
            DataError: unknown ids; all are named.
            Busy: it would wait for too long.
        """
        rows = version.predictor.rows([history])
        cached = self._cached(version, rows[0])
        if cached is not None:
            return cached
        cost = int(version.predictor.costs(rows)[0])
        charge(cost)
        job = _Encode(version, rows[0])
        user = await self.encoding.submit(job, cost, of=current_key())
        self._keep(job, user)
        return user

    async def users(self, version: Version, histories: Sequence[Sequence[str]]) -> list[User]:
        """Return the users of several histories, encoded in slices: all, or the first error and
        none.

        Raises:
            DataError: unknown ids; all are named.
            Busy: they would wait for too long.
        """
        rows = version.predictor.rows(histories)
        found = [self._cached(version, row) for row in (rows[n] for n in range(len(rows)))]
        missing = [n for n, user in enumerate(found) if user is None]
        jobs = [_Encode(version, rows[n]) for n in missing]
        costs = version.predictor.costs(rows)[missing].tolist()
        charge(sum(costs))
        users = await self.encoding_later.submit_all(jobs, costs, of=current_key())
        for job, user in zip(jobs, users, strict=True):
            self._keep(job, user)
        rest = iter(users)
        return [next(rest) if user is None else user for user in found]

    def _cached(self, version: Version, row: npt.NDArray[np.integer]) -> User | None:
        cached = self._cache.get(key_of(version, row))
        self.metrics.cache.labels("miss" if cached is None else "hit").inc()
        return cached

    def _keep(self, job: _Encode, user: User) -> None:
        if any(loaded.serial == job.version.serial for loaded in self.live.all().values()):
            self._cache.keep(key_of(job.version, job.row), user)

    async def vectors(self, version: Version, texts: Sequence[str]) -> list[Tensor]:
        """Return the item vectors [D] of raw texts, embedded in slices.

        Raises:
            DataError: a text that the model reads nothing in.
            Busy: they would wait for too long.
        """
        costs = self._costs(texts)
        charge(sum(costs))
        jobs = [_Embed(version, text) for text in texts]
        return await self.embedding.submit_all(jobs, costs, of=current_key())

    def _costs(self, texts: Iterable[str]) -> list[int]:
        """Return about what texts cost to read; no more than a slice, as nothing beyond is read."""
        most = self.settings.slice_tokens
        return [min(most, 1 + len(text) // CHARACTERS_OF_TOKEN) for text in texts]

    # -- storage ---------------------------------------------------------------------------------

    async def append(self, events: Sequence[Event]) -> int:
        """Store events, and return the number of new ones. No thread waits for the disk, so that
        reads go on while nothing can be written.

        Raises:
            StorageError: nothing was stored.
        """
        try:
            return await asyncio.wrap_future(self.log.appending(events))
        except Exception:
            self.metrics.storage_failures.labels("append").inc()
            raise

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
        """Update the metrics, and drop what was kept of versions that are gone."""
        versions = self.live.all()
        if self._unstored is not None and self._unstored[0] is not versions["live"]:
            self._unstored = None
        self.metrics.loaded(versions)
        self.audience.forget_others(versions.values())
        self._cache.keep_only({version.serial for version in versions.values()})

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
        changes = await asyncio.shield(asyncio.ensure_future(self._put(items)))
        # The vectors of all items may have moved, and the C library would keep their old room.
        await self.worker.run(trim, urgent=True, later=True)
        return changes

    async def _put(self, items: ItemTexts) -> dict[str, Change]:
        async with self.changing:
            live, state = self.live.current(), (items, frozenset[str]())
            changes = live.changes(items)
            rows = sum(change != "kept" for change in changes.values())
            if rows and not live.takes_new_items:
                raise Refused(
                    409,
                    f"{live.name} ranks the items that it was trained on, with the texts that they "
                    "had; deploy a model that reads texts",
                )
            # First the steps that the items can fail, then the disk, then the swap.
            if self._unstored is None or self._unstored[1] != items:
                if rows and live.added + rows > self.settings.new_items:
                    raise Refused(
                        409,
                        f"{live.added} rows were added since {live.name} was loaded, at most "
                        f"{self.settings.new_items} may be; restart or deploy to make room",
                    )
                charge(sum(self._costs(text for text, _ in items.values())))
                self._unstored = (live, items, await self._with(live, "live", state))
            fresh = {"live": self._unstored[2]}
            self._items = None  # another server may undo this before the next sync
            await self.stored("put_items", self.log.put_items, dict(items))
            for role, version in self.live.all().items():
                if role != "live":
                    fresh[role] = await self._with(version, role, state)
            self._swap(fresh)
        for change in changes.values():
            self.metrics.items.labels(change).inc()
        return changes

    async def _with(self, version: Version, role: str, state: ItemState) -> Version:
        """Return ``version.brought_to`` this state, made in slices."""
        put, gone = state
        pairs = list((await asyncio.to_thread(version.missing, put)).items())
        costs = self._costs(text for _, (text, _) in pairs)
        for some in slices(costs, self.settings.slice_tokens):
            part = (dict(pairs[some]), frozenset[str]())
            version = await self.thread_of(role).run(
                version.brought_to, part, urgent=True, later=True
            )
        return await asyncio.to_thread(version.without_items, gone)

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
            self._items = None  # another server may undo this before the next sync
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
                updated = await self._with(version, role, state)
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
                version = await self._with(version, role, state)
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

        Concurrent calls share one check, as do calls within `READY_REUSED` seconds. Whoever asks
        needs no key, so addresses and paths are in the log alone.
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
            problems.append("the model is not the one that was trained")
        except Exception as error:
            logger.exception("the model cannot infer")
            problems.append(f"the model cannot infer: {type(error).__name__}")
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self.stored("ping", self.log.ping)
        except TimeoutError:
            problems.append(f"the event log gave no answer within {READY_SECONDS:g} s")
        except L2RecError as error:
            logger.error("not ready: %s", error)
            problems.append("the event log is away")
        return problems

    async def close(self) -> None:
        """End the threads; jobs that wait are cancelled."""
        for batcher in (self.encoding, self.encoding_later, self.embedding, self.ranking):
            await batcher.close()
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
    found = len(ranked.rows) or version.matrix is None  # a search may find what is deleted alone
    if not found or not are_numbers(version, user.vector[None]):
        raise ArithmeticError("scores that are not finite numbers")
    version.predictor.verify_users(1)
