"""The training sequences: pure functions from codes, words and action ids to ``Tokens``.

Axes: T moments (frames), h and w code grid, n action ids of a chunk.

    fmt(v)     boi "T*h*w" img codes eof … eof eoi                              (frames.py)
    act(c)     boa, action ids, eoa

    policy_video      bos text │ fmt(v1 t=0) fmt(v2 t=0) [state] act(0) │ fmt(v1 t=1) … act(1) │ …
    policy_image      bos text │ fmt(v1) fmt(v2) [state] act
    policy_flow       bos text │ fmt(v1) fmt(v2) boa        (the flow expert makes the actions)
    world_model       bos text │ fmt(v t=0) │ fmt(v t=1) │ …
    chain_of_thought  bos text │ fmt(v1) … │ bot reasoning eot │ act
    caption           bos text │ fmt(v1) … │ eos
    question          bos "You are … USER: " fmt(v1) … text ". ASSISTANT:" answer eos
    text_to_image     bos text │ boi "h*w" img row eol … eof eoi │ eos

Action ids are vocabulary ids (``Vocabulary.action_ids``), visual codes are codes. Sources: UniVLA
train/datasets.py, FACTS section 4; there is no eos after eoa there, and none here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from univla_jax.errors import UserError
from univla_jax.sequences.frames import frame_block, frame_blocks, image_block
from univla_jax.sequences.text_encoder import TextEncoder
from univla_jax.sequences.tokens import Role, Tokens, compose

_CHAT_OPEN = "You are a helpful assistant. USER: "
_CHAT_CLOSE = ". ASSISTANT:"

Piece = tuple[Role, np.ndarray]


def policy_video(
    text_encoder: TextEncoder,
    instruction: str,
    views: Sequence[np.ndarray],
    chunks: Sequence[np.ndarray],
    state: Sequence[np.ndarray] | None = None,
) -> Tokens:
    """Interleaved video policy: at each moment the frame of every view, then its action chunk.

        bos text │ fmt(v1 t=0) fmt(v2 t=0) [state 0] boa a a a eoa │ fmt(v1 t=1) … eoa │ …

    Args:
      text_encoder: vocabulary and text tokenizer.
      instruction: the task in words.
      views: per camera integer [T, h, w] codes, one frame per chunk.
      chunks: T arrays of action ids; chunk t follows frame t.
      state: T arrays of state ids, written before their boa, or None.

    Raises:
      UserError: no view, or views and chunks of different length.
    """
    moments = _moments(views)
    if len(chunks) != moments or (state is not None and len(state) != moments):
        raise UserError(f"{len(chunks)} action chunks for {moments} moments of frames")
    pieces = [sentence(text_encoder, instruction)]
    blocks = [frame_blocks(text_encoder, view) for view in views]
    for t in range(moments):
        pieces += [(Role.MARKUP, block[t]) for block in blocks]
        if state is not None:
            pieces.append((Role.STATE, _ids(state[t])))
        pieces.append(action_block(text_encoder, chunks[t]))
    return compose(text_encoder.vocabulary, pieces)


def policy_image(
    text_encoder: TextEncoder,
    instruction: str,
    views: Sequence[np.ndarray],
    chunk: np.ndarray,
    state: np.ndarray | None = None,
) -> Tokens:
    """Image policy: one block per view, then one action chunk.

        bos text │ fmt(v1) fmt(v2) │ [state ids] boa a a a eoa

    The real-robot recipe is this with three views and, where there is one, the state as a one-step
    chunk without wrapper tokens (UniVLA train/datasets.py:732-744).

    Args:
      text_encoder: vocabulary and text tokenizer.
      instruction: the task in words.
      views: per camera integer [T, h, w] codes; T is 1 in the published recipes.
      chunk: action ids.
      state: state ids, written before boa, or None.
    """
    _moments(views)
    pieces = [sentence(text_encoder, instruction), *_frames(text_encoder, views)]
    if state is not None:
        pieces.append((Role.STATE, _ids(state)))
    return compose(text_encoder.vocabulary, [*pieces, action_block(text_encoder, chunk)])


def policy_flow(text_encoder: TextEncoder, instruction: str, views: Sequence[np.ndarray]) -> Tokens:
    """Image policy whose actions come from the flow expert: it ends with boa.

        bos text │ fmt(v1) fmt(v2) │ boa

    Source: UniVLA train/datasets.py:341-345, 369-378 (``actions_format="continuous"``).
    """
    _moments(views)
    boa = np.array([text_encoder.vocabulary.boa], np.int32)
    pieces = [
        sentence(text_encoder, instruction),
        *_frames(text_encoder, views),
        (Role.ACTION, boa),
    ]
    return compose(text_encoder.vocabulary, pieces)


def world_model(text_encoder: TextEncoder, instruction: str, views: Sequence[np.ndarray]) -> Tokens:
    """World model: each frame in a block of its own, no actions; more views interleave.

        bos text │ fmt(v t=0) │ fmt(v t=1) │ … │ fmt(v t=T-1)

    Args:
      text_encoder: vocabulary and text tokenizer.
      instruction: the task in words; "" trains without text.
      views: usually one, integer [T, h, w] codes, frames about a second apart.
    """
    pieces = [sentence(text_encoder, instruction)]
    blocks = [frame_blocks(text_encoder, view) for view in views]
    for t in range(_moments(views)):
        pieces += [(Role.MARKUP, block[t]) for block in blocks]
    return compose(text_encoder.vocabulary, pieces)


def chain_of_thought(
    text_encoder: TextEncoder,
    instruction: str,
    views: Sequence[np.ndarray],
    reasoning: str,
    chunk: np.ndarray,
) -> Tokens:
    """Image policy that first writes its reasoning (UniVLA train/datasets.py:893-931).

    bos text │ fmt(v1) … │ bot reasoning eot │ boa a a a eoa
    """
    _moments(views)
    vocabulary = text_encoder.vocabulary
    thought = np.concatenate([[vocabulary.bot], text_encoder.encode(reasoning), [vocabulary.eot]])
    pieces = [
        sentence(text_encoder, instruction),
        *_frames(text_encoder, views),
        (Role.THOUGHT, _ids(thought)),
        action_block(text_encoder, chunk),
    ]
    return compose(vocabulary, pieces)


def caption(text_encoder: TextEncoder, text: str, views: Sequence[np.ndarray]) -> Tokens:
    """Text, then what it describes (UniVLA train/datasets.py:300-303, ``VL``).

    bos text │ fmt(v1) … │ eos
    """
    _moments(views)
    eos = np.array([text_encoder.vocabulary.eos], np.int32)
    pieces = [sentence(text_encoder, text), *_frames(text_encoder, views), (Role.TEXT, eos)]
    return compose(text_encoder.vocabulary, pieces)


def question(
    text_encoder: TextEncoder, text: str, views: Sequence[np.ndarray], answer: str = ""
) -> Tokens:
    """Visual question answering and captioning in Emu3's chat template.

        bos "You are a helpful assistant. USER: " fmt(v1) … text ". ASSISTANT:" answer eos

    Source: UniVLA train/datasets.py:33, 304-306, where there is no answer.
    """
    _moments(views)
    reply = np.append(text_encoder.encode(answer), text_encoder.vocabulary.eos)
    pieces = [*chat(text_encoder, text, views), (Role.ANSWER, _ids(reply))]
    return compose(text_encoder.vocabulary, pieces)


def text_to_image(text_encoder: TextEncoder, text: str, codes: np.ndarray) -> Tokens:
    """A description, then the picture in Emu3's image format.

        bos text │ boi "h*w" img row eol row eol … eof eoi │ eos

    Args:
      text_encoder: vocabulary and text tokenizer.
      text: what to draw.
      codes: integer [h, w] codes.
    """
    eos = np.array([text_encoder.vocabulary.eos], np.int32)
    picture = (Role.MARKUP, image_block(text_encoder, codes))
    return compose(
        text_encoder.vocabulary, [sentence(text_encoder, text), picture, (Role.TEXT, eos)]
    )


def sentence(text_encoder: TextEncoder, text: str) -> Piece:
    """The opening of every sequence: bos and the words."""
    words = text_encoder.encode(text)
    ids = np.empty(len(words) + 1, np.int32)
    ids[0], ids[1:] = text_encoder.vocabulary.bos, words
    return Role.TEXT, ids


def chat(text_encoder: TextEncoder, text: str, views: Sequence[np.ndarray]) -> list[Piece]:
    """Emu3's chat template up to and including "ASSISTANT:"."""
    return [
        sentence(text_encoder, _CHAT_OPEN),
        *_frames(text_encoder, views),
        (Role.TEXT, text_encoder.encode(text + _CHAT_CLOSE)),
    ]


def action_block(text_encoder: TextEncoder, chunk: np.ndarray) -> Piece:
    """boa, the ids of one chunk, eoa (UniVLA train/datasets.py:380-399)."""
    vocabulary = text_encoder.vocabulary
    ids = np.empty(len(chunk) + 2, np.int32)
    ids[0], ids[1:-1], ids[-1] = vocabulary.boa, chunk, vocabulary.eoa
    return Role.ACTION, ids


def _frames(text_encoder: TextEncoder, views: Sequence[np.ndarray]) -> list[Piece]:
    return [(Role.MARKUP, frame_block(text_encoder, view)) for view in views]


def _ids(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.int32)


def _moments(views: Sequence[np.ndarray]) -> int:
    """Number of frames T, the same in every view."""
    counts = {len(view) for view in views}
    if len(counts) != 1:
        raise UserError(f"views hold {sorted(counts)} frames; each needs the same number")
    return counts.pop()
