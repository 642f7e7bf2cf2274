"""What waits for a thread: closed by cost or time, bounded, one failure not everybody's."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
import torch

from l2rec.service.batching import Batcher, Busy, Worker

Body = Callable[[Batcher[int, int], list[list[int]], threading.Event], Coroutine[Any, Any, None]]


def run(body: Body, *, max_cost: int = 4, max_wait: float = 0.02, limit: int = 100) -> None:
    """``body`` with a batcher of ``x -> 10 x``, the batches it ran, and what holds it up."""

    async def main() -> None:
        batches: list[list[int]] = []
        go = threading.Event()
        go.set()

        def work(jobs: Sequence[int]) -> list[int]:
            batches.append(list(jobs))
            assert go.wait(20)
            if any(job < 0 for job in jobs):
                raise ValueError(f"{len(jobs)} jobs, one of them bad")
            return [10 * job for job in jobs]

        worker = Worker("test", limit=4)
        batcher = Batcher(work, worker, max_cost=max_cost, max_wait=max_wait, limit=limit)
        try:
            await body(batcher, batches, go)
        finally:
            go.set()
            await batcher.close()
            worker.close()

    asyncio.run(main())


async def held_up(batcher: Batcher[int, int], go: threading.Event) -> asyncio.Task[int]:
    """One job that runs until ``go``."""
    go.clear()
    first = asyncio.ensure_future(batcher.submit(100))
    while len(batcher) or not batcher._worker.calls:
        await asyncio.sleep(0.001)
    return first


def test_what_came_meanwhile_is_one_batch_closed_by_cost() -> None:
    async def body(batcher: Any, batches: list[list[int]], go: threading.Event) -> None:
        first = await held_up(batcher, go)
        others = [asyncio.ensure_future(batcher.submit(n, cost=2)) for n in range(5)]
        await asyncio.sleep(0)
        go.set()
        assert await asyncio.gather(first, *others) == [1000, 0, 10, 20, 30, 40]
        assert batches == [[100], [0, 1], [2, 3], [4]]

    run(body)


def test_a_job_that_costs_more_than_a_batch_runs_alone() -> None:
    async def body(batcher: Any, batches: list[list[int]], go: threading.Event) -> None:
        first = await held_up(batcher, go)
        others = [asyncio.ensure_future(batcher.submit(n, cost=c)) for n, c in ((1, 1), (2, 9))]
        await asyncio.sleep(0)
        go.set()
        assert await asyncio.gather(first, *others) == [1000, 10, 20]
        assert batches == [[100], [1], [2]]

    run(body)


def test_a_batch_waits_for_others_only_where_others_come() -> None:
    async def body(batcher: Any, batches: list[list[int]], go: threading.Event) -> None:
        # Alone: not a second is waited, although the budget is an hour.
        started = time.monotonic()
        assert await asyncio.wait_for(batcher.submit(1), 20) == 10
        assert await asyncio.wait_for(batcher.submit(2), 20) == 20
        # After a batch of two, one waits for a second until the batch is full.
        await asyncio.gather(*(batcher.submit(n) for n in range(4)))
        waiting = asyncio.ensure_future(batcher.submit(5))
        await asyncio.sleep(0.05)
        assert not waiting.done() and len(batcher) == 1
        assert await asyncio.gather(*(batcher.submit(n) for n in (6, 7, 8))) == [60, 70, 80]
        assert await waiting == 50
        assert batches == [[1], [2], [0, 1, 2, 3], [5, 6, 7, 8]]
        assert time.monotonic() - started < 600

    run(body, max_wait=3600)


def test_one_bad_job_fails_alone() -> None:
    async def body(batcher: Any, batches: list[list[int]], go: threading.Event) -> None:
        first = await held_up(batcher, go)
        jobs = [asyncio.ensure_future(batcher.submit(n)) for n in (1, -2, 3)]
        await asyncio.sleep(0)
        go.set()
        found = await asyncio.gather(first, *jobs, return_exceptions=True)
        assert found[:2] == [1000, 10] and found[3] == 30
        assert isinstance(found[2], ValueError) and str(found[2]).startswith("1 jobs")

    run(body)


def test_a_full_queue_refuses_at_once_and_recovers() -> None:
    async def body(batcher: Any, batches: list[list[int]], go: threading.Event) -> None:
        first = await held_up(batcher, go)
        jobs = [asyncio.ensure_future(batcher.submit(n)) for n in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="3 requests wait for the test thread; try again in 1 s"):
            await batcher.submit(9)
        go.set()
        assert await asyncio.gather(first, *jobs) == [1000, 0, 10, 20]
        assert await batcher.submit(9) == 90

    run(body, limit=3)


def test_a_job_that_was_given_up_is_not_run() -> None:
    async def body(batcher: Any, batches: list[list[int]], go: threading.Event) -> None:
        first = await held_up(batcher, go)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await batcher.submit(1)
        second = asyncio.ensure_future(batcher.submit(2))
        go.set()
        assert await asyncio.gather(first, second) == [1000, 20]
        assert batches == [[100], [2]]

    run(body)


def test_one_thread_in_order_under_inference_mode_with_a_limit() -> None:
    async def main() -> None:
        worker = Worker("test", limit=2, nice=3)
        go = threading.Event()
        ran: list[tuple[int, int, bool]] = []

        def call(number: int) -> int:
            assert go.wait(20)
            ran.append((number, threading.get_ident(), torch.is_inference_mode_enabled()))
            return number

        calls = [asyncio.ensure_future(worker.run(call, n)) for n in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="2 calls wait for the test thread"):
            await worker.run(call, 2)
        calls.append(asyncio.ensure_future(worker.run(call, 3, urgent=True)))
        await asyncio.sleep(0)
        go.set()
        assert await asyncio.gather(*calls) == [0, 1, 3]
        assert [number for number, _, _ in ran] == [0, 1, 3]
        assert len({thread for _, thread, _ in ran}) == 1 and all(mode for *_, mode in ran)
        assert ran[0][1] != threading.get_ident() and worker.calls == 0
        worker.close()

    asyncio.run(main())
