"""What a model is given to continue: the training layouts, cut where generation starts.

    policy     bos text │ fmt(v1) fmt(v2) [state] boa   → action ids, eoa
    turn                  fmt(v1) fmt(v2) [state] boa   → the same; joined by history.py
    reasoning  bos text │ fmt(v1) … bot                 → reasoning, eot, boa, action ids, eoa
    imagine    bos text │ fmt(f0) │ … │ boi "1*h*w" img → h*w visual ids, then ``frame_separator``
    draw       bos text │ boi "T*h*w" img               → codes as ``video_grammar`` orders them
    draw       bos text │ boi "h*w" img                 → codes as ``image_grammar`` orders them
    ask        bos "… USER: " fmt(v1) text ". ASSISTANT:" → answer, eos

All return int32 ids. Views are integer [T, h, w] codes, one per camera. Source: video_process of
UniVLA reference/Emu3/emu3/mllm/processing_emu3.py:86-290; its mode names stand in the docstrings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from univla_jax.sequences.frames import frame_block, frame_blocks, frame_header
from univla_jax.sequences.layouts import chat, sentence
from univla_jax.sequences.text_encoder import TextEncoder


def policy_prompt(
    text_encoder: TextEncoder,
    instruction: str,
    views: Sequence[np.ndarray],
    *,
    shown: int | None = None,
) -> np.ndarray:
    """Image policy, any number of views (modes VLA, VLA2, VLA_ALOHA).

    Args:
      text_encoder: vocabulary and text tokenizer.
      instruction: the task in words.
      views: per camera [T, h, w] codes.
      shown: frames written of T (``frame_block``).
    """
    return _join(opening(text_encoder, instruction), turn_prompt(text_encoder, views, shown=shown))


def turn_prompt(
    text_encoder: TextEncoder,
    views: Sequence[np.ndarray],
    state: np.ndarray | None = None,
    *,
    shown: int | None = None,
) -> np.ndarray:
    """One moment of the video policy, no text (modes VLA_Video, VLA2_Video, VLA_VIDEO_ALOHA).

    Args:
      text_encoder: vocabulary and text tokenizer.
      views: per camera [T, h, w] codes.
      state: ids of the state (``chunks.encode_states``), or None where the policy was shown none.
      shown: frames written of T (``frame_block``).
    """
    blocks = _blocks(text_encoder, views, shown)
    return _join(blocks, [] if state is None else state, [text_encoder.vocabulary.boa])


def reasoning_prompt(
    text_encoder: TextEncoder,
    instruction: str,
    views: Sequence[np.ndarray],
    *,
    shown: int | None = None,
) -> np.ndarray:
    """Image policy that reasons first (mode VLA_COT)."""
    blocks = _blocks(text_encoder, views, shown)
    return _join(opening(text_encoder, instruction), blocks, [text_encoder.vocabulary.bot])


def imagine_prompt(text_encoder: TextEncoder, instruction: str, context: np.ndarray) -> np.ndarray:
    """World model: each context frame in its own block, then the head of the next (INTERLEAVE).

    Args:
      text_encoder: vocabulary and text tokenizer.
      instruction: the task in words; "" is the null prompt of classifier-free guidance.
      context: [T, h, w] codes of the frames before the one to imagine, oldest first.
    """
    blocks = frame_blocks(text_encoder, context)
    head = frame_header(text_encoder, *context.shape[1:])
    return _join(opening(text_encoder, instruction), blocks.ravel(), head)


def draw_prompt(
    text_encoder: TextEncoder, text: str, height: int, width: int, frames: int | None = None
) -> np.ndarray:
    """Text to image (``frames=None``) or text to video (mode G of the video processor).

    Args:
      text_encoder: vocabulary and text tokenizer.
      text: what to draw.
      height: code rows.
      width: code columns.
      frames: number of frames, or None for a picture in the image format.
    """
    return _join(opening(text_encoder, text), frame_header(text_encoder, height, width, frames))


def ask_prompt(text_encoder: TextEncoder, text: str, views: Sequence[np.ndarray]) -> np.ndarray:
    """A question about what is seen, in Emu3's chat template (mode U)."""
    return _join(*(ids for _, ids in chat(text_encoder, text, views)))


def opening(text_encoder: TextEncoder, instruction: str) -> np.ndarray:
    """bos and the words of the instruction."""
    return sentence(text_encoder, instruction)[1]


def _blocks(
    text_encoder: TextEncoder, views: Sequence[np.ndarray], shown: int | None
) -> np.ndarray:
    return _join(*(frame_block(text_encoder, view, shown=shown) for view in views))


def _join(*parts: np.ndarray | list[int]) -> np.ndarray:
    return np.concatenate([np.asarray(p, np.int32) for p in parts])
