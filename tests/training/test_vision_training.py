"""Fitting the vision tokenizer: frames and batches, learning, the codebook, and exact resume."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.data.episodes import make_episode
from univla_jax.errors import UserError
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.tokenizers.vision_vq import VisionConfig
from univla_jax.training import vision_training
from univla_jax.training.optimizer import MuonConfig, make_muon
from univla_jax.training.vision_training import (
    FrameBatches,
    VisionLossConfig,
    collect_frames,
    initial_state,
    make_step,
)

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
    codebook, counts, sums, dead = vision_training.update_codebook(
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


SPECS = {"wrist_image": ImageSpec(size=(4, 4), factor=4, min_pixels=16)}


def test_all_frames_or_every_second_one():
    episodes = [make_episode(i) for i in range(4)]  # 3, 4, 5 and 6 frames
    every = collect_frames(episodes, SPECS, most=18)["wrist_image"]
    assert every.shape == (18, 4, 4, 3)
    for most, stride in ((17, 2), (9, 2), (8, 4), (5, 4), (3, 8)):
        kept = collect_frames(episodes, SPECS, most=most)["wrist_image"]
        np.testing.assert_array_equal(kept, every[::stride])


def test_frames_must_agree_in_size():
    episodes = [make_episode(0), make_episode(1, size=(32, 16))]
    with pytest.raises(UserError, match=r"view 'image': frames of sizes .* give its spec a size"):
        collect_frames(episodes, {"image": ImageSpec(factor=4, min_pixels=16)}, most=99)
    with pytest.raises(UserError, match="no frames"):
        collect_frames([], SPECS, most=9)


def test_every_epoch_holds_each_frame_once():
    frames = {"a": np.arange(5, dtype=np.uint8), "b": np.arange(7, dtype=np.uint8)}
    batches = FrameBatches(frames, batch_size=2, seed=3)
    drawn = [next(batches) for _ in range(10)]
    order = np.concatenate([batch["a"] for batch in drawn])
    epochs = order.reshape(4, 5)
    assert (np.sort(epochs, axis=1) == np.arange(5)).all()
    assert len(np.unique(epochs, axis=0)) > 1


def test_position_is_all_there_is_to_a_state():
    frames = {"a": np.arange(50, dtype=np.uint8)}
    batches = FrameBatches(frames, batch_size=4, seed=3)
    for _ in range(5):
        next(batches)
    state = batches.get_state()
    expected = [next(batches)["a"] for _ in range(20)]
    other = FrameBatches(frames, batch_size=4, seed=3)
    other.set_state(state)
    np.testing.assert_array_equal([next(other)["a"] for _ in range(20)], expected)
