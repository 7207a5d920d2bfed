"""A run of two processes that is killed, beside one that is not."""

from __future__ import annotations

import json

import pytest

from tests.training import tiny_run
from univla_jax.benchmarks import kill_recovery
from univla_jax.config import build_config
from univla_jax.errors import UserError
from univla_jax.training.train_config import TrainConfig


def _config(folder, monkeypatch, **values):
    world = tiny_run.make_world(folder / "world")
    values = tiny_run.values(world, **{"checkpoint__every": 5, **values})
    values["data"]["batch_size"] = 8
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return build_config(TrainConfig, values)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_metrics_of_an_unbroken_one(tmp_path, monkeypatch):
    config = _config(tmp_path, monkeypatch, total_steps=100)
    found = kill_recovery.measure(config, tmp_path, processes=2, kills=2, most_seconds=0.2, seed=1)
    assert found["same metrics"] is True
    assert found["kills"] == 2 and 0 < found["goodput"] < 1
    starts = [
        line
        for line in map(json.loads, (tmp_path / "killed/goodput.jsonl").open())
        if line["event"] == "start"
    ]
    assert len(starts) == 3


@pytest.mark.slow
def test_a_run_that_cannot_start_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"process 0 ended with status 2; see .*unbroken\.0\.log"):
        config = _config(tmp_path, monkeypatch, total_steps=5, data__stores=("nowhere",))
        kill_recovery.measure(config, tmp_path, processes=1, kills=1, most_seconds=1)
