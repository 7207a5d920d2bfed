"""Encodes the frames of many episodes in batches of one static shape.

Axes: T steps, N batch, H/W image height and width, h/w code grid.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping

import numpy as np

Encode = Callable[[np.ndarray], np.ndarray]
"""uint8 [N, H, W, 3] -> uint16 [N, h, w], called with one N only."""


class FrameEncoder:
    """Frames of one view go in episode by episode; their codes come out in the same order.

    Frames wait until a batch is full, so short episodes share batches. ``flush`` encodes the
    rest, padded with zeros to the batch size.
    """

    def __init__(self, encode: Encode, batch: int) -> None:
        """Starts empty.

        Args:
          encode: the tokenizer's ``encode_frames``.
          batch: N, the number of frames per call.
        """
        self._encode, self._batch = encode, batch
        self._waiting: list[np.ndarray] = []
        self._codes: collections.deque[np.ndarray] = collections.deque()

    @property
    def ready(self) -> int:
        """Number of frames whose codes can be taken."""
        return len(self._codes)

    def push(self, frames: np.ndarray) -> None:
        """Adds frames uint8 [T, H, W, 3] and encodes every batch that is full."""
        self._waiting.append(frames)
        if sum(map(len, self._waiting)) < self._batch:
            return
        frames = np.concatenate(self._waiting)
        whole = len(frames) // self._batch * self._batch
        for start in range(0, whole, self._batch):
            self._codes.extend(self._encode(frames[start : start + self._batch]))
        self._waiting = [frames[whole:]]

    def flush(self) -> None:
        """Encodes whatever waits."""
        rest = np.concatenate(self._waiting) if self._waiting else np.empty(0)
        self._waiting = []
        if len(rest):
            padding = np.zeros((self._batch - len(rest), *rest.shape[1:]), rest.dtype)
            self._codes.extend(self._encode(np.concatenate([rest, padding]))[: len(rest)])

    def take(self, count: int) -> np.ndarray:
        """The next ``count`` codes, uint16 [count, h, w]; at least that many must be ready."""
        return np.stack([self._codes.popleft() for _ in range(count)]).astype(np.uint16)


class ViewEncoders:
    """One ``FrameEncoder`` per view, for episodes whose views have the same length."""

    def __init__(self, encode: Encode, views: list[str], batch: int) -> None:
        """Starts empty; the arguments are as of ``FrameEncoder``."""
        self._encoders = {view: FrameEncoder(encode, batch) for view in views}

    def push(self, frames: Mapping[str, np.ndarray]) -> None:
        """Adds an episode's frames, per view uint8 [T, H, W, 3]."""
        for view, encoder in self._encoders.items():
            encoder.push(frames[view])

    def flush(self) -> None:
        """Encodes whatever waits."""
        for encoder in self._encoders.values():
            encoder.flush()

    def ready(self, count: int) -> bool:
        """Whether every view has ``count`` codes."""
        return all(encoder.ready >= count for encoder in self._encoders.values())

    def take(self, count: int) -> dict[str, np.ndarray]:
        """Per view the next codes, uint16 [count, h, w]."""
        return {view: encoder.take(count) for view, encoder in self._encoders.items()}
