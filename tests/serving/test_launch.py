"""What a robot is told when it connects."""

from __future__ import annotations

import dataclasses

from tests.inference import tiny_checkpoint
from univla_jax.inference.execution import Execution, Executor
from univla_jax.inference.policy import Policy
from univla_jax.serving import wire
from univla_jax.serving.startup import describe


def test_a_robot_learns_what_to_send_and_what_it_gets(tmp_path):
    policy = Policy.load(tiny_checkpoint.save(tmp_path, tiny_checkpoint.make_assets()))
    told = describe(Executor(policy, Execution("receding", steps=2)))
    assert wire.unpack(wire.pack(told)) == told
    assert (told["chunk"], told["actions_per_call"], told["action_dim"]) == (3, 2, 7)
    assert (told["checkpoint_step"], told["control_hz"]) == (7, 5.0)
    shapes = {"observation/image": [24, 24, 3], "observation/wrist_image": [16, 16, 3]}
    assert told["observation_keys"] == shapes
    assert told["action_q01"] == list(tiny_checkpoint.STATISTICS.q01)
    assert len(told["statistics_sha256"]) == 64


def test_a_robot_learns_that_its_state_is_wanted(tmp_path):
    assets = tiny_checkpoint.make_assets(state=True)
    statistics = {**assets.statistics, "tabletop/state": tiny_checkpoint.STATISTICS}
    assets = dataclasses.replace(assets, statistics=statistics)
    policy = Policy.load(tiny_checkpoint.save(tmp_path, assets))
    told = describe(Executor(policy, Execution("chunk")))
    assert told["observation_keys"]["observation/state"] == [7]
