"""Continuations: a table of what follows the last few tokens, for drafts of speculative decoding.

    chunks   5 5 2 9 eoa      order 3   5 5 2 → 9      order 1   5 → 5
             5 5 2 9 7 eoa              5 2 9 → eoa              2 → 9
             8 5 2 9 eoa                …                        9 → eoa

Action chunks repeat each other: the same few ids in a row are followed by the same next one,
whoever asked for them. ``fit`` keeps what follows most often in the chunks of a training set; a
table that nothing was fitted to learns from the chunks that are chosen, the newest counts. A table
has one size: rows of tokens that share a slot only make wrong drafts, and drafts are verified.

Source: n-grams of earlier outputs as drafts (Ou et al., arXiv 2404.12767).

Axes: M tokens, N orders of n-grams, S slots of their table.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import numpy as np

from univla_jax.errors import UserError

ORDERS = (6, 4, 3, 2, 1)  # tokens that a next one is looked up by, the longest known ones first
LONGEST = max(ORDERS)
_SLOTS = 2**14  # per order


class Continuations:
    """What follows the last few tokens of a sequence.

    Attributes:
      table: int32 [N, S], the next token by order and hash of the tokens before it; negative where
        nothing is known.
      fitted: whether it is that of a training set, which chosen chunks do not change.
    """

    def __init__(self, table: np.ndarray | None = None) -> None:
        """A fitted table; by default one that knows nothing yet."""
        self.fitted = table is not None
        self.table = np.full((len(ORDERS), _SLOTS), -1, np.int32) if table is None else table

    @classmethod
    def fit(cls, sequences: Iterable[np.ndarray]) -> Continuations:
        """What follows most often in sequences of ids, int [n] each."""
        keys, following = [], []
        for tokens in sequences:
            keys.append(slots_of(_windows(tokens), np))
            following.append(tokens)
        known = cls()
        if keys:
            slots_MN, tokens_M = np.concatenate(keys), np.concatenate(following)
            for row, slots in zip(known.table, slots_MN.T):
                pairs, counts = np.unique(slots + tokens_M * np.int64(_SLOTS), return_counts=True)
                # The last of several values for one slot stays: the most frequent.
                token, slot = np.divmod(pairs[np.argsort(counts, kind="stable")], _SLOTS)
                row[slot] = token
        return cls(known.table)

    def learn(self, tokens: np.ndarray) -> None:
        """Takes a whole chosen sequence, int32 [n]; a fitted table stays as it is."""
        if not self.fitted:
            slots = slots_of(_windows(tokens), np)
            self.table[np.arange(len(ORDERS)), slots] = np.asarray(tokens)[:, None]

    def to_bytes(self) -> bytes:
        """A NumPy file of the table."""
        stream = io.BytesIO()
        np.save(stream, self.table)
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, *, where: str) -> Continuations:
        """The fitted table of a file.

        Args:
          content: of ``to_bytes``.
          where: name of the file, for messages.

        Raises:
          UserError: it holds something else.
        """
        try:
            table = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{where}: no NumPy file ({error}); restore or remove it") from error
        if table.shape != (len(ORDERS), _SLOTS) or table.dtype != np.int32:
            raise UserError(
                f"{where}: a table {table.dtype} {list(table.shape)}, expected int32 "
                f"{[len(ORDERS), _SLOTS]}; restore or remove it"
            )
        return cls(table)


def slots_of(windows: Any, xp: Any) -> Any:
    """Slots int32 [..., N] of a table.

    Args:
      windows: int [..., LONGEST], the last tokens, -1 before the first.
      xp: numpy or jax.numpy; both give the same.
    """
    columns = []
    for order in ORDERS:
        # Fowler-Noll-Vo's hash of whole tokens, then its upper bits, which mix better.
        hashed = xp.full(windows.shape[:-1], 2166136261, xp.uint32)
        for i in range(order):
            token = windows[..., windows.shape[-1] - 1 - i].astype(xp.uint32)
            hashed = (hashed ^ token) * xp.uint32(16777619)
        columns.append((hashed ^ (hashed >> xp.uint32(15))) % xp.uint32(_SLOTS))
    return xp.stack(columns, axis=-1).astype(xp.int32)


def _windows(tokens: np.ndarray) -> np.ndarray:
    """The tokens before each, int [M, LONGEST], -1 before the first."""
    padded = np.concatenate([np.full(LONGEST, -1), tokens])
    return np.lib.stride_tricks.sliding_window_view(padded[:-1], LONGEST)
