"""A thread for the models, and the queue before it: bounded, batched by cost, never blocking.

    Worker    one thread; calls run one after the other
    Batcher   jobs that come at about the same time run as one call

Both belong to one event loop: they are created and used there, and only the calls leave it.
"""

from __future__ import annotations

__all__ = ["Batcher", "Busy", "Worker"]

import asyncio
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

R = TypeVar("R")
J = TypeVar("J")


class Busy(Exception):
    """A full queue. ``retry_after``: seconds."""

    def __init__(self, what: str, retry_after: int = 1) -> None:
        super().__init__(f"{what}; try again in {retry_after} s")
        self.retry_after = retry_after


class Worker:
    """One thread under ``torch.inference_mode``.

    Args:
        limit: calls that may wait or run; one more raises `Busy`.
        nice: 0..19, the thread's niceness: higher values let others run first (on Linux).
    """

    def __init__(self, name: str, *, limit: int = 64, nice: int = 0) -> None:
        self.name, self.limit, self.calls = name, limit, 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"l2rec-{name}")
        self._nice = nice
        self._ready = False

    async def run(self, function: Callable[..., R], *args: Any, urgent: bool = False) -> R:
        """Run ``function(*args)`` in the thread, after all earlier calls, and return its result.

        Args:
            urgent: run it also where the limit is reached; for callers that are few.

        Raises:
            Busy: the limit is reached.
        """
        if self.calls >= self.limit and not urgent:
            raise Busy(f"{self.calls} calls wait for the {self.name} thread")

        def call() -> R:
            if not self._ready:
                self._ready = True
                if self._nice and hasattr(os, "setpriority"):
                    with contextlib.suppress(OSError):
                        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._nice)
            with torch.inference_mode():
                return function(*args)

        self.calls += 1
        running = asyncio.get_running_loop().run_in_executor(self._pool, call)
        running.add_done_callback(self._done)
        # A caller that gives up leaves the call running: a thread cannot be stopped.
        return await asyncio.shield(running)

    def _done(self, running: asyncio.Future[Any]) -> None:
        self.calls -= 1
        if not running.cancelled():
            running.exception()  # asyncio would warn of an exception that nobody retrieves

    def close(self) -> None:
        """End the thread after its current call; waiting calls are dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)


@dataclass
class _Waiting(Generic[J, R]):
    job: J
    cost: int
    future: asyncio.Future[R]
    since: float = field(default_factory=lambda: asyncio.get_running_loop().time())


class Batcher(Generic[J, R]):
    """Queue whose jobs run together: a batch closes by its cost, or by the wait of its first job.

    A job that is alone (the last batch had one job, and no other waits) runs at once.

    Args:
        run: jobs -> results, in the worker's thread.
        max_cost: cost at which a batch closes; a single job may cost more.
        max_wait: seconds after which a batch closes.
        limit: jobs that may wait; one more raises `Busy`.
        observe: called with (jobs, cost, seconds that the first has waited) of each batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[J]], Sequence[R]],
        worker: Worker,
        *,
        max_cost: int,
        max_wait: float,
        limit: int,
        observe: Callable[[int, int, float], None] = lambda jobs, cost, waited: None,
    ) -> None:
        self._run, self._worker, self._observe = run, worker, observe
        self._max_cost, self._max_wait, self._limit = max_cost, max_wait, limit
        self._waiting: deque[_Waiting[J, R]] = deque()
        self._cost = 0
        self._last = 1
        self._came = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Count the jobs that wait."""
        return len(self._waiting)

    async def submit(self, job: J, cost: int = 1) -> R:
        """Run one job in some batch and return its result.

        Raises:
            Busy: the limit is reached. Also whatever ``run`` raises for this job.
        """
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._loop())
        if len(self._waiting) >= self._limit:
            raise Busy(f"{len(self._waiting)} requests wait for the {self._worker.name} thread")
        waiting: _Waiting[J, R] = _Waiting(job, cost, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._cost += cost
        self._came.set()
        return await waiting.future

    async def close(self) -> None:
        """Stop, and cancel the jobs that wait."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for waiting in self._waiting:
            waiting.future.cancel()
        self._waiting.clear()

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
            self._observe(len(batch), sum(one.cost for one in batch), loop.time() - batch[0].since)
            await self._answer(batch)

    async def _gather(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait until the batch is to be closed."""
        until = self._waiting[0].since + self._max_wait
        alone = self._last == 1
        while self._cost < self._max_cost and not (alone and len(self._waiting) == 1):
            left = until - loop.time()
            if left <= 0:
                return
            self._came.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._came.wait(), left)

    def _take(self) -> list[_Waiting[J, R]]:
        """Take the oldest jobs up to ``max_cost``, at least one, and none that was given up."""
        batch: list[_Waiting[J, R]] = []
        cost = 0
        while self._waiting:
            first = self._waiting[0]
            if not first.future.done():
                if batch and cost + first.cost > self._max_cost:
                    break
                batch.append(first)
                cost += first.cost
            self._waiting.popleft()
            self._cost -= first.cost
        return batch

    async def _answer(self, batch: Sequence[_Waiting[J, R]]) -> None:
        try:
            results = await self._worker.run(self._run, [one.job for one in batch], urgent=True)
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
