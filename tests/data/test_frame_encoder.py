"""Frames are encoded in batches of one shape, whatever the lengths of the episodes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.episodes import MeanTokenizer
from univla_jax.data.frame_encoder import FrameEncoder


@pytest.mark.parametrize("lengths", [[1], [4], [3, 2, 9, 1, 1], [8, 8], [25]])
def test_codes_come_out_in_order_from_batches_of_one_shape(lengths):
    rng = np.random.default_rng(0)
    episodes = [rng.integers(0, 256, (n, 8, 16, 3), np.uint8) for n in lengths]
    tokenizer = MeanTokenizer()
    encoder = FrameEncoder(tokenizer.encode_frames, batch=4)
    for frames in episodes:
        encoder.push(frames)
    assert encoder.ready == sum(lengths) // 4 * 4
    encoder.flush()
    encoder.flush()
    assert encoder.ready == sum(lengths)
    assert tokenizer.shapes == [(4, 8, 16, 3)] * -(-sum(lengths) // 4)
    for frames in episodes:
        codes = encoder.take(len(frames))
        assert codes.dtype == np.uint16
        np.testing.assert_array_equal(codes, MeanTokenizer().encode_frames(frames))
