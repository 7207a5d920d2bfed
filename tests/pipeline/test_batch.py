"""Examples packed into batches."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.pipeline.batch import Batch, Example, pack

PAD = 99


def example(*tokens, task_id=0, actions=None):
    roles = np.arange(len(tokens), dtype=np.uint8)
    return Example(np.array(tokens, np.int32), roles, task_id, actions)


def test_elements_are_packed_as_drawn():
    arrays = pack(
        [[example(5, 6, 7), example(8, 9, task_id=1)], [example(4, task_id=2)]], length=7, pad=PAD
    )
    assert arrays["tokens"].tolist() == [[5, 6, 7, 8, 9, PAD, PAD], [4] + 6 * [PAD]]
    assert arrays["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
    assert arrays["positions"].tolist() == [[0, 1, 2, 0, 1, 0, 0], [0] * 7]
    assert arrays["roles"].tolist() == [[0, 1, 2, 0, 1, 0, 0], [0] * 7]
    assert arrays["task_ids"].tolist() == [[0, 0, 0, 1, 1, 0, 0], [2, 0, 0, 0, 0, 0, 0]]
    dtypes = {key: array.dtype for key, array in arrays.items()}
    assert {dtypes.pop("roles"), dtypes.pop("task_ids")} == {np.dtype(np.uint8)}
    assert set(dtypes.values()) == {np.dtype(np.int32)}


def test_an_example_may_fill_its_element():
    arrays = pack([[example(5, 6, 7)]], length=3, pad=PAD)
    assert arrays["tokens"].tolist() == [[5, 6, 7]] and arrays["segment_ids"].tolist() == [[1] * 3]


def test_actions_of_a_lone_example_come_along():
    chunk = np.zeros((3, 2), np.float32)
    arrays = pack([[example(1, 2, actions=chunk + i)] for i in range(2)], length=4, pad=PAD)
    np.testing.assert_array_equal(arrays["actions"], [chunk, chunk + 1])
    assert "actions" not in pack([[example(1)]], length=4, pad=PAD)


def test_a_batch_knows_its_valid_elements():
    batch = Batch(**pack([[example(5, 6, 7)], []], length=6, pad=PAD))
    assert batch.tokens.shape == (2, 6) and batch.valid.tolist() == [True, False]
    assert batch.useful_fraction == pytest.approx(3 / 12)
    assert batch.actions is None and len(example(5, 6, 7)) == 3
