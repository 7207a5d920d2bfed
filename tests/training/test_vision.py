"""Training the vision tokenizer: it learns, its codebook lives, and it resumes to the last bit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from univla_jax.errors import UserError
from univla_jax.tokenizers.vision import VisionConfig
from univla_jax.training import vision_training
from univla_jax.training.optimizer import MuonConfig, make_muon
from univla_jax.training.vision_training import VisionLossConfig, initial_state, make_step

CONFIG = VisionConfig(
    codebook_size=32,
    ch=8,
    ch_mult=(1, 1),
    num_res_blocks=1,
    attn_resolutions=(),
    temporal_downsample_factor=1,
    num_groups=4,
)
LOSS = VisionLossConfig(continuous_steps=5)
OPTIMIZER = make_muon(MuonConfig(warmup_steps=5), total_steps=40)


def batch(step):
    """Two views of different sizes: a colored square somewhere on a gray ground."""
    random = np.random.default_rng(step)
    views = {}
    for view, size in (("image", 8), ("wrist_image", 4)):
        views[view] = np.full((4, size, size, 3), 120, np.uint8)
        for frame in views[view]:
            row, column = random.integers(0, size - 2, 2)
            frame[row : row + 3, column : column + 3] = (200, 60, 30)
    return views


@pytest.fixture(scope="module")
def step():
    return make_step(CONFIG, LOSS, OPTIMIZER, seed=0)


@pytest.fixture(scope="module")
def run(step):
    """States before steps 5, 20 and after 40, on the host, and all metrics."""
    state, states, metrics = initial_state(CONFIG, OPTIMIZER, seed=0), {}, []
    for k in range(40):
        if k in (5, 20):
            states[k] = jax.device_get(state)
        state, values = step(state, batch(k))
        metrics.append(jax.device_get(values))
    return states | {40: jax.device_get(state)}, metrics


def test_it_learns(run):
    _, metrics = run
    assert metrics[-1]["psnr"] > metrics[0]["psnr"] + 6
    assert all(np.isfinite(m["loss"]) for m in metrics)
    assert metrics[3]["commitment"] == 0 < metrics[6]["commitment"]


def test_the_codebook_starts_from_latents_and_stays_alive(run):
    states, metrics = run
    rows = states[5].params["quantize"]["embedding"]
    assert len(np.unique(rows, axis=0)) == CONFIG.codebook_size
    assert [m["revived"] for m in metrics[:5]] == [CONFIG.codebook_size] * 5
    assert metrics[-1]["codes_used"] > 0.3
    assert (states[40].counts > 0).all()


def test_resumed_from_any_state_it_goes_on_to_the_last_bit(run, step):
    states, _ = run
    state = jax.tree.map(jnp.asarray, states[20])
    for k in range(20, 40):
        state, _ = step(state, batch(k))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), states[40])


def test_rows_follow_their_latents_and_dead_ones_move():
    loss = VisionLossConfig(decay=0.5, revive_below=0.3, continuous_steps=0)
    state = vision_training.VisionTrainState(
        step=jnp.int32(7),
        params={},
        batch_stats={},
        opt_state=(),
        counts=jnp.array([2.0, 0.4, 0.5]),
        sums=jnp.array([[2.0], [4.0], [3.0]]),
    )
    latents, codes = jnp.array([[5.0], [7.0]]), jnp.array([0, 0])
    codebook, counts, sums, dead = vision_training._follow(
        loss, state, latents, codes, jax.random.key(0)
    )
    # row 0: (2 + 2) / 2 latents of sum (2 + 12) / 2; rows 1 and 2 fall to 0.2 and 0.25
    assert counts.tolist() == [2.0, 1.0, 1.0] and dead.tolist() == [False, True, True]
    assert codebook[0].item() == 3.5 and sums[0].item() == 7.0
    assert {codebook[1].item(), codebook[2].item()} <= {5.0, 7.0}


def test_dropout_and_bad_rates_are_refused():
    with pytest.raises(UserError, match=r"dropout 0\.1 cannot be trained"):
        initial_state(dataclasses.replace(CONFIG, dropout=0.1), OPTIMIZER, seed=0)
    with pytest.raises(UserError, match="decay 1 is not between"):
        VisionLossConfig(decay=1)
