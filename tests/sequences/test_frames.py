"""Frames and pictures as token blocks, and their grammars."""

from __future__ import annotations

import numpy as np
import pytest

from tests.sequences.spelling import FRAME, TEXT_ENCODER, code, spell
from univla_jax.errors import UserError
from univla_jax.sequences.frames import (
    FREE,
    frame_block,
    frame_blocks,
    frame_header,
    frame_separator,
    image_block,
    image_grammar,
    video_grammar,
)

TWO = np.concatenate([code(1, 2), code(3, 4)])


def test_frames_of_one_block_are_joined_by_eof():
    joined = "<boi> 2 * 1 * 2 <img> v1 v2 <eof> v3 v4 <eof> <eoi>"
    assert spell(frame_block(TEXT_ENCODER, TWO)) == joined
    first = "<boi> 2 * 1 * 2 <img> v1 v2 <eof> <eoi>"
    assert spell(frame_block(TEXT_ENCODER, TWO, shown=1)) == first


def test_each_frame_may_have_a_block_of_its_own():
    blocks = frame_blocks(TEXT_ENCODER, TWO)
    assert [spell(block) for block in blocks] == [FRAME.format(1, 2), FRAME.format(3, 4)]
    for t, block in enumerate(blocks):
        np.testing.assert_array_equal(block, frame_block(TEXT_ENCODER, TWO[t : t + 1]))


def test_the_header_and_the_separator_are_parts_of_the_blocks():
    assert spell(frame_header(TEXT_ENCODER, 1, 2)) == "<boi> 1 * 1 * 2 <img>"
    assert spell(frame_header(TEXT_ENCODER, 1, 2, None)) == "<boi> 1 * 2 <img>"
    assert spell(frame_separator(TEXT_ENCODER, 1, 2)) == "<eof> <eoi> <boi> 1 * 1 * 2 <img>"
    joined = np.concatenate(list(frame_blocks(TEXT_ENCODER, TWO)))
    assert spell(frame_separator(TEXT_ENCODER, 1, 2)) in spell(joined)


def test_a_picture_ends_every_row():
    picture = image_block(TEXT_ENCODER, np.array([[1, 2], [3, 4]]))
    assert spell(picture) == "<boi> 2 * 2 <img> v1 v2 <eol> v3 v4 <eol> <eof> <eoi>"


def test_grammars_describe_the_blocks():
    v = TEXT_ENCODER.vocabulary
    assert (image_grammar(TEXT_ENCODER, 2, 3) == v.eol).sum() == 2
    video = video_grammar(TEXT_ENCODER, 1, 2, 2)
    assert video.tolist() == [FREE, FREE, v.eof, FREE, FREE, v.eof, v.eoi, v.eos]
    picture = np.append(image_block(TEXT_ENCODER, np.array([[1, 2, 3], [4, 5, 6]])), v.eos)
    frames = np.append(frame_block(TEXT_ENCODER, TWO), v.eos)
    for ids, grammar in [(picture, image_grammar(TEXT_ENCODER, 2, 3)), (frames, video)]:
        tail = ids[np.flatnonzero(ids == v.img)[0] + 1 :]
        np.testing.assert_array_equal(tail[grammar != FREE], grammar[grammar != FREE])
        visual = (tail >= v.bov) & (tail <= v.eov)
        np.testing.assert_array_equal(visual, grammar == FREE)


def test_unfit_codes_are_refused():
    cases = {
        r"\[T, h, w\]": lambda: frame_block(TEXT_ENCODER, TWO[0]),
        "visual code 12": lambda: frame_blocks(TEXT_ENCODER, code(12)),
        r"\[h, w\]": lambda: image_block(TEXT_ENCODER, TWO),
    }
    for message, call in cases.items():
        with pytest.raises(UserError, match=message):
            call()
