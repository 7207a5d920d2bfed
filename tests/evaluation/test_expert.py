"""The expert's actions, straight and through ids."""

from __future__ import annotations

import numpy as np

from univla_jax.evaluation.actors import ActionRoundTrip, ScriptedActor
from univla_jax.normalization import ActionStatistics
from univla_jax.simulators.base import PlannedObservation
from univla_jax.tokenizers.fast import FastTokenizer

LOW, HIGH = (-0.7, -0.8, -0.9, -0.1, -0.2, -0.2, -1.0), (0.9, 0.9, 0.9, 0.1, 0.2, 0.3, 1.0)
STATISTICS = ActionStatistics(mean=LOW, std=HIGH, q01=LOW, q99=HIGH)


def _plan(seed=0):
    rng = np.random.default_rng(seed)
    ends = rng.uniform(LOW, HIGH, (2, 7))
    plan = np.linspace(*ends, 10)
    plan[:, 6] = np.where(np.arange(10) < 6, -1, 1)
    return plan.astype(np.float32)


def _tokenizer():
    chunks = np.stack([STATISTICS.normalize(_plan(seed)) for seed in range(1, 40)])
    return FastTokenizer.fit(chunks, 10.0, 512)


def test_a_plan_is_done_as_it_is():
    (chunk,) = ScriptedActor().act([PlannedObservation("do", {}, None, _plan())], [None])
    assert np.array_equal(chunk.actions, _plan()) and chunk.valid


def test_through_ids_it_comes_out_nearly_the_same():
    """Within what rounding the coefficients does, in physical units, with the gripper's sign."""
    (chunk,) = ScriptedActor(ActionRoundTrip(STATISTICS, _tokenizer())).act(
        [PlannedObservation("do", {}, None, _plan())], [None]
    )
    span = np.subtract(HIGH, LOW)
    error = np.abs(chunk.actions - _plan()) / span
    assert chunk.valid and 0 < error.max() < 0.1
    assert np.array_equal(np.sign(chunk.actions[:, 6]), _plan()[:, 6])


def test_the_way_is_told_by_its_parts():
    path = ActionRoundTrip(STATISTICS, _tokenizer())
    assert path.identity()["statistics"]["q01"] == list(LOW)
    assert path.identity()["action_tokenizer"] == path.tokenizer.fingerprint
