"""The LeRobot plugin: LeRobot's own evaluation, in an environment of its own, asks our server."""

from __future__ import annotations

import json
import os
import subprocess

import numpy as np
import pytest

from tests.serving import harness
from univla_jax.episode import ActionChunk
from univla_jax.simulators import Trial
from univla_jax.simulators.aloha.aloha_benchmark import (
    AlohaProtocol,
    AlohaSimulator,
    ScriptedAloha,
)

PYTHON = os.environ.get("LEROBOT_PYTHON", "")
"""An interpreter with lerobot, gym-aloha, the client and the plugin."""
SEEDS, CHUNK, VIEW = (0, 1), 50, "cam_high"
# The registry's torchvision cannot load its operators beside a PyTorch for CPUs, and LeRobot, which
# uses none of them here, not torchvision without them.
LEROBOT_EVAL = """
import runpy, torch
register = torch.library.register_fake
def register_fake(operator, *given, **named):
    if operator.startswith("torchvision::"):
        return lambda function: function
    return register(operator, *given, **named)
torch.library.register_fake = register_fake
runpy.run_module("lerobot.scripts.lerobot_eval", run_name="__main__")
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="LEROBOT_PYTHON names no interpreter with lerobot"),
]


class ScriptedPolicy(harness.CountingPolicy):
    """Knows the first frame and the expert's actions of each seed; tells seeds apart by frame."""

    def __init__(self):
        super().__init__()
        trials = [Trial(0, seed) for seed in SEEDS]
        simulator, expert = AlohaSimulator(AlohaProtocol()), ScriptedAloha(AlohaProtocol())
        self.first_frames, self.plans = [], []
        for trial in trials:
            simulator.reset(trial)
            self.first_frames.append(simulator.observe().frames[VIEW])
            expert.reset(trial)
            self.plans.append(expert._plan)
        self.frame_sizes = {VIEW: self.first_frames[0].shape[:2]}

    def act(self, observations, sessions, *, timer=None):
        self.batches.append(len(observations))
        chunks = []
        for seen, session in zip(observations, sessions, strict=True):
            if not session:
                differences = [np.abs(seen.frames[VIEW].astype(int) - f) for f in self.first_frames]
                session.append(int(np.argmin([d.sum() for d in differences])))
                assert differences[session[0]].max() <= 1  # the very frame the simulator drew
            start = CHUNK * (len(session) - 1)
            session.append(start)
            chunks.append(ActionChunk(self.plans[session[0]][start : start + CHUNK]))
        return chunks


def evaluate(address, folder, *arguments):
    command = [PYTHON, "-c", LEROBOT_EVAL, "--policy.type=univla"]
    command += [f"--policy.address={address}", "--policy.device=cpu", f"--output_dir={folder}"]
    command += ["--env.type=aloha", "--env.task=AlohaTransferCube-v0", f"--seed={SEEDS[0]}"]
    command += ["--policy.instruction=pass the cube", *arguments]
    environment = {**os.environ, "MUJOCO_GL": "egl"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=900
    )


def test_the_experts_actions_solve_the_task_in_lerobots_evaluation(tmp_path):
    pytest.importorskip("gym_aloha", reason="needs pip install '.[aloha]'")
    policy = ScriptedPolicy()
    metadata = {"observation_keys": {f"observation/{VIEW}": [480, 640, 3]}, "action_dim": 14}
    both = ("--eval.n_episodes=2", "--eval.batch_size=2", "--env.episode_length=3")
    with harness.running(policy, metadata=metadata) as handle:
        address = f"ws://127.0.0.1:{handle.port}"
        whole = evaluate(address, tmp_path / "whole", "--eval.n_episodes=1", "--eval.batch_size=1")
        alone = max(policy.batches)
        short = evaluate(address, tmp_path / "short", *both)
        refused = evaluate(address, tmp_path / "other", *both, "--policy.cameras={cam_high: left}")
    assert whole.returncode == 0, whole.stderr[-3000:]
    report = json.loads((tmp_path / "whole/eval_info.json").read_text())
    assert report["overall"]["pc_success"] == 100.0
    assert short.returncode == 0, short.stderr[-3000:]
    assert alone == 1 and max(policy.batches) == 2  # both environments in one call
    assert refused.returncode and "camera 'left' is missing, LeRobot sends top" in refused.stderr
