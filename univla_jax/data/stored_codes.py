"""The visual codes of a stored episode, read block by block when they are asked for.

Axes: T steps, h/w code grid, n steps of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from univla_jax.errors import UserError


class StoredFrames:
    """The frames of one episode; every block is read once, however many views ask for it."""

    def __init__(
        self,
        read_block: Callable[[int], bytes],
        grids: Mapping[str, tuple[int, int]],
        steps: int,
        block: int,
    ) -> None:
        """Reads nothing yet.

        Args:
          read_block: block number -> record.
          grids: per view the code grid (h, w), in the order of the record.
          steps: T.
          block: steps n of a block.
        """
        self.grids, self.steps, self.block = grids, steps, block
        self._read = read_block
        self._blocks: dict[int, dict[str, np.ndarray]] = {}

    def views(self, number: int) -> dict[str, np.ndarray]:
        """The codes of block ``number``, per view uint16 [n, h, w].

        Raises:
          UserError: its record is damaged.
        """
        if number not in self._blocks:
            self._blocks[number] = self._split(self._read(number), number)
        return self._blocks[number]

    def _split(self, record: bytes, number: int) -> dict[str, np.ndarray]:
        steps = min(self.block, self.steps - number * self.block)
        sizes = [steps * math.prod(grid) for grid in self.grids.values()]
        if len(record) != 2 * sum(sizes):
            raise UserError(
                f"damaged block of codes: {len(record)} bytes, expected {2 * sum(sizes)}"
            )
        codes, views, end = np.frombuffer(record, "<u2"), {}, 0
        for (view, grid), size in zip(self.grids.items(), sizes):
            start, end = end, end + size
            views[view] = codes[start:end].reshape(steps, *grid)
        return views


class StoredCodes:
    """One view of ``StoredFrames``, to be indexed like the array uint16 [T, h, w] it stands for."""

    dtype = np.dtype(np.uint16)
    ndim = 3

    def __init__(self, frames: StoredFrames, view: str) -> None:
        """The codes of ``view``."""
        self._frames, self._view = frames, view

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, h, w)."""
        return (self._frames.steps, *self._frames.grids[self._view])

    def __len__(self) -> int:
        """Number of steps T."""
        return self._frames.steps

    def __getitem__(self, index: Any) -> np.ndarray:
        """Codes of the steps chosen by a number, a slice or an array of numbers."""
        if isinstance(index, int) and 0 <= index < len(self):
            return self._step(index)
        steps = np.arange(len(self))[index]
        if steps.ndim == 0:
            return self._step(int(steps))
        if not len(steps):
            return np.zeros((0, *self.shape[1:]), self.dtype)
        return np.stack([self._step(step) for step in steps.tolist()])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The whole array."""
        count = -(-len(self) // self._frames.block)
        blocks = [self._frames.views(number)[self._view] for number in range(count)]
        return np.concatenate(blocks).astype(dtype or self.dtype, copy=False)

    def _step(self, step: int) -> np.ndarray:
        number, place = divmod(step, self._frames.block)
        return self._frames.views(number)[self._view][place]
