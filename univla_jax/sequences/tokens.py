"""Token sequences: roles of tokens, which of them are learned, and the pieces of a sequence.

Axes: S sequence, R roles, N chunks, T steps, A action dimensions, P state dimensions.

    sequence         bos text │ boi "1*5*5" img │ codes │ eof eoi │ boa a a eoa
    role              T   T      M     M     M      V      M   M     A  A A  A
    loss on "action"  .   .      .     .     .      .      .   .     1  1 1  1
    "vision"          .   .      .     .     .      v      .   .     .  . .  .
    "both"            .   .      1     1     1      v      1   1     1  1 1  1
    "all"             .   1      1     1     1      v      1   1     1  1 1  1

``v`` is the vision weight, ``.`` is 0. Text is learned only by "all"; padding and the first token
of a sequence never are. The loss divides by the sum of the weights (UniVLA
reference/Emu3/emu3/mllm/modeling_emu3.py:1586-1598).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from univla_jax.errors import UserError
from univla_jax.normalization import ActionStatistics
from univla_jax.tokenizers.action import ActionTokenizer
from univla_jax.tokenizers.coordinates import CoordinateEncoder
from univla_jax.tokenizers.text import TextTokenizer
from univla_jax.tokenizers.vocabulary import Vocabulary

_CACHED_TEXTS = 65_536


class TextEncoder:
    """A vocabulary with its text tokenizer; every text is encoded once and remembered.

    A training sample repeats an instruction of few kinds and headers such as "1*25*25", so the
    cache takes text tokenization out of the data pipeline (the reference re-tokenizes its whole
    sample as a string, UniVLA train/datasets.py:232-251).
    """

    def __init__(
        self, vocabulary: Vocabulary, text: TextTokenizer, *, special_text: bool = False
    ) -> None:
        """Binds the two.

        Args:
          vocabulary: the ids of the model.
          text: encodes plain text into ids below ``vocabulary.text_size``.
          special_text: True lets special tokens written out in a text take effect, as the
            reference does; False (the default) keeps them plain text, so that an instruction can
            inject nothing.
        """
        self.vocabulary = vocabulary
        self.text = text
        self.special_text = special_text
        self._cached_encode = functools.lru_cache(_CACHED_TEXTS)(self._encode)
        self._cached_encode_places = functools.lru_cache(_CACHED_TEXTS)(self._encode_places)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of ``text``, int32 [n], read-only; empty text has none.

        Raises:
          UserError: the text tokenizer gave an id that is no text id of the vocabulary.
        """
        return self._cached_encode(text)

    def encode_places(self, text: str) -> np.ndarray:
        """Token ids of a text with coordinates, int32 [n], read-only.

        Boxes and points in it are written as the vocabulary has them (``CoordinateEncoder``). A
        text that comes from outside is no such text: ``encode`` keeps it plain.
        """
        return self._cached_encode_places(text)

    def decode_places(self, ids: Sequence[int]) -> str:
        """The inverse of ``encode_places``."""
        return self.coordinates.decode(ids)

    @functools.cached_property
    def coordinates(self) -> CoordinateEncoder:
        """Boxes and points as ids."""
        return CoordinateEncoder(self.text)

    def _encode_places(self, text: str) -> np.ndarray:
        ids = self.coordinates.encode(text)
        ids.setflags(write=False)
        return ids

    def __reduce__(self) -> tuple:
        """Pickles without the cache, for the worker processes of the pipeline."""
        return functools.partial(TextEncoder, special_text=self.special_text), (
            self.vocabulary,
            self.text,
        )

    def _encode(self, text: str) -> np.ndarray:
        encoded = self.text.encode(text, allow_special=self.special_text) if text else []
        ids = np.asarray(encoded, np.int32)
        limit = self.vocabulary.size if self.special_text else self.vocabulary.text_size
        if ids.size and (ids.min() < 0 or ids.max() >= limit):
            raise UserError(
                f"text tokenizer gave id {ids.max() if ids.min() >= 0 else ids.min()} for "
                f"{text[:60]!r}, but text ids end at {limit}; use the text tokenizer this "
                "vocabulary was made with"
            )
        ids.setflags(write=False)
        return ids


class Role(enum.IntEnum):
    """What a token is there for; stored with every token as uint8."""

    TEXT = 0  # bos, instruction, chat template, eos
    MARKUP = 1  # boi, "1*h*w", img, eol, eof, eoi
    VISION = 2  # visual codes
    STATE = 3  # proprioception in front of an action
    THOUGHT = 4  # bot, reasoning text, eot
    ANSWER = 5  # the assistant's reply, with its eos
    ACTION = 6  # boa, action ids, eoa
    VALUE = 7  # how likely and how soon the instruction will be done
    SEEN = 8  # visual codes that are always given, and never learned


LABELS: Mapping[str, frozenset[Role]] = {
    "action": frozenset({Role.ACTION}),
    "vision": frozenset({Role.VISION}),
    "both": frozenset({Role.MARKUP, Role.VISION, Role.ACTION}),
    "vision_and_action": frozenset({Role.VISION, Role.ACTION}),
    "thought_and_action": frozenset({Role.THOUGHT, Role.ACTION}),
    "answer": frozenset({Role.ANSWER}),
    "value": frozenset({Role.VALUE}),
    "all": frozenset(Role) - {Role.STATE, Role.SEEN},
}
"""Named sets of labeled roles, the values of ``DataConfig.loss_on``.

"action" and "both" are the two of the reference's interleaved policies (UniVLA
train/datasets.py:245-269), "vision" is its world model's (:535-536), "all" its image mode's without
flags (:289-313); "vision_and_action" is DriveVLA-W0's (utils/datasets.py:602-805).
"""


def labeled_roles(labels: str) -> np.ndarray:
    """bool [R], which roles the choice ``labels`` of ``LABELS`` learns to predict."""
    return np.isin(np.arange(len(Role)), list(LABELS[labels]))


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
    steps: int = 1,
) -> list[np.ndarray]:
    """int32 ids of each state, which is encoded as a chunk of so many equal steps.

    Args:
      vocabulary: of the ids.
      tokenizer: of normalized chunks.
      statistics: of the corpus' states.
      states: float32 [N, P], in physical units.
      steps: of the chunk; the reference has one. FAST's coefficient of frequency 0 grows with their
        square root, and so the number of its levels.

    Source: ``state`` in UniVLA reference/Emu3/emu3/mllm/processing_emu3.py.
    """
    chunks = np.repeat(statistics.normalize(np.asarray(states))[:, None], steps, axis=1)
    return encode_chunks(vocabulary, tokenizer, chunks)
