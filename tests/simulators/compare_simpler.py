"""A program for SimplerEnv's environment: our simulator against its authors' loop.

Prints the outcomes, and the seconds of a step with and without drawing; ends with an error where
anything differs.
"""

from __future__ import annotations

import time

import gymnasium
import mani_skill2_real2sim.envs  # noqa: F401, registers the tasks
import numpy as np

from univla_jax.data.action_conventions import widowx_commands
from univla_jax.simulators import Trial
from univla_jax.simulators.simpler_simulator import ENVIRONMENTS, SimplerProtocol, SimplerSimulator

TASK, STEPS = 2, 10
SECONDS = {"drawn once": 0.0, "always drawn": 0.0}


def through_simulator(simulator, layout, actions):
    """Outcome, counts, joints and picture at the end."""
    simulator.reset(Trial(TASK, layout))
    begin = time.perf_counter()
    for action in actions:
        simulator.step(action, render=False)
    result, seen = simulator.result(), simulator.observe()
    SECONDS["drawn once"] += time.perf_counter() - begin
    joints = simulator._env.unwrapped.agent.robot.get_qpos()
    return result["success"], result["stats"], joints, seen.frames["image"]


def through_authors_loop(env, layout, actions):
    """What ``maniskill2_evaluator`` does; every step is drawn."""
    observed, _ = env.reset(options={"obj_init_options": {"episode_id": layout}})
    begin = time.perf_counter()
    for action in actions:
        observed, _, done, _, info = env.step(widowx_commands(action))
    SECONDS["always drawn"] += time.perf_counter() - begin
    stats = {name: float(value) for name, value in info["episode_stats"].items()}
    image = observed["image"]["3rd_view_camera"]["rgb"]
    return bool(done), stats, env.unwrapped.agent.robot.get_qpos(), image


def main():
    """Compares an idle and two random episodes."""
    simulator = SimplerSimulator(SimplerProtocol())
    rng = np.random.default_rng(0)
    low, high = np.array([-0.03] * 6 + [0]), np.array([0.03] * 6 + [1])
    episodes = [(0, np.zeros((STEPS, 7)))]
    episodes += [(layout, rng.uniform(low, high, (STEPS, 7))) for layout in (5, 17)]
    found = [through_simulator(simulator, layout, actions) for layout, actions in episodes]
    name = ENVIRONMENTS[SimplerProtocol().tasks[TASK]]
    env = gymnasium.make(name, obs_mode="rgbd", prepackaged_config=True)
    authors = [through_authors_loop(env, layout, actions) for layout, actions in episodes]
    for mine, theirs in zip(found, authors, strict=True):
        assert mine[:2] == theirs[:2], (mine[:2], theirs[:2])
        assert np.array_equal(mine[2], theirs[2]), "joints differ"
        assert np.array_equal(mine[3], theirs[3]), "pictures differ"
    steps = STEPS * len(episodes)
    print({name: f"{seconds / steps:.3f} s a step" for name, seconds in SECONDS.items()})
    print("solved", [outcome for outcome, *_ in found])


if __name__ == "__main__":
    main()
