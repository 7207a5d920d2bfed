"""Requests of several robots gathered into one call, on a thread beside the event loop.

    submit ──▶ queue (bounded) ──▶ window ──▶ one call of ``work`` on one thread ──▶ answers

The window ends when the batch is full, when nobody else could join, or after its time. While a call
runs, later requests gather for the next one.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

_log = logging.getLogger(__name__)
_PAUSE = 0.02  # seconds; robots that wait for an answer ask again sooner


class BusyError(Exception):
    """The queue is full."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came back for one item.

    Attributes:
      value: of ``work``.
      queue_ms: milliseconds between ``submit`` and the call.
      batch: items of the call it was answered in.
    """

    value: Any
    queue_ms: float
    batch: int


@dataclasses.dataclass
class _Waiting:
    item: Any
    future: asyncio.Future[Answer]
    since: float


class Batcher:
    """Answers items in batches; one object serves one event loop."""

    def __init__(
        self,
        work: Callable[[Sequence[Any]], Sequence[Any]],
        *,
        max_batch: int,
        window_seconds: float,
        capacity: int,
        idle: Callable[[], bool] | None = None,
        others: Callable[[], int] | None = None,
    ) -> None:
        """Binds what does the work.

        Args:
          work: answers a batch of items, one value each, in order; runs on one thread of its own.
          max_batch: most items of one call.
          window_seconds: how long the first item waits for others.
          capacity: most items that wait.
          idle: done on the same thread in pauses; returns whether there was anything to do.
          others: how many items could be submitted at all at this moment (connected robots).
        """
        self._work, self._idle = work, idle
        self._max_batch, self._window, self._capacity = max_batch, window_seconds, capacity
        self._others = others or (lambda: max_batch)
        self._queue: collections.deque[_Waiting] = collections.deque()
        self._arrived = asyncio.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="policy")

    @property
    def waiting(self) -> int:
        """Items in the queue."""
        return len(self._queue)

    async def submit(self, item: Any) -> Answer:
        """Waits for the answer to one item; a waiter that is canceled is skipped.

        Raises:
          BusyError: the queue is full.
          Exception: what ``work`` raised for this item alone.
        """
        if len(self._queue) >= self._capacity:
            raise BusyError(f"{self._capacity} requests are waiting")
        future = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(item, future, time.perf_counter()))
        self._arrived.set()
        return await future

    async def run(self) -> None:
        """Answers until canceled."""
        while True:
            await self._rest()
            await self._gather()
            await self._answer()

    def close(self) -> None:
        """Waits for the call that runs and ends the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _rest(self) -> None:
        """Until something waits; a pause in which nothing arrives is used to work ahead."""
        pause = None if self._idle is None else _PAUSE
        while not self._queue:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), pause)
            except TimeoutError:
                pause = 0.0 if await self._on_thread(self._idle) else None

    async def _gather(self) -> None:
        """Waits for more items until the window of the first one ends."""
        ends = self._queue[0].since + self._window
        while len(self._queue) < min(self._max_batch, self._others()):
            left = ends - time.perf_counter()
            if left <= 0:
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except TimeoutError:
                return

    async def _answer(self) -> None:
        """Takes a batch from the queue, has it answered, and hands the answers out."""
        batch: list[_Waiting] = []
        while self._queue and len(batch) < self._max_batch:
            waiting = self._queue.popleft()
            if not waiting.future.done():
                batch.append(waiting)
        if not batch:
            return
        begin = time.perf_counter()
        outcomes = await self._on_thread(self._outcomes, [w.item for w in batch])
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if waiting.future.done():
                continue
            if isinstance(outcome, Exception):
                waiting.future.set_exception(outcome)
            else:
                queue_ms = 1e3 * (begin - waiting.since)
                waiting.future.set_result(Answer(outcome, queue_ms, len(batch)))

    def _outcomes(self, items: Sequence[Any]) -> Sequence[Any]:
        """A value or an exception per item; items of a batch that fails are tried alone."""
        try:
            return self._work(items)
        except Exception as error:
            if len(items) == 1:
                return [error]
            _log.warning("a batch of %d failed (%s); trying each alone", len(items), error)
            return [self._outcomes([item])[0] for item in items]

    async def _on_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
