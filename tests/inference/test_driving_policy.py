"""Driving checkpoints act and imagine: from an observation of the road to motions and frames."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.inference import tiny_checkpoint
from tests.tasks import driving_runs
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.inference.imagination import WorldModel
from univla_jax.inference.policy import Policy
from univla_jax.tokenizers.image import ImageSpec

RECORD = {
    "layout": "driving_vava",
    "frames": 1,
    "action_frames": 8,
    "frame_spacing": 2,
    "sequence_length": 512,
    "views": list(driving_runs.VIEWS),
    "state": True,
    "corpora": {
        "road": {
            "control_hz": 2.0,
            "frame_spacing": 2,
            "grids": {view: list(driving_runs.GRID) for view in driving_runs.VIEWS},
        }
    },
}


def checkpoint(folder, **record):
    spec = ImageSpec(size=(16, 24), min_pixels=64)
    assets = dataclasses.replace(
        driving_runs.assets(),
        image_specs=dict.fromkeys(driving_runs.VIEWS, spec),
        task={**RECORD, **record},
    )
    return tiny_checkpoint.save(folder, assets, scale=20)


def observation(command="go left", state=None):
    rng = np.random.default_rng(0)
    frames = {v: rng.integers(0, 255, (16, 24, 3), np.uint8) for v in driving_runs.VIEWS}
    return Observation(command, frames, driving_runs.run().state[4] if state is None else state)


@pytest.mark.slow
def test_a_policy_drives(tmp_path):
    policy = Policy.load(checkpoint(tmp_path))
    [chunk] = policy.act([observation()], [policy.start()])
    assert chunk.valid and chunk.actions.shape == (8, 3)
    with pytest.raises(UserError, match="view 'previous_image' is missing"):
        frames = {"image": observation().frames["image"]}
        policy.act([dataclasses.replace(observation(), frames=frames)], [policy.start()])
    with pytest.raises(UserError, match="27 finite numbers"):
        policy.act([observation(state=np.zeros(4, np.float32))], [policy.start()])
    # Out of tokens, it drives straight on at its speed and says that it did not plan.
    short = Policy.load(tmp_path, max_new_tokens=1)
    [chunk] = short.act([observation()], [short.start()])
    assert not chunk.valid
    np.testing.assert_allclose(chunk.actions[:, 0], 0.5 * observation().state[0])
    assert not chunk.actions[:, 1:].any()


@pytest.mark.slow
def test_a_world_model_imagines_after_motions(tmp_path):
    views = {"views": ["image"], "layout": "driving_world_model", "state": False, "frames": 2}
    model = WorldModel.load(checkpoint(tmp_path, **views))
    context = np.zeros((2, 1, *driving_runs.GRID), np.uint16)
    motions = np.stack([driving_runs.motions()[:7], driving_runs.motions()[5:12]])
    codes = model.imagine(["go left", "go right"], context, 2, motions=motions)
    assert codes.shape == (2, 2, *driving_runs.GRID)
    alone = model.imagine(["go left"], context[:1], 2, motions=motions[:1])
    np.testing.assert_array_equal(codes[:1], alone)
    # Trained on two frames in a row, it sees one at a time, however many are known.
    later = model.imagine(["go left", "go right"], codes[:, :1], 1, motions=motions[:, 2:])
    np.testing.assert_array_equal(codes[:, 1:], later)
    known = np.concatenate([context, codes[:, :1]], axis=1)
    np.testing.assert_array_equal(
        later, model.imagine(["go left", "go right"], known, 1, motions=motions)
    )
    with pytest.raises(UserError, match="motions of shape none"):
        model.imagine(["go left", "go right"], context, 1)
