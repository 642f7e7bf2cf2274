"""What waits for a thread: closed by cost or time, bounded by time, fair; one failure not all's."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
import torch

from l2rec.service.batching import Batcher, Busy, Worker, slices

Body = Callable[[Batcher[int, int], list[list[int]], threading.Event], Coroutine[Any, Any, None]]


def run(
    body: Body, *, max_cost: int = 4, max_wait: float = 0.02, patience: float | None = None
) -> None:
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
        batcher = Batcher(work, worker, max_cost=max_cost, max_wait=max_wait, patience=patience)
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


def test_what_would_wait_too_long_is_refused_at_once() -> None:
    async def body(batcher: Any, batches: list[list[int]], go: threading.Event) -> None:
        first = await held_up(batcher, go)
        # Nothing is known of the pace yet.
        second = asyncio.ensure_future(batcher.submit(1, cost=3))
        await asyncio.sleep(0.3)
        # By now it is: at least 0.3 s for a batch, and the second is three quarters of another.
        with pytest.raises(Busy, match=r"0\.\d s of work wait for the test thread") as refused:
            await batcher.submit(2)
        assert refused.value.retry_after == 1
        go.set()
        assert await asyncio.gather(first, second) == [1000, 10]
        assert await batcher.submit(2) == 20  # nothing waits: it is begun at once
        assert [100] in batches and [2] in batches

    run(body, patience=0.5)


def test_a_batch_that_was_held_up_refuses_nothing_that_would_soon_be_begun() -> None:
    """A busy neighbour, for a moment: as slow as this, 63 more jobs would take 19 s."""

    async def body(batcher: Any, batches: list[list[int]], go: threading.Event) -> None:
        assert [await batcher.submit(n) for n in range(4)] == [0, 10, 20, 30]
        first = await held_up(batcher, go)
        many = [asyncio.ensure_future(batcher.submit(n)) for n in range(32)]
        await asyncio.sleep(0.3)
        many += [asyncio.ensure_future(batcher.submit(n)) for n in range(31)]
        await asyncio.sleep(0)
        go.set()
        await first
        many.append(asyncio.ensure_future(batcher.submit(31)))  # nor what comes next
        assert await asyncio.gather(*many) == [10 * n for n in [*range(32), *range(32)]]

    run(body, max_cost=100, patience=2)


def test_the_expected_wait_is_of_what_comes_before() -> None:
    async def body(batcher: Any, batches: list[list[int]], go: threading.Event) -> None:
        first = await held_up(batcher, go)
        await asyncio.sleep(0.05)
        go.set()
        await first
        assert batcher.expected_wait() == 0
        first = await held_up(batcher, go)
        many = [asyncio.ensure_future(batcher.submit(n, cost=2, of="many")) for n in range(6)]
        await asyncio.sleep(0)
        # One unit runs; 12 of "many" wait, and nothing of "few".
        assert batcher.expected_wait("many") / batcher.expected_wait("few") == pytest.approx(
            13, rel=0.2
        )
        few = asyncio.ensure_future(batcher.submit(9, cost=3, of="few"))
        await asyncio.sleep(0)
        # Of those who take turns, one gets as far as the other: "few" has 3, and 3 of "many".
        assert batcher.expected_wait("few") / batcher.expected_wait("new") == pytest.approx(
            7, rel=0.2
        )
        go.set()
        await asyncio.gather(first, few, *many)

    run(body, max_cost=4)


def test_callers_take_turns() -> None:
    async def body(batcher: Any, batches: list[list[int]], go: threading.Event) -> None:
        first = await held_up(batcher, go)
        many = asyncio.ensure_future(batcher.submit_all(range(10), [1] * 10, of="many"))
        await asyncio.sleep(0)
        one = asyncio.ensure_future(batcher.submit(50, of="one"))
        await asyncio.sleep(0)
        go.set()
        assert await one == 500 and not many.done()
        assert await many == [10 * n for n in range(10)] and await first == 1000
        assert batches == [[100], [0, 50, 1, 2], [3, 4, 5, 6], [7, 8, 9]]

    run(body)


def test_of_several_jobs_one_fails_for_all_and_the_rest_is_not_run() -> None:
    async def body(batcher: Any, batches: list[list[int]], go: threading.Event) -> None:
        with pytest.raises(ValueError, match="one of them bad"):
            await batcher.submit_all([-1, *range(1, 9)], [4] * 9)
        await asyncio.sleep(0.05)
        assert batches[0] == [-1] and len(batches) <= 2 and not batcher.busy

    run(body)


def test_a_recommendation_waits_for_one_slice_at_most() -> None:
    async def main() -> None:
        ran: list[tuple[str, list[int]]] = []
        go, began = threading.Event(), threading.Event()

        def work(kind: str) -> Callable[[Sequence[int]], list[int]]:
            def run(jobs: Sequence[int]) -> list[int]:
                ran.append((kind, list(jobs)))
                began.set()
                assert go.wait(20)
                return list(jobs)

            return run

        worker = Worker("test")
        now = Batcher(work("now"), worker, max_cost=4)
        later = Batcher(work("later"), worker, max_cost=4, later=True)
        other = Batcher(work("other"), worker, max_cost=4, later=True)
        long = asyncio.ensure_future(later.submit_all(range(12), [2] * 12))
        await asyncio.sleep(0)
        while not began.is_set():
            await asyncio.sleep(0.001)
        long_too = asyncio.ensure_future(other.submit_all(range(12), [2] * 12))
        await asyncio.sleep(0.01)  # it waits in the thread's queue ...
        ranked = asyncio.ensure_future(now.submit(1))
        await asyncio.sleep(0.01)  # ... before this one, which came later
        go.set()
        assert await ranked == 1
        assert [kind for kind, _ in ran[:2]] == ["later", "now"] and ran[0][1] == [0, 1]
        await asyncio.gather(long, long_too)
        assert all(len(jobs) <= 2 for kind, jobs in ran if kind != "now")
        for batcher in (now, later, other):
            await batcher.close()
        worker.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ([], []),
        ([9], [slice(0, 1)]),
        ([2, 2, 1, 9, 1], [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]),
        ([1, 1, 1, 1, 1], [slice(0, 4), slice(4, 5)]),
    ],
)
def test_slices(costs: list[int], expected: list[slice]) -> None:
    assert list(slices(costs, 4)) == expected


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
