"""The table of small and offloaded optimizer states, from runs that are replaced here."""

from __future__ import annotations

import json

import pytest

from tests.training import tiny_run, toy
from univla_jax.benchmarks import optimizer_states
from univla_jax.checkpoints import CheckpointConfig, Checkpointer
from univla_jax.errors import UserError
from univla_jax.training.metrics import METRICS_FILE


def test_losses_and_bytes_are_those_of_the_runs(tmp_path, monkeypatch):
    config, asked = tiny_run.config(tmp_path, total_steps=10), []

    def train(run, folder, *, progress):
        optimizer = run.optimizer
        asked.append((optimizer.moments_dtype, optimizer.offload, run.log_every, run.total_steps))
        with Checkpointer(folder, CheckpointConfig(asynchronous=False)) as saver:
            saver.save(10, toy.create())
        scale = 1.02 if optimizer.moments_dtype == "int8" else 1.0
        lines = [{"step": step, "loss": scale * (100 - step)} for step in range(10)]
        lines.append({"step": 10, "eval/loss": 3 * scale})
        (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(optimizer_states, "train", train)
    kinds = ["float32", "int8", "offloaded"]
    whole, small, away = optimizer_states.measure(config, tmp_path, kinds, progress=False)
    assert asked == [("float32", False, 1, 10), ("int8", False, 1, 10), ("float32", True, 1, 10)]
    assert whole["bytes"] == 4 + 2 * 4 * 4  # a count and both moments of the toy's four weights
    assert (whole["loss"], whole["loss, more %"]) == (91.5, 0)
    assert (small["loss, more %"], small["held-out loss, more %"]) == (2, 2)
    assert {**away, "state": ""} == {**whole, "state": ""}
    with pytest.raises(UserError, match=r"--kinds: \['float16'\]; expected some of float32, bfl"):
        optimizer_states.measure(config, tmp_path, ["float32", "float16"])
