"""The memory of the pipeline with every corpus open."""

from __future__ import annotations

import pytest

from univla_jax.benchmarks import data_memory


@pytest.mark.slow
def test_memory_stays_flat_over_epochs(tmp_path):
    rows = data_memory.measure(tmp_path, share=0.01, epochs=3)
    before, opened, *read = [row["memory MB"] for row in rows]
    assert len(read) == 10 and rows[-1]["samples"] > 15_000
    assert opened - before < 100 and max(read) < 2048
    assert max(read[2:]) - read[1] <= 16  # behind the first places, where buffers grow


@pytest.mark.slow
def test_every_published_episode_can_be_open_at_once(tmp_path):
    _, opened, *read = data_memory.measure(tmp_path, share=1, epochs=0.001)
    assert "episodes in 10,5" in opened["place"]
    assert max(row["memory MB"] for row in read) < 2048
