"""A tokenized episode and its records in a store.

An episode is one head record and, behind it, a record per block of ``n`` steps, so that a window
of a few frames is read without the rest::

    head    ``UVT2``, u32 length of the header, header (JSON, padded with spaces so that the arrays
            start at a multiple of 8), then actions and state, each padded to a multiple of 8 bytes
    block   the codes of n steps (the last block: of the rest), view by view in the header's order

All arrays are little-endian. Reading copies nothing but the frames asked for.

Axes: T steps, h/w code grid, A action dimensions, P state dimensions.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from univla_jax.errors import UserError

# ----------------------------------------------------------------------------
# The visual codes of a stored episode, read block by block when they are asked for.
#
# Axes: T steps, h/w code grid, n steps of a block.


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


# ----------------------------------------------------------------------------


_MAGIC = b"UVT2"
_ALIGN = 8
_PREFIX = 8
_BLOCK_BYTES = 16 << 10  # a read costs 16 us up to here, and more in proportion beyond

Codes = np.ndarray | StoredCodes
"""uint16 [T, h, w], in memory or in a store; both take an array of steps as index."""


@dataclasses.dataclass(frozen=True)
class TokenizedEpisode:
    """One episode whose frames became visual codes.

    Attributes:
      instruction: natural-language task, not empty.
      codes: per view uint16 [T, h, w], indices into the vision tokenizer's codebook.
      actions: float32 [T, A], physical units of the corpus, not normalized.
      control_hz: control rate in steps per second.
      corpus: name of the row in ``data/datasets.py``.
      episode_id: unique inside the corpus.
      state: float32 [T, P] proprioception, or None.
      texts: further texts by kind (``Episode.texts``), each of one entry or of T.
    """

    instruction: str
    codes: Mapping[str, Codes]
    actions: np.ndarray
    control_hz: float
    corpus: str
    episode_id: str
    state: np.ndarray | None = None
    texts: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        """Number of steps T."""
        return len(self.actions)


def block_steps(grids: Mapping[str, Sequence[int]]) -> int:
    """Steps of a block for frames of these code grids (h, w): about 16 KiB of codes."""
    return max(1, _BLOCK_BYTES // (2 * sum(math.prod(grid) for grid in grids.values())))


def count_records(steps: int, block: int) -> int:
    """Records of an episode of ``steps`` steps: its head and its blocks."""
    return 1 + -(-steps // block)


def to_records(episode: TokenizedEpisode, block: int) -> list[bytes]:
    """The records of an episode; the same episode always gives the same bytes.

    Args:
      episode: all of it in memory, or from another store.
      block: steps of a block.

    Raises:
      UserError: codes that are not uint16 [T, h, w], or arrays of different lengths.
    """
    codes = {view: np.asarray(episode.codes[view]) for view in sorted(episode.codes)}
    arrays = _arrays(episode, codes)
    header = {
        "instruction": episode.instruction,
        "control_hz": float(episode.control_hz),
        "corpus": episode.corpus,
        "episode_id": episode.episode_id,
        "block": block,
        "grids": [[view, *c.shape[1:]] for view, c in codes.items()],
        "arrays": [[name, a.dtype.str, list(a.shape)] for name, a in arrays.items()],
        "texts": {kind: _changes(values) for kind, values in sorted(episode.texts.items())},
    }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(_PREFIX + len(text)) % _ALIGN)
    parts = [_MAGIC, len(text).to_bytes(4, "little"), text]
    for array in arrays.values():
        data = np.ascontiguousarray(array).tobytes()
        parts += [data, b"\0" * (-len(data) % _ALIGN)]
    starts = range(0, len(episode), block)
    blocks = [[c[t : t + block].astype("<u2").tobytes() for c in codes.values()] for t in starts]
    return [b"".join(parts), *map(b"".join, blocks)]


def from_records(head: bytes, read_block: Callable[[int], bytes]) -> TokenizedEpisode:
    """The inverse of ``to_records``; blocks are read when their frames are asked for.

    Args:
      head: the head record.
      read_block: block number -> record.

    Raises:
      UserError: not such a record, or one that ends early.
    """
    if head[:4] != _MAGIC:
        raise UserError(f"not a token record: it starts with {head[:4]!r}, not {_MAGIC!r}")
    start = _PREFIX + int.from_bytes(head[4:_PREFIX], "little")
    try:
        header = json.loads(head[_PREFIX:start])
        arrays = _views(head, start, header.pop("arrays"))
        steps = len(arrays["actions"])
        grids = {view: (h, w) for view, h, w in header.pop("grids")}
        frames = StoredFrames(read_block, grids, steps, header.pop("block"))
        return TokenizedEpisode(
            **header | {"texts": {k: _spread(v, steps) for k, v in header["texts"].items()}},
            codes={view: StoredCodes(frames, view) for view in grids},
            actions=arrays["actions"],
            state=arrays.get("state"),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"damaged token record of {len(head)} bytes: {error}") from error


def _arrays(episode: TokenizedEpisode, codes: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of the head record, after a look at all of them."""
    for view, array in codes.items():
        if array.dtype != np.uint16 or array.ndim != 3:
            found = f"{array.dtype}{list(array.shape)}"
            raise UserError(
                f"{episode.episode_id}: codes of {view!r} are {found}, expected uint16[T, h, w]"
            )
    arrays = {"actions": np.asarray(episode.actions, "<f4")}
    if episode.state is not None:
        arrays["state"] = np.asarray(episode.state, "<f4")
    lengths = {name: len(array) for name, array in {**codes, **arrays}.items()}
    if len(set(lengths.values())) != 1:
        raise UserError(f"{episode.episode_id}: arrays of different lengths {lengths}")
    return arrays


def _changes(values: Sequence[str]) -> list[list]:
    """Texts of consecutive steps as [step, text] wherever they change."""
    return [[t, v] for t, v in enumerate(values) if t == 0 or v != values[t - 1]]


def _spread(changes: Sequence[Sequence], steps: int) -> tuple[str, ...]:
    """The inverse of ``_changes``; a single text stands for all steps."""
    if len(changes) == 1:
        return (changes[0][1],)
    ends = [*(t for t, _ in changes[1:]), steps]
    return tuple(text for (t, text), end in zip(changes, ends) for _ in range(t, end))


def _views(record: bytes, start: int, table: list) -> dict[str, np.ndarray]:
    views = {}
    for name, dtype, shape in table:
        count = math.prod(shape)
        views[name] = np.frombuffer(record, dtype, count, start).reshape(shape)
        start += -(-views[name].nbytes // _ALIGN) * _ALIGN
    return views
