"""Many robots with histories of their own, at a real policy."""

from __future__ import annotations

import pytest

from tests.inference import tiny_checkpoint
from univla_jax.benchmarks import serving_speed
from univla_jax.benchmarks.harness import random_policy
from univla_jax.inference.policy import Policy


def _check(policy, clients, requests, compared):
    found = serving_speed.measure(policy, clients, requests, compared, turns=1)
    assert found["compiled_while_serving"] == 0
    assert found["answers"] == clients * requests
    for way in ("together_", "one_at_a_time_"):
        assert found[way + "answers"] == clients * compared
    assert all(
        found[way + "differing_from_solo"] == 0 for way in ("", "together_", "one_at_a_time_")
    )


@pytest.mark.slow
def test_eight_robots_get_what_each_gets_alone(tmp_path):
    folder = tiny_checkpoint.save(tmp_path, tiny_checkpoint.make_assets(), scale=20)
    _check(Policy.load(folder, max_new_tokens=12), 8, 200, 50)


@pytest.mark.slow
def test_the_policy_of_random_weights():
    _check(random_policy("tiny"), 2, 12, 12)
