"""Data that stops coming stops the run with a message."""

from __future__ import annotations

import queue
import threading
from typing import Any

from univla_jax.errors import UserError


class StalledData(UserError):
    """The data source gave nothing for too long; threads of it may still be waiting."""


class WatchedBatches:
    """An iterator of batches that waits for each of them only so long.

    Position and state are those of the iterator inside.
    """

    def __init__(self, batches: Any, seconds: float) -> None:
        """Wraps ``batches``.

        Args:
          batches: an iterator with ``get_state``, ``set_state`` and ``close``.
          seconds: the longest wait for one batch.
        """
        self._batches, self._seconds = batches, seconds

    def __iter__(self) -> WatchedBatches:
        """Returns itself."""
        return self

    def __next__(self) -> Any:
        """The next batch.

        Raises:
          StalledData: it did not come in time.
        """
        answer: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(1)
        threading.Thread(target=self._fetch, args=(answer,), daemon=True).start()
        try:
            batch, error = answer.get(timeout=self._seconds)
        except queue.Empty:
            raise StalledData(
                f"the data source gave no batch for {self._seconds:g} s; look at the disk or "
                "network that data.stores are on, or raise config.data_timeout_seconds"
            ) from None
        if error is not None:
            raise error
        return batch

    def _fetch(self, answer: queue.Queue) -> None:
        try:
            answer.put((next(self._batches), None))
        except BaseException as error:  # raised again where the batch is waited for
            answer.put((None, error))

    def get_state(self) -> bytes:
        """The position before the next batch."""
        return self._batches.get_state()

    def set_state(self, *states: bytes) -> None:
        """Moves to a position that ``get_state`` returned, here or on all processes together."""
        self._batches.set_state(*states)

    def close(self) -> None:
        """Closes the iterator inside."""
        self._batches.close()
