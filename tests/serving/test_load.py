"""Many robots with histories of their own, at a real policy."""

from __future__ import annotations

import pytest

from tests.inference import tiny_checkpoint
from univla_jax.benchmarks import serve
from univla_jax.inference.policy import Policy


@pytest.mark.slow
def test_eight_robots_get_what_each_gets_alone(tmp_path):
    folder = tiny_checkpoint.save(tmp_path, tiny_checkpoint.make_assets(), scale=20)
    found = serve.figures(Policy.load(folder, max_new_tokens=12), 8, 200)
    assert found["answers"] == 1600 and found["dropped"] == 0
    assert found["differing_from_solo"] == found["one_at_a_time_differing"] == 0
