"""Dynamic batching: requests of several robots gathered into one call of the policy.

    submit ──▶ bounded queue ──▶ window ──▶ one call on one worker thread ──▶ results

The window closes when the batch is full, when every connected robot is in it, or when its time is
over. While a call runs, later requests queue for the next one. Work ahead is optional: where it
fails, requests go on without it.
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
_IDLE_DELAY = 0.02  # seconds; a robot in a control loop asks again sooner than that


class BusyError(Exception):
    """There is no room for a request now: the queue is full, or the memory."""


@dataclasses.dataclass(frozen=True)
class BatchResult:
    """The result of one item.

    Attributes:
      value: what the batched function returned for it.
      queue_ms: milliseconds between ``submit`` and the call.
      batch_size: items of the call it was part of.
    """

    value: Any
    queue_ms: float
    batch_size: int


@dataclasses.dataclass
class _QueuedItem:
    item: Any
    future: asyncio.Future[BatchResult]
    submitted: float  # time.perf_counter()


class Batcher:
    """Applies a batched function to items submitted one by one; belongs to one event loop."""

    def __init__(
        self,
        function: Callable[[Sequence[Any]], Sequence[Any]],
        *,
        max_batch: int,
        window_seconds: float,
        capacity: int,
        on_idle: Callable[[], bool] = lambda: False,
        num_clients: Callable[[], int] | None = None,
    ) -> None:
        """Stores the settings; ``run`` starts processing.

        Args:
          function: maps a batch of items to one value each, in order; called on a thread of its
            own, one batch at a time.
          max_batch: largest batch.
          window_seconds: how long the first item of a batch waits for others.
          capacity: largest number of queued items.
          on_idle: called on the same thread while the queue is empty, again and again until it
            returns False or raises, which is logged and ends the work ahead until the next batch.
          num_clients: how many items could be queued at once at this moment (each connected robot
            has one request in flight); ``max_batch`` by default.
        """
        self._function, self._on_idle = function, on_idle
        self._max_batch, self._window, self._capacity = max_batch, window_seconds, capacity
        self._num_clients = num_clients or (lambda: max_batch)
        self._queue: collections.deque[_QueuedItem] = collections.deque()
        self._arrived = asyncio.Event()
        self._waiting: set[asyncio.Future[BatchResult]] = set()
        self._under_way: concurrent.futures.Future[Any] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="policy")

    @property
    def queue_length(self) -> int:
        """Items in the queue."""
        return len(self._queue)

    async def submit(self, item: Any) -> BatchResult:
        """Queues one item and waits for its result; an item whose waiter was canceled is dropped.

        Raises:
          BusyError: the queue is full, or the function found no memory.
          Exception: what the function raised for this item alone.
        """
        if len(self._queue) >= self._capacity:
            raise BusyError(f"{self._capacity} requests are waiting")
        future = asyncio.get_running_loop().create_future()
        self._queue.append(_QueuedItem(item, future, time.perf_counter()))
        self._arrived.set()
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        return await future

    async def run(self) -> None:
        """Processes batches until it is canceled."""
        while True:
            await self._wait_for_item()
            await self._wait_for_window()
            await self._process_batch()

    def abandon(self, reason: str) -> None:
        """Lets every ``submit`` that still waits raise BusyError."""
        for future in list(self._waiting):
            if not future.done():
                future.set_exception(BusyError(reason))

    def close(self, seconds: float | None = None) -> bool:
        """Ends the thread after the call under way.

        Args:
          seconds: the longest wait for it; None waits until it is done.

        Returns:
          whether it is done.
        """
        self._thread.shutdown(wait=False, cancel_futures=True)
        calls = [] if self._under_way is None else [self._under_way]
        return not concurrent.futures.wait(calls, seconds).not_done

    async def _wait_for_item(self) -> None:
        # ``on_idle`` prefills the prompts of calls to come. It competes with them for the one
        # thread, so it begins only after a pause in which nothing arrived, and the queue is looked
        # at again between two of its steps; once it returns False there is nothing left to do
        # before the next request.
        delay: float | None = _IDLE_DELAY
        while not self._queue:
            if not await self._arrives_within(delay):
                delay = 0.0 if await self._on_thread(self._work_ahead) else None

    def _work_ahead(self) -> bool:
        """One step of ``on_idle``; whether there may be more to do."""
        try:
            return self._on_idle()
        except Exception:
            _log.exception("work ahead failed; requests are answered without it")
            return False

    async def _wait_for_window(self) -> None:
        # The window is counted from the arrival of its first item, so an item that queued while
        # the previous call ran does not wait once more. Nobody is waited for in vain: a batch that
        # holds a request of every connected robot cannot grow.
        end = self._queue[0].submitted + self._window
        while len(self._queue) < min(self._max_batch, self._num_clients()):
            left = end - time.perf_counter()
            if left <= 0 or not await self._arrives_within(left):
                return

    async def _arrives_within(self, seconds: float | None) -> bool:
        self._arrived.clear()
        try:
            await asyncio.wait_for(self._arrived.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _process_batch(self) -> None:
        batch: list[_QueuedItem] = []
        while self._queue and len(batch) < self._max_batch:
            queued = self._queue.popleft()
            if not queued.future.done():
                batch.append(queued)
        if not batch:
            return
        begin = time.perf_counter()
        outcomes = await self._on_thread(self._call, [queued.item for queued in batch])
        for queued, outcome in zip(batch, outcomes, strict=True):
            if queued.future.done():
                continue  # its robot went away during the call
            if isinstance(outcome, Exception):
                queued.future.set_exception(outcome)
            else:
                queue_ms = 1e3 * (begin - queued.submitted)
                queued.future.set_result(BatchResult(outcome, queue_ms, len(batch)))

    def _call(self, items: Sequence[Any]) -> Sequence[Any]:
        """One value or exception per item; the items of a batch that fails are tried alone."""
        try:
            return self._function(items)
        except Exception as error:
            if len(items) == 1:
                return [error]
            _log.warning("a batch of %d failed (%s); trying each alone", len(items), error)
            return [self._call([item])[0] for item in items]

    async def _on_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self._under_way = self._thread.submit(function, *arguments)
        return await asyncio.wrap_future(self._under_way)
