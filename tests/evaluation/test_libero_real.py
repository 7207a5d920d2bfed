"""LIBERO itself; needs ``hf-libero`` and its assets, and minutes."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from univla_jax.evaluation import libero, score
from univla_jax.evaluation.campaign import Effort
from univla_jax.evaluation.simulators import Job, Turn

pytestmark = pytest.mark.slow
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


@pytest.fixture(scope="module")
def assets(shared_dir):
    """The simulator's meshes and textures."""
    if importlib.util.find_spec("libero") is None:
        pytest.skip("hf-libero is not installed: pip install .[libero]")
    folder = shared_dir / "libero_assets"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder.name}/ beside the reference fixtures")
    return str(folder)


@pytest.mark.parametrize("suite", SUITES)
def test_all_tasks_reset_step_and_end(assets, suite, tmp_path):
    rules = libero.protocol(suite, episodes_per_task=1, max_steps=3)
    effort = Effort(workers=1, films=0, progress=False)
    report = score.score(libero.benchmark(rules, assets=assets), "zero", tmp_path / "out", effort)
    assert len(report["tasks"]) == 10 and report["mean_steps"] == 3
    assert report["episodes_lost_to_the_simulator"] == 0


def test_an_episode_does_not_depend_on_the_one_before(assets):
    simulator = libero.LiberoSimulator(libero.protocol("libero_goal", max_steps=5), assets)
    ends = []
    for job in (Job(0, 1), Job(0, 0), Job(0, 1)):
        simulator.reset(job)
        while simulator.step(np.full(7, 0.3)) is not Turn.ENDED:
            pass
        ends.append((simulator.env.get_sim_state(), simulator.observe().frames["image"]))
    assert np.array_equal(ends[0][0], ends[2][0]) and np.array_equal(ends[0][1], ends[2][1])
    assert not np.array_equal(ends[0][0], ends[1][0])
