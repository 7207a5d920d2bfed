"""Batches of single frames, held in memory, for training a vision tokenizer.

Axes: N frames, B batch, h/w resized rows and columns.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

import numpy as np

from univla_jax.episode import Episode
from univla_jax.errors import UserError
from univla_jax.tokenizers.image import ImageSpec

_STATE = struct.Struct("<q")


def collect_frames(
    episodes: Iterable[Episode], specs: Mapping[str, ImageSpec], *, most: int
) -> dict[str, np.ndarray]:
    """Resizes the frames of episodes as for training.

    Args:
      episodes: read once.
      specs: image spec per view; other views are left out.
      most: frames kept per view; when there are more, every second one is dropped, again and
        again, so that those kept stay spread over all episodes.

    Returns:
      per view uint8 [N, h, w, 3].

    Raises:
      UserError: no frames, or a view whose frames differ in size after resizing.
    """
    kept: dict[str, list[np.ndarray]] = {view: [] for view in specs}
    stride, seen = 1, 0
    for episode in episodes:
        picked = np.arange(-seen % stride, len(episode), stride)
        seen += len(episode)
        for view, spec in specs.items():
            kept[view].extend(spec.resize(episode.frames[view][picked], training=True))
        while any(len(frames) > most for frames in kept.values()):
            kept = {view: frames[::2] for view, frames in kept.items()}
            stride *= 2
    return {view: _stack(view, frames) for view, frames in kept.items()}


def _stack(view: str, frames: list[np.ndarray]) -> np.ndarray:
    if not frames:
        raise UserError(f"view {view!r}: no frames to train on")
    shapes = {frame.shape[:2] for frame in frames}
    if len(shapes) > 1:
        raise UserError(f"view {view!r}: frames of sizes {sorted(shapes)}; give its spec a size")
    return np.stack(frames)


class FrameBatches:
    """Endless random batches; batch k depends on the seed and on k alone."""

    def __init__(self, frames: Mapping[str, np.ndarray], batch_size: int, seed: int) -> None:
        """Starts before batch 0.

        Args:
          frames: per view uint8 [N, h, w, 3]; sizes may differ between views.
          batch_size: frames per view and batch.
          seed: of the order.
        """
        self._frames, self._batch, self._seed = dict(frames), batch_size, seed
        self._next = 0

    def __next__(self) -> dict[str, np.ndarray]:
        """Per view uint8 [B, h, w, 3]; every epoch sees each frame once, in another order."""
        batch = {
            view: frames[self._indices(len(frames), order)]
            for order, (view, frames) in enumerate(sorted(self._frames.items()))
        }
        self._next += 1
        return batch

    def get_state(self) -> bytes:
        """The number of the next batch."""
        return _STATE.pack(self._next)

    def set_state(self, state: bytes) -> None:
        """Moves to a position that ``get_state`` returned."""
        (self._next,) = _STATE.unpack(state)

    def _indices(self, count: int, order: int) -> np.ndarray:
        """Positions ``next * B ...`` in the endless row of shuffled epochs."""
        places = np.arange(self._next * self._batch, (self._next + 1) * self._batch)
        epochs, within = np.divmod(places, count)
        shuffled = {
            epoch: np.random.default_rng([self._seed, order, epoch]).permutation(count)
            for epoch in np.unique(epochs).tolist()
        }
        return np.array([shuffled[e][i] for e, i in zip(epochs.tolist(), within.tolist())])
