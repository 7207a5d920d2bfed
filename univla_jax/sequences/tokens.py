"""Token sequences with the role of every token, and the pieces they are composed of.

Axes: S sequence, N chunks, T steps, A action dimensions, P state dimensions.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from univla_jax.normalization import ActionStatistics
from univla_jax.sequences.roles import Role
from univla_jax.sequences.text_encoder import TextEncoder
from univla_jax.tokenizers.action import ActionTokenizer
from univla_jax.tokenizers.vocabulary import Vocabulary

Piece = tuple[Role, np.ndarray]
"""int32 ids of one part of a sequence, and the role of those that are not visual codes."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One token sequence.

    Attributes:
      ids: int32 [S] token ids.
      roles: uint8 [S] values of ``Role``.
    """

    ids: np.ndarray
    roles: np.ndarray

    def __len__(self) -> int:
        """Length S."""
        return len(self.ids)


def compose(vocabulary: Vocabulary, pieces: Iterable[Piece]) -> Tokens:
    """Concatenates pieces into one sequence.

    Visual ids get the role VISION wherever they stand; every other id has the role of its piece.
    """
    roles, arrays = zip(*pieces)
    ids = np.concatenate(arrays).astype(np.int32, copy=False)
    # Frames are written as one piece of codes and markup; their codes are told apart by id, so that
    # no writer of a frame has to count roles.
    role_of = np.repeat(np.asarray(roles, np.uint8), [len(a) for a in arrays])
    role_of[(ids >= vocabulary.bov) & (ids <= vocabulary.eov)] = Role.VISION
    return Tokens(ids, role_of)


def opening(text_encoder: TextEncoder, text: str) -> Piece:
    """The beginning of every sequence: bos and the encoded text."""
    words = text_encoder.encode(text)
    ids = np.empty(len(words) + 1, np.int32)
    ids[0], ids[1:] = text_encoder.vocabulary.bos, words
    return Role.TEXT, ids


def action_block(vocabulary: Vocabulary, chunk: np.ndarray | None) -> Piece:
    """boa, the ids of one chunk, eoa (UniVLA train/datasets.py:380-399).

    Without a chunk only boa: where a prompt ends, and all that a flow-matching policy writes.
    """
    if chunk is None:
        return Role.ACTION, np.array([vocabulary.boa], np.int32)
    ids = np.empty(len(chunk) + 2, np.int32)
    ids[0], ids[1:-1], ids[-1] = vocabulary.boa, chunk, vocabulary.eoa
    return Role.ACTION, ids


def encode_chunks(
    vocabulary: Vocabulary, tokenizer: ActionTokenizer, chunks: np.ndarray
) -> list[np.ndarray]:
    """int32 ids of each normalized chunk, float32 [N, T, A], without boa and eoa."""
    if not len(chunks):
        return []
    encoded = tokenizer.encode_batch(chunks)
    # One vocabulary lookup for all chunks, then views of its result: a lookup per chunk would
    # dominate the cost of a sample.
    ids = vocabulary.action_ids(np.fromiter(itertools.chain.from_iterable(encoded), np.int32))
    ends = list(itertools.accumulate(map(len, encoded)))
    return [ids[start:end] for start, end in zip([0, *ends], ends)]


def encode_states(
    vocabulary: Vocabulary,
    tokenizer: ActionTokenizer,
    statistics: ActionStatistics,
    states: np.ndarray | Sequence[np.ndarray],
) -> list[np.ndarray]:
    """int32 ids of each state, which is encoded as a chunk of one step.

    Args:
      vocabulary: of the ids.
      tokenizer: of normalized chunks.
      statistics: of the corpus' states.
      states: float32 [N, P], in physical units.

    Source: ``state`` in UniVLA reference/Emu3/emu3/mllm/processing_emu3.py.
    """
    return encode_chunks(vocabulary, tokenizer, statistics.normalize(np.asarray(states))[:, None])
