"""Masks, the plain formula, the choice of a kernel, and attention sharded over a mesh."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.models.attention_inputs import mask_of, qkv
from univla_jax.errors import UserError
from univla_jax.models.attention import (
    attention,
    attention_mask,
    choose_implementation,
    plain_attention,
)
from univla_jax.models.attention_kernels import CachedKeyValues


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        (None, "1 . . .\n1 1 . .\n1 1 1 .\n1 1 1 1"),
        ([1, 1, 2, 2], "1 . . .\n1 1 . .\n. . 1 .\n. . 1 1"),
        ([1, 1, 1, 0], "1 . . .\n1 1 . .\n1 1 1 .\n. . . 1"),
        ([1, 2, 0, 0], "1 . . .\n. 1 . .\n. . 1 .\n. . 1 1"),
    ],
)
def test_mask_of_new_tokens(segments, expected):
    ids = None if segments is None else jnp.asarray([segments])
    np.testing.assert_array_equal(attention_mask(4, ids)[0], mask_of(expected))


def test_mask_of_other_visibilities():
    """Full attention, and padding as keys only: the last of three tokens is padding."""
    full = attention_mask(3, jnp.asarray([[1, 1, 2]]), causal=False)
    np.testing.assert_array_equal(full[0], [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    keys = attention_mask(3, jnp.ones((1, 3), int), jnp.asarray([[1, 1, 0]]))
    np.testing.assert_array_equal(keys[0], [[1, 0, 0], [1, 1, 0], [1, 1, 0]])


def test_written_out_by_hand():
    """Two tokens, one head of size 2: the second token averages by softmax([1, 2] / sqrt(2))."""
    query = jnp.asarray([[[[9.0, 9.0]], [[1.0, 0.0]]]])
    key = jnp.asarray([[[[1.0, 0.0]], [[2.0, 0.0]]]])
    value = jnp.asarray([[[[10.0, 0.0]], [[0.0, 10.0]]]])
    weights = np.exp(np.array([1, 2]) / np.sqrt(2))
    weights /= weights.sum()
    out = attention(query, key, value)
    np.testing.assert_allclose(out[0, :, 0], [[10, 0], 10 * weights], rtol=1e-6)


def test_query_heads_share_key_heads_in_order():
    query, key, value = qkv(2, 5)
    repeated = [jnp.repeat(x, 2, axis=2) for x in (key, value)]
    np.testing.assert_allclose(
        plain_attention(query, key, value), plain_attention(query, *repeated), atol=1e-6
    )


def test_cached_keys_continue_a_sequence():
    """Six tokens at once equal two cached ones, then four, in a window with stale slots."""
    query, key, value = qkv(2, 6)
    whole = attention(query, key, value)
    stale = jnp.full((2, 3, 2, 8), 1e3)
    cached = CachedKeyValues(
        jnp.concatenate([key[:, :2], stale], 1),
        jnp.concatenate([value[:, :2], stale], 1),
        starts=jnp.asarray([2, 2]),
    )
    part = attention(query[:, 2:], key[:, 2:], value[:, 2:], cached=cached)
    np.testing.assert_allclose(part, whole[:, 2:], atol=1e-6)


def test_segments_and_a_cache_exclude_each_other():
    query, key, value = qkv(1, 2)
    cached = CachedKeyValues(key, value, jnp.asarray([2]))
    with pytest.raises(UserError, match="exclude each other"):
        attention(query, key, value, segment_ids=jnp.ones((1, 2)), cached=cached)


@pytest.mark.parametrize(
    ("call", "chosen"),
    [
        (("tpu", 3200, 128, jnp.bfloat16), "splash"),
        (("tpu", 3200, 64, jnp.bfloat16), "blocked"),
        (("tpu", 3200, 128, jnp.bfloat16, 0.1), "blocked"),
        (("gpu", 3200, 128, jnp.dtype("bfloat16")), "cudnn"),
        (("gpu", 3200, 128, jnp.dtype("float32")), "blocked"),
        (("cpu", 3200, 128, jnp.bfloat16), "blocked"),
        (("cpu", 65, 16, jnp.float32), "blocked"),
        (("cpu", 64, 16, jnp.float32), "plain"),
        (("tpu", 112, 128, jnp.bfloat16), "blocked"),
        (("tpu", 64, 128, jnp.bfloat16), "plain"),
    ],
)
def test_choice_by_platform(call, chosen):
    assert choose_implementation(*call) == chosen


def test_fused_kernels_have_no_dropout():
    with pytest.raises(UserError, match="attention_dropout=0"):
        attention(*qkv(1, 2), implementation="splash", dropout=0.1, dropout_key=jax.random.key(0))


def test_rows_heads_and_sequence_split_over_eight_devices():
    """Packed rows; two key heads over four parts; a part that is no multiple of a block."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.mesh_attention"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 4
    assert max(errors.values()) < 2e-5, errors
