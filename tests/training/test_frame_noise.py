"""Frames misread in training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from univla_jax.errors import UserError
from univla_jax.training.frame_noise import misread_frames
from univla_jax.training.train_config import LossConfig

VISUAL = (20, 29)


def test_only_codes_are_misread_and_each_frame_at_a_rate_of_its_own():
    frame = [3, *[20] * 40, 4]
    tokens = jnp.asarray(np.tile(np.array(frame * 3, np.int32), (64, 1)))
    read = np.asarray(misread_frames(jax.random.key(0), tokens, VISUAL, 1.0))
    visual = np.asarray(tokens) == 20
    np.testing.assert_array_equal(read[~visual], np.asarray(tokens)[~visual])
    assert set(np.unique(read[visual])) == set(range(20, 30))
    share = (read != np.asarray(tokens))[visual].reshape(64, 3, 40).mean(-1)
    # One code of ten is drawn again by chance: the rates reach from 0 to 0.9.
    assert share.mean() == pytest.approx(0.45, abs=0.05)
    assert share.min() < 0.1 and share.max() > 0.8
    assert abs(np.corrcoef(share[:, 0], share[:, 1])[0, 1]) < 0.35


def test_a_rate_of_zero_changes_nothing():
    tokens = jnp.asarray([[1, 22, 23, 2, 24]], jnp.int32)
    np.testing.assert_array_equal(misread_frames(jax.random.key(1), tokens, VISUAL, 0.0), tokens)


def test_a_fraction_is_wanted():
    with pytest.raises(UserError, match=r"loss\.vision_noise: 1\.5; expected 0 to 1"):
        LossConfig(vision_noise=1.5)
