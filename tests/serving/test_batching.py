"""Batches: gathered within a window, bounded, and no item suffers from another."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from univla_jax.serving.batching import Batcher, BusyError


class Work:
    """Doubles numbers; remembers the batches, and can be made to wait."""

    def __init__(self):
        self.batches, self.gate, self.begun = [], threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, items):
        self.begun.set()
        assert self.gate.wait(10)
        self.batches.append(list(items))
        if "bad" in items:
            raise ValueError("bad item")
        return [2 * item for item in items]


@contextlib.asynccontextmanager
async def _running(work, **options):
    options = {"max_batch": 4, "window_seconds": 0.05, "capacity": 8, **options}
    batcher = Batcher(work, **options)
    task = asyncio.create_task(batcher.run())
    try:
        yield batcher
    finally:
        task.cancel()
        batcher.close()


def _run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 20))


def test_requests_within_the_window_share_a_call():
    async def scenario():
        work = Work()
        async with _running(work) as batcher:
            answers = await asyncio.gather(*(batcher.submit(i) for i in range(6)))
        assert [a.value for a in answers] == [0, 2, 4, 6, 8, 10]
        assert work.batches == [[0, 1, 2, 3], [4, 5]]
        assert [a.batch_size for a in answers] == [4, 4, 4, 4, 2, 2]

    _run(scenario())


def test_nobody_waits_where_nobody_else_could_join():
    async def scenario():
        async with _running(Work(), window_seconds=10.0, num_clients=lambda: 1) as batcher:
            assert (await batcher.submit(1)).value == 2

    _run(scenario())


def test_the_queue_is_bounded():
    async def scenario():
        work = Work()
        work.gate.clear()
        async with _running(work, capacity=2, window_seconds=0.0) as batcher:
            first = asyncio.create_task(batcher.submit(1))
            await asyncio.to_thread(work.begun.wait, 10)
            rest = [asyncio.create_task(batcher.submit(i)) for i in (2, 3)]
            await asyncio.sleep(0)
            with pytest.raises(BusyError, match="2 requests are waiting"):
                await batcher.submit(4)
            work.gate.set()
            assert [a.value for a in await asyncio.gather(first, *rest)] == [2, 4, 6]

    _run(scenario())


def test_a_failing_item_fails_alone():
    async def scenario():
        work = Work()
        async with _running(work) as batcher:
            items = [batcher.submit(i) for i in (1, "bad", 3)]
            one, bad, three = await asyncio.gather(*items, return_exceptions=True)
            assert (one.value, three.value) == (2, 6) and "bad item" in str(bad)
            assert (await batcher.submit(5)).value == 10

    _run(scenario())


def test_who_gave_up_is_skipped():
    async def scenario():
        work = Work()
        work.gate.clear()
        async with _running(work, window_seconds=0.0) as batcher:
            first = asyncio.create_task(batcher.submit(1))
            await asyncio.to_thread(work.begun.wait, 10)
            gone = asyncio.create_task(batcher.submit(2))
            await asyncio.sleep(0)
            gone.cancel()
            work.gate.set()
            assert (await first).value == 2 and (await batcher.submit(3)).value == 6
        assert work.batches == [[1], [3]]

    _run(scenario())


def test_work_ahead_happens_while_nothing_waits():
    async def scenario():
        left, done = [3], asyncio.Event()
        loop = asyncio.get_running_loop()

        def idle():
            left[0] -= 1
            if left[0] == 0:
                loop.call_soon_threadsafe(done.set)
            return left[0] > 0

        async with _running(Work(), on_idle=idle) as batcher:
            assert (await batcher.submit(1)).value == 2
            await done.wait()

    _run(scenario())


def test_work_ahead_that_fails_is_logged_and_harms_no_request(caplog):
    async def scenario():
        failed = asyncio.Event()
        loop, calls = asyncio.get_running_loop(), []

        def idle():
            calls.append(1)
            loop.call_soon_threadsafe(failed.set)
            raise MemoryError("no room to work ahead")

        async with _running(Work(), on_idle=idle) as batcher:
            for number in (1, 2):
                failed.clear()
                assert (await batcher.submit(number)).value == 2 * number
                await failed.wait()
        assert len(calls) == 2

    _run(scenario())
    assert "no room to work ahead" in caplog.text
