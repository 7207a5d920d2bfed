"""The data benchmark measures what it says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from univla_jax.benchmarks import data_speed
from univla_jax.benchmarks.harness import SyntheticEpisodes
from univla_jax.data.datasets import DATASETS


def test_the_libero_case_runs_from_disk(tmp_path):
    cases = data_speed.measure_libero(tmp_path, seconds=0.05, workers=0, episodes=4)
    assert [case["sequences"] for case in cases] == ["padded 3200", "packed 3200", "packed 8000"]
    assert all(case["samples/s"] > 0 for case in cases)
    assert cases[2]["useful tokens %"] > cases[0]["useful tokens %"]


def test_the_mixture_holds_every_corpus_of_the_world_model():
    assert {"tabletop", "aloha", "libero_10"}.isdisjoint(data_speed.MIXTURE)
    assert set(data_speed.MIXTURE) <= set(DATASETS)
    source = SyntheticEpisodes("droid", data_speed.mixture_lengths("droid", 0.001))
    assert len(source) == 76
    assert min(len(source[i]) for i in range(76)) >= 6 * DATASETS["droid"].frame_spacing


def memory_cases(folder, share: float, epochs: float) -> list[dict]:
    """What the benchmark measures in a process of its own: other tests leave memory in this one."""
    command = [sys.executable, "-m", "univla_jax.benchmarks.data_speed", "--parts=memory"]
    command += [f"--share={share}", f"--epochs={epochs}", f"--folder={folder}"]
    subprocess.run([*command, f"--json={folder}/figures.json"], cwd=REPOSITORY, check=True)
    return json.loads((folder / "figures.json").read_text())["memory"]


@pytest.mark.slow
def test_memory_stays_flat_over_epochs(tmp_path):
    cases = memory_cases(tmp_path, share=0.01, epochs=3)
    before, opened, *read = [case["memory MB"] for case in cases]
    assert len(read) == 10 and cases[-1]["samples"] > 15_000
    assert opened - before < 100 and max(read) < 2048
    assert max(read[2:]) - read[1] <= 16  # after the first readings, where buffers grow


@pytest.mark.slow
def test_every_published_episode_can_be_open_at_once(tmp_path):
    _, opened, *read = memory_cases(tmp_path, share=1, epochs=0.001)
    assert "episodes in 10,5" in opened["when"]
    assert max(case["memory MB"] for case in read) < 2048
