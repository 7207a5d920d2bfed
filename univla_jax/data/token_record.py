"""A tokenized episode, and the records that hold it in a token store.

An episode is one header record followed by one record per block of ``n`` steps, so that a window of
a few frames is read without the rest::

    header  ``UVT2``, u32 length of the JSON, JSON (padded with spaces so that the arrays start at
            a multiple of 8), then actions and state, each padded to a multiple of 8 bytes
    block   the codes of n steps (the last block: of the rest), view by view in the JSON's order

All arrays are little-endian. Reading copies nothing but the frames that are indexed.

Axes: T steps, h/w code grid, A action dimensions, P state dimensions, n steps of a block.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from univla_jax.errors import UserError

_MAGIC = b"UVT2"
_FORMS = ("NFC", "NFKC")
_ALIGNMENT = 8
_PREFIX = 8  # bytes before the JSON
_BLOCK_BYTES = 16 << 10  # a read costs 16 us up to here, and more in proportion beyond


@dataclasses.dataclass(frozen=True)
class TokenizedEpisode:
    """One episode whose frames became visual codes.

    Attributes:
      instruction: natural-language task, not empty.
      codes: per view uint16 [T, h, w], indices into the vision tokenizer's codebook.
      actions: float32 [T, A], physical units of the dataset, not normalized.
      control_hz: control rate in steps per second.
      corpus: name of the dataset in ``data/datasets.py``.
      episode_id: unique inside the dataset.
      state: float32 [T, P] proprioception, or None.
      texts: further texts by kind (``Episode.texts``), each of one entry or of T.
      groundings: per step what phrases mean in its frames (``Episode.groundings``), or empty.
      paraphrases: other instructions of the same episode.
      metadata: what else the dataset says about the episode, by name.
    """

    instruction: str
    codes: Mapping[str, Codes]
    actions: np.ndarray
    control_hz: float
    corpus: str
    episode_id: str
    state: np.ndarray | None = None
    texts: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    groundings: Sequence[str] = ()
    paraphrases: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        """Number of steps T."""
        return len(self.actions)

    @property
    def instructions(self) -> tuple[str, ...]:
        """The instruction and its paraphrases."""
        return (self.instruction, *self.paraphrases)


def block_steps(grids: Mapping[str, Sequence[int]]) -> int:
    """Steps of a block for frames of these code grids (h, w): about 16 KiB of codes."""
    return max(1, _BLOCK_BYTES // (2 * sum(math.prod(grid) for grid in grids.values())))


def count_records(steps: int, block: int) -> int:
    """Records of an episode of ``steps`` steps: its header and its blocks of ``block`` steps."""
    return 1 + -(-steps // block)


def text_bytes(episode: TokenizedEpisode) -> int:
    """The most bytes of text in a sample: the longest instruction and text of every other kind.

    Whatever Unicode normalization a text tokenizer applies: no text has more tokens than bytes.
    """
    forms = [lambda text: text, *(functools.partial(unicodedata.normalize, f) for f in _FORMS)]

    def longest(texts: Sequence[str]) -> int:
        return max(len(form(t).encode("utf-8", "replace")) for t in set(texts) for form in forms)

    return sum(1 + longest(texts) for texts in (episode.instructions, *episode.texts.values()))


# ----------------------------------------------------------------------------
# Writing.


def to_records(episode: TokenizedEpisode, block: int) -> list[bytes]:
    """Serializes an episode; the same episode always gives the same bytes.

    Args:
      episode: all of it in memory, or from another store.
      block: steps of a block.

    Raises:
      UserError: codes that are not uint16 [T, h, w], or arrays of different lengths.
    """
    codes = {view: np.asarray(episode.codes[view]) for view in sorted(episode.codes)}
    arrays = {"actions": np.asarray(episode.actions, "<f4")}
    if episode.state is not None:
        arrays["state"] = np.asarray(episode.state, "<f4")
    _check_arrays(episode.episode_id, codes, arrays)
    header = {
        "instruction": episode.instruction,
        "control_hz": float(episode.control_hz),
        "corpus": episode.corpus,
        "episode_id": episode.episode_id,
        "block": block,
        "grids": [[view, *c.shape[1:]] for view, c in codes.items()],
        "arrays": [[name, a.dtype.str, list(a.shape)] for name, a in arrays.items()],
        "texts": {kind: _run_lengths(values) for kind, values in sorted(episode.texts.items())},
    }
    # Absent where there are none, as in the records that were written before there were any.
    if episode.paraphrases:
        header["paraphrases"] = list(episode.paraphrases)
    if episode.groundings:
        header["groundings"] = _run_lengths(episode.groundings)
    if episode.metadata:
        header["metadata"] = dict(sorted(episode.metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The content of a Python bytes object is aligned. Padding the JSON and every array to 8 bytes
    # keeps the arrays in it aligned too, so that reading them is np.frombuffer and no copy.
    text += b" " * (-(_PREFIX + len(text)) % _ALIGNMENT)
    parts = [_MAGIC, len(text).to_bytes(4, "little"), text]
    for array in arrays.values():
        data = array.tobytes()
        parts += [data, b"\0" * (-len(data) % _ALIGNMENT)]
    starts = range(0, len(episode), block)
    blocks = [[c[t : t + block].astype("<u2").tobytes() for c in codes.values()] for t in starts]
    return [b"".join(parts), *map(b"".join, blocks)]


def _check_arrays(
    episode_id: str, codes: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]
) -> None:
    for view, array in codes.items():
        if array.dtype != np.uint16 or array.ndim != 3:
            found = f"{array.dtype}{list(array.shape)}"
            raise UserError(
                f"{episode_id}: codes of {view!r} are {found}, expected uint16[T, h, w]"
            )
    lengths = {name: len(array) for name, array in {**codes, **arrays}.items()}
    if len(set(lengths.values())) != 1:
        raise UserError(f"{episode_id}: arrays of different lengths {lengths}")


def _run_lengths(texts: Sequence[str]) -> list[list]:
    """Texts of consecutive steps as [step, text] wherever they change."""
    return [[t, text] for t, text in enumerate(texts) if t == 0 or text != texts[t - 1]]


# ----------------------------------------------------------------------------
# Reading.


def from_records(header_record: bytes, read_block: Callable[[int], bytes]) -> TokenizedEpisode:
    """Deserializes an episode; blocks are read when their frames are indexed.

    Args:
      header_record: the first record.
      read_block: block number -> record.

    Raises:
      UserError: not such a record, or one that ends early.
    """
    if header_record[:4] != _MAGIC:
        raise UserError(f"not a token record: it starts with {header_record[:4]!r}, not {_MAGIC!r}")
    start = _PREFIX + int.from_bytes(header_record[4:_PREFIX], "little")
    try:
        header = json.loads(header_record[_PREFIX:start])
        arrays = {}
        for name, dtype, shape in header.pop("arrays"):
            arrays[name] = np.frombuffer(header_record, dtype, math.prod(shape), start)
            arrays[name] = arrays[name].reshape(shape)
            start += -(-arrays[name].nbytes // _ALIGNMENT) * _ALIGNMENT
        steps = len(arrays["actions"])
        grids = {view: (h, w) for view, h, w in header.pop("grids")}
        blocks = _CodeBlocks(read_block, grids, steps, header.pop("block"))
        texts = {kind: _expand_runs(runs, steps) for kind, runs in header.pop("texts").items()}
        paraphrases = tuple(header.pop("paraphrases", ()))
        groundings = header.pop("groundings", ())
        groundings = _expand_runs(groundings, steps) if groundings else ()
        return TokenizedEpisode(
            **header,
            paraphrases=paraphrases,
            groundings=groundings,
            codes={view: StoredCodes(blocks, view) for view in grids},
            actions=arrays["actions"],
            state=arrays.get("state"),
            texts=texts,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"damaged token record of {len(header_record)} bytes: {error}") from error


def _expand_runs(runs: Sequence[Sequence], steps: int) -> tuple[str, ...]:
    """The inverse of ``_run_lengths``; a single text stays single and stands for all steps."""
    if len(runs) == 1:
        return (runs[0][1],)
    ends = [*(t for t, _ in runs[1:]), steps]
    return tuple(text for (t, text), end in zip(runs, ends) for _ in range(t, end))


class _CodeBlocks:
    """The blocks of one episode; each is read once, however many views index into it."""

    def __init__(
        self,
        read_block: Callable[[int], bytes],
        grids: Mapping[str, tuple[int, int]],
        steps: int,
        block: int,
    ) -> None:
        self.grids, self.steps, self.block = grids, steps, block
        self._read = read_block
        self._cache: dict[int, dict[str, np.ndarray]] = {}

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """The codes of block ``number``, per view uint16 [n, h, w]."""
        if number not in self._cache:
            self._cache[number] = self._split(self._read(number), number)
        return self._cache[number]

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
    """Codes of one view in a store, indexed like the array uint16 [T, h, w] they stand for."""

    dtype = np.dtype(np.uint16)
    ndim = 3

    def __init__(self, blocks: _CodeBlocks, view: str) -> None:
        """The codes of ``view``; reads nothing yet."""
        self._blocks, self._view = blocks, view

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, h, w)."""
        return (self._blocks.steps, *self._blocks.grids[self._view])

    def __len__(self) -> int:
        """Number of steps T."""
        return self._blocks.steps

    def __getitem__(self, index: Any) -> np.ndarray:
        """Codes of the steps chosen by an integer, a slice or an array of integers.

        Raises:
          UserError: a damaged block.
        """
        # Most calls take one frame of a window, so an integer skips NumPy's index arithmetic. The
        # rest goes through an array of step numbers, which gives slices, negative numbers and
        # index arrays NumPy's meaning without writing it again.
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
        count = -(-len(self) // self._blocks.block)
        blocks = [self._blocks[number][self._view] for number in range(count)]
        return np.concatenate(blocks).astype(dtype or self.dtype, copy=False)

    def _step(self, step: int) -> np.ndarray:
        number, offset = divmod(step, self._blocks.block)
        return self._blocks[number][self._view][offset]


Codes = np.ndarray | StoredCodes
"""uint16 [T, h, w], in memory or in a store; both take an array of steps as index."""
