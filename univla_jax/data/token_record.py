"""A tokenised episode and its bytes.

Record: ``UVT1``, u32 length of the header, header (JSON, padded with spaces so that the arrays
start at a multiple of 8), then the raw little-endian arrays one after another, each padded to a
multiple of 8 bytes. Reading copies nothing: the arrays are views into the record.

Axes: T steps, h/w code grid, A action dimensions, P state dimensions.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping

import numpy as np

from univla_jax.errors import UserError

_MAGIC = b"UVT1"
_ALIGN = 8
_PREFIX = 8


@dataclasses.dataclass(frozen=True)
class TokenizedEpisode:
    """One episode whose frames became visual codes.

    Attributes:
      instruction: natural-language task, not empty.
      codes: per view uint16 [T, h, w], indices into the vision tokenizer's codebook.
      actions: float32 [T, A], physical units of the corpus, not normalised.
      control_hz: control rate in steps per second.
      corpus: name of the row in ``data/corpora.py``.
      episode_id: unique inside the corpus.
      state: float32 [T, P] proprioception, or None.
    """

    instruction: str
    codes: Mapping[str, np.ndarray]
    actions: np.ndarray
    control_hz: float
    corpus: str
    episode_id: str
    state: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of steps T."""
        return len(self.actions)


def to_bytes(episode: TokenizedEpisode) -> bytes:
    """The record of an episode; the same episode always gives the same bytes.

    Raises:
      UserError: codes that are not uint16 [T, h, w], or arrays of different lengths.
    """
    arrays = _arrays(episode)
    header = {
        "instruction": episode.instruction,
        "control_hz": float(episode.control_hz),
        "corpus": episode.corpus,
        "episode_id": episode.episode_id,
        "arrays": [[name, a.dtype.str, list(a.shape)] for name, a in arrays.items()],
    }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(_PREFIX + len(text)) % _ALIGN)
    parts = [_MAGIC, len(text).to_bytes(4, "little"), text]
    for array in arrays.values():
        data = np.ascontiguousarray(array).tobytes()
        parts += [data, b"\0" * (-len(data) % _ALIGN)]
    return b"".join(parts)


def from_bytes(record: bytes) -> TokenizedEpisode:
    """The inverse of ``to_bytes``; the arrays are read-only views into ``record``.

    Raises:
      UserError: not such a record, or one that ends early.
    """
    if record[:4] != _MAGIC:
        raise UserError(f"not a token record: it starts with {record[:4]!r}, not {_MAGIC!r}")
    start = _PREFIX + int.from_bytes(record[4:_PREFIX], "little")
    try:
        header = json.loads(record[_PREFIX:start])
        arrays = _views(record, start, header.pop("arrays"))
        codes = {n.partition("/")[2]: a for n, a in arrays.items() if n.startswith("codes/")}
        return TokenizedEpisode(
            **header, codes=codes, actions=arrays["actions"], state=arrays.get("state")
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"damaged token record of {len(record)} bytes: {error}") from error


def _arrays(episode: TokenizedEpisode) -> dict[str, np.ndarray]:
    arrays = {f"codes/{view}": codes for view, codes in sorted(episode.codes.items())}
    for name, codes in arrays.items():
        if codes.dtype != np.uint16 or codes.ndim != 3:
            found = f"{codes.dtype}{list(codes.shape)}"
            raise UserError(f"{episode.episode_id}: {name} is {found}, expected uint16[T, h, w]")
    arrays["actions"] = np.asarray(episode.actions, "<f4")
    if episode.state is not None:
        arrays["state"] = np.asarray(episode.state, "<f4")
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise UserError(f"{episode.episode_id}: arrays of different lengths {lengths}")
    return arrays


def _views(record: bytes, start: int, table: list) -> dict[str, np.ndarray]:
    views = {}
    for name, dtype, shape in table:
        count = math.prod(shape)
        views[name] = np.frombuffer(record, dtype, count, start).reshape(shape)
        start += -(-views[name].nbytes // _ALIGN) * _ALIGN
    return views
