"""Static shapes."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.inference.sampler import batch_bucket, length_bucket, pad_prompts


@pytest.mark.parametrize(
    ("length", "bucket"), [(0, 32), (1, 32), (33, 64), (256, 256), (257, 288), (1300, 1408)]
)
def test_length_buckets(length, bucket):
    assert length_bucket(length) == bucket


def test_buckets_hold_and_waste_little():
    for length in range(1, 4000):
        assert length <= length_bucket(length) <= max(length * 1.125, length + 31)
        assert length_bucket(length_bucket(length)) == length_bucket(length)
    assert len({length_bucket(n) for n in range(1024, 2048)}) <= 9


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (8, 8), (9, 16), (40, 40)])
def test_row_buckets(rows, bucket):
    assert batch_bucket(rows) == bucket


def test_prompts_are_padded_to_one_shape():
    tokens, lengths = pad_prompts([np.array([5, 6, 7]), np.array([8])], pad=0, batch_size=4)
    assert tokens.shape == (4, 32) and tokens.dtype == lengths.dtype == np.int32
    assert lengths.tolist() == [3, 1, 3, 3]
    assert tokens[:, :4].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0], [5, 6, 7, 0], [5, 6, 7, 0]]
