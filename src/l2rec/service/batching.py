"""A thread for the models, and the queue before it: bounded by time, batched by cost, fair.

    Worker    one thread; calls that may wait run when no other call does
    Batcher   jobs that come at about the same time run as one call
    slices    long work in parts, so that others need not wait for all of it

Both classes belong to one event loop: they are created and used there, and only the calls leave it.
"""

from __future__ import annotations

__all__ = ["Batcher", "Busy", "Worker", "slices"]

import asyncio
import contextlib
import itertools
import math
import os
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

R = TypeVar("R")
J = TypeVar("J")

LATELY = 4
"""Batches whose pace is known."""


class Busy(Exception):
    """More work than may wait. ``retry_after``: seconds."""

    def __init__(self, what: str, retry_after: int = 1) -> None:
        super().__init__(f"{what}; try again in {retry_after} s")
        self.retry_after = retry_after


def slices(costs: Sequence[int], most: int) -> Iterator[slice]:
    """Yield runs of consecutive jobs whose costs add up to at most ``most``, or of one job."""
    start, total = 0, 0
    for place, cost in enumerate(costs):
        if place > start and total + cost > most:
            yield slice(start, place)
            start, total = place, 0
        total += cost
    if start < len(costs):
        yield slice(start, len(costs))


class Worker:
    """One thread under ``torch.inference_mode``.

    Args:
        limit: calls that may wait or run; one more raises `Busy`.
        nice: 0..19, the thread's niceness: higher values let others run first (on Linux).
    """

    def __init__(self, name: str, *, limit: int = 64, nice: int = 0) -> None:
        self.name, self.limit, self.calls = name, limit, 0
        self._nice = nice
        self._queue: queue.PriorityQueue[tuple[int, int, Callable[[], None]]]
        self._queue = queue.PriorityQueue()
        self._order = itertools.count()
        self._thread: threading.Thread | None = None
        self._closed = False

    async def run(
        self, function: Callable[..., R], *args: Any, urgent: bool = False, later: bool = False
    ) -> R:
        """Run ``function(*args)`` in the thread and return its result.

        Calls run in order, but for those that run ``later``: they wait until no other call does.

        Args:
            urgent: run it also where the limit is reached; for callers that are few.
            later: let other calls run first, also those that come after it. It should be short,
                since whoever comes next has to wait for its end.

        Raises:
            Busy: the limit is reached.
        """
        if self.calls >= self.limit and not urgent:
            raise Busy(f"{self.calls} calls wait for the {self.name} thread")
        self.calls += 1
        running = asyncio.wrap_future(self.put(lambda: function(*args), later=later))
        running.add_done_callback(self._done)
        # A caller that gives up leaves the call running: a thread cannot be stopped.
        return await asyncio.shield(running)

    def put(self, call: Callable[[], R], *, later: bool = False) -> Future[R]:
        """Queue a call, from any thread, whatever the limit."""
        future: Future[R] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                with torch.inference_mode():
                    result = call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        if self._closed:
            raise RuntimeError(f"the {self.name} thread has ended")
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name=f"l2rec-{self.name}", daemon=True
            )
            self._thread.start()
        self._queue.put((int(later), next(self._order), run))
        return future

    def _run(self) -> None:
        if self._nice and hasattr(os, "setpriority"):
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._nice)
        while True:
            priority, _, call = self._queue.get()
            if priority < 0:
                return
            call()
            del call  # with its job and its result, until the next one comes

    def _done(self, running: asyncio.Future[Any]) -> None:
        self.calls -= 1
        if not running.cancelled():
            running.exception()  # asyncio would warn of an exception that nobody retrieves

    def close(self) -> None:
        """End the thread after its current call; waiting calls are dropped."""
        self._closed = True
        if self._thread is not None:
            self._queue.put((-1, next(self._order), lambda: None))
            self._thread.join()


@dataclass
class _Waiting(Generic[J, R]):
    job: J
    cost: int
    future: asyncio.Future[R]
    since: float = field(default_factory=lambda: asyncio.get_running_loop().time())


class Batcher(Generic[J, R]):
    """Queue whose jobs run together: a batch closes by its cost, or by the wait of its first job.

    A job that is alone (the last batch had one job, and no other waits) runs at once. The callers
    take turns: one that sends many jobs delays its own.

    Args:
        run: jobs -> results, in the worker's thread.
        max_cost: cost at which a batch closes; a single job may cost more.
        max_wait: seconds after which a batch closes.
        patience: seconds; a job that would wait longer, by what a unit of cost took lately, raises
            `Busy`. None: no bound.
        later: batches let other calls of the worker run first, see `Worker.run`.
        observe: called with (jobs, cost, seconds that the first has waited) of each batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[J]], Sequence[R]],
        worker: Worker,
        *,
        max_cost: int,
        max_wait: float = 0.0,
        patience: float | None = None,
        later: bool = False,
        observe: Callable[[int, int, float], None] = lambda jobs, cost, waited: None,
    ) -> None:
        self._run, self._worker, self._observe = run, worker, observe
        self._max_cost, self._max_wait, self._patience = max_cost, max_wait, patience
        self._later = later
        self._waiting: OrderedDict[Hashable, deque[_Waiting[J, R]]] = OrderedDict()
        """Jobs by caller, whose turn it is first."""
        self._cost, self._running = 0, 0
        self._began = 0.0
        self._paces: deque[float] = deque(maxlen=LATELY)
        """Seconds that a unit of cost took, of the last batches."""
        self._last = 1
        self._came = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Count the jobs that wait."""
        return sum(map(len, self._waiting.values()))

    @property
    def busy(self) -> bool:
        """Whether jobs wait or run."""
        return bool(self._waiting or self._running)

    def expected_wait(self, of: Hashable = None) -> float:
        """Return the seconds until a job of this caller would be begun: what is running, what it
        sent before, and as much of each other caller, at the best pace of the last batches; or, if
        that is longer, what the running batch has taken by now, for each batch until then. A batch
        that was held up says little of the next, and one of few jobs little of a full one.
        """
        own = sum(one.cost for one in self._waiting.get(of, ()))
        ahead = min(self._cost, own * len(self._waiting))
        usual = (self._running + ahead) * min(self._paces, default=0.0)
        if not self._running:
            return usual
        elapsed = asyncio.get_running_loop().time() - self._began
        return max(usual, elapsed * (1 + ahead / self._max_cost))

    async def submit(self, job: J, cost: int = 1, *, of: Hashable = None) -> R:
        """Run one job in some batch and return its result. of: the caller.

        Raises:
            Busy: it would wait for too long. Also whatever ``run`` raises for this job.
        """
        self._admit(of)
        return await self._put(job, cost, of)

    async def submit_all(
        self, jobs: Sequence[J], costs: Sequence[int], *, of: Hashable = None
    ) -> list[R]:
        """Run several jobs, in one batch or in several: their results, or the first error.

        Raises:
            Busy: the first of them would wait for too long.
        """
        self._admit(of)
        futures = [self._put(job, cost, of) for job, cost in zip(jobs, costs, strict=True)]
        try:
            return await asyncio.gather(*futures)
        finally:
            for future in futures:
                future.cancel()  # of a caller that gave up, or after an error

    def _admit(self, of: Hashable) -> None:
        wait = self.expected_wait(of)
        if self._patience is not None and wait > self._patience:
            raise Busy(
                f"{wait:.1f} s of work wait for the {self._worker.name} thread",
                math.ceil(wait - self._patience),
            )

    def _put(self, job: J, cost: int, of: Hashable) -> asyncio.Future[R]:
        loop = asyncio.get_running_loop()
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._loop())
        waiting: _Waiting[J, R] = _Waiting(job, cost, loop.create_future())
        self._waiting.setdefault(of, deque()).append(waiting)
        self._cost += cost
        self._came.set()
        return waiting.future

    async def close(self) -> None:
        """Stop, and cancel the jobs that wait."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for jobs in self._waiting.values():
            for waiting in jobs:
                waiting.future.cancel()
        self._waiting.clear()
        self._cost = 0

    async def _loop(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._waiting:
                self._came.clear()
                await self._came.wait()
            await self._gather(loop)
            batch = self._take()
            if not batch:
                continue
            self._last = len(batch)
            self._running = sum(one.cost for one in batch)
            self._began = loop.time()
            waited = self._began - min(one.since for one in batch)
            self._observe(len(batch), self._running, waited)
            await self._answer(batch)
            self._paces.append((loop.time() - self._began) / max(self._running, 1))
            self._running = 0

    async def _gather(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait until the batch is to be closed."""
        until = min(jobs[0].since for jobs in self._waiting.values()) + self._max_wait
        alone = self._last == 1
        while self._cost < self._max_cost and not (alone and len(self) == 1):
            left = until - loop.time()
            if left <= 0:
                return
            self._came.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._came.wait(), left)

    def _take(self) -> list[_Waiting[J, R]]:
        """Take jobs up to ``max_cost``, at least one: the oldest of each caller in turn, and none
        that was given up.
        """
        batch: list[_Waiting[J, R]] = []
        cost = 0
        while self._waiting:
            of, jobs = next(iter(self._waiting.items()))
            if not jobs[0].future.done():
                if batch and cost + jobs[0].cost > self._max_cost:
                    break
                batch.append(jobs[0])
                cost += jobs[0].cost
            self._cost -= jobs.popleft().cost
            if jobs:
                self._waiting.move_to_end(of)
            else:
                del self._waiting[of]
        return batch

    async def _answer(self, batch: Sequence[_Waiting[J, R]]) -> None:
        try:
            results = await self._worker.run(
                self._run, [one.job for one in batch], urgent=True, later=self._later
            )
        except Exception as error:
            if len(batch) == 1:
                if not batch[0].future.done():
                    batch[0].future.set_exception(error)
                return
            # One of them is to blame: run them one by one, so that the others are answered.
            for one in batch:
                await self._answer([one])
            return
        for one, result in zip(batch, results, strict=True):
            if not one.future.done():
                one.future.set_result(result)
