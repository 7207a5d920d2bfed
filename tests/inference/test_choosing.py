from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from univla_jax.errors import UserError
from univla_jax.inference.sampling import GREEDY, Sampling, mask_top_p, sample_token

LOGITS = np.log(np.array([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]], np.float32))


def _frequencies(sampling, draws=4000):
    keys = jax.vmap(jax.random.key)(jnp.arange(draws))
    drawn = sample_token(jnp.broadcast_to(LOGITS[0], (draws, 4)), sampling, keys)
    return np.bincount(drawn, minlength=4) / draws


def test_greedy_takes_the_first_of_the_largest():
    logits = jnp.asarray([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    np.testing.assert_array_equal(sample_token(logits, GREEDY, None), [1, 0])


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(0.5), np.array([1, 16, 4, 9]) / 30),
        (Sampling(1.0, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, top_k=9), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(1.0, top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(1.0, top_k=2, top_p=0.5), [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_frequencies(sampling, expected):
    np.testing.assert_allclose(_frequencies(sampling), expected, atol=0.03)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.3, [1, 1]), (0.39, [1, 1]), (0.41, [2, 1]), (0.975, [4, 2]), (1.0, [4, 4])],
)
def test_top_p_keeps_the_smallest_head(top_p, kept):
    ordered = -np.sort(-LOGITS, axis=1)
    counts = np.isfinite(mask_top_p(jnp.asarray(ordered), top_p)).sum(axis=1)
    np.testing.assert_array_equal(counts, kept)


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}])
def test_bad_rules(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)
