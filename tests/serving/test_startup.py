"""Compilation before the port opens, and the first message to a robot."""

from __future__ import annotations

import dataclasses

from tests.inference import tiny_checkpoint
from univla_jax.inference.policy import Execution, Executor, Policy
from univla_jax.serving import protocol
from univla_jax.serving.startup import server_metadata, warmup


def test_a_robot_learns_what_to_send_and_what_it_gets(tmp_path):
    policy = Policy.load(tiny_checkpoint.save(tmp_path, tiny_checkpoint.make_assets()))
    metadata = server_metadata(Executor(policy, Execution("receding", steps=2)))
    assert protocol.unpack(protocol.pack(metadata)) == metadata
    assert (metadata["chunk"], metadata["actions_per_call"], metadata["action_dim"]) == (3, 2, 7)
    assert (metadata["checkpoint_step"], metadata["control_hz"]) == (7, 5.0)
    shapes = {"observation/image": [24, 24, 3], "observation/wrist_image": [16, 16, 3]}
    assert metadata["observation_keys"] == shapes
    assert metadata["action_q01"] == list(tiny_checkpoint.STATISTICS.q01)
    assert len(metadata["statistics_sha256"]) == 64


def test_a_robot_learns_that_its_state_is_wanted(tmp_path):
    assets = tiny_checkpoint.make_assets(state=True)
    statistics = {**assets.statistics, "tabletop/state": tiny_checkpoint.STATISTICS}
    assets = dataclasses.replace(assets, statistics=statistics)
    policy = Policy.load(tiny_checkpoint.save(tmp_path, assets))
    metadata = server_metadata(Executor(policy, Execution("chunk")))
    assert metadata["observation_keys"]["observation/state"] == [7]


def test_every_batch_size_that_a_call_is_padded_to_is_compiled():
    class Recorder:
        sizes = []

        def warmup(self, rows):
            self.sizes.append(rows)

    warmup(Recorder(), 20, lambda message: None)
    assert Recorder.sizes == [1, 2, 4, 8, 16, 24]
