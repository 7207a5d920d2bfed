"""A program for SimplerEnv's environment: our simulator against its authors' loop.

Prints the outcomes, and the seconds of a step with and without drawing; ends with an error where
anything differs.
"""

from __future__ import annotations

import time

import gymnasium
import mani_skill2_real2sim.envs  # noqa: F401, registers the tasks
import numpy as np
from mani_skill2_real2sim import ASSET_DIR

from univla_jax.simulators import Trial
from univla_jax.simulators.simpler_robots import robots
from univla_jax.simulators.simpler_simulator import SimplerProtocol, SimplerSimulator, missing_files

TRIALS = {
    "bridge": (Trial(2, 0), Trial(2, 5), Trial(2, 17)),
    "google_robot": (Trial(0, 30), Trial(1, 70), Trial(2, 40), Trial(3, 5), Trial(4, 11)),
}
STEPS = 10
SECONDS = {"drawn once": 0.0, "always drawn": 0.0}


def through_simulator(simulator, trial, actions):
    """Outcome, counts, joints and picture at the end."""
    simulator.reset(trial)
    begin = time.perf_counter()
    for action in actions:
        simulator.step(action, render=False)
    result, seen = simulator.result(), simulator.observe()
    SECONDS["drawn once"] += time.perf_counter() - begin
    joints = simulator._env.unwrapped.agent.robot.get_qpos()
    return result["success"], result["stats"], joints, seen.frames["image"]


def through_authors_loop(env, camera, options, commands):
    """What ``maniskill2_evaluator`` does; every step is drawn."""
    observed, _ = env.reset(options=options)
    begin = time.perf_counter()
    for command in commands:
        observed, _, done, _, info = env.step(command)
    SECONDS["always drawn"] += time.perf_counter() - begin
    stats = {name: float(value) for name, value in info["episode_stats"].items()}
    image = observed["image"][camera]["rgb"]
    return bool(done), stats, env.unwrapped.agent.robot.get_qpos(), image


def authors_environment(state):
    """An environment as ``build_maniskill2_env`` makes it."""
    if not state.overlay:
        return gymnasium.make(state.environment, obs_mode="rgbd", prepackaged_config=True)
    return gymnasium.make(
        state.environment,
        obs_mode="rgbd",
        camera_cfgs={"add_segmentation": True},
        rgb_overlay_path=str(ASSET_DIR / "real_inpainting" / state.overlay),
        **dict(state.build),
    )


def main():
    """Compares an idle and random episodes of both robots."""
    rng, outcomes = np.random.default_rng(0), []
    for suite, trials in TRIALS.items():
        simulator, robot = SimplerSimulator(SimplerProtocol(suite)), robots()[suite]
        env, built = None, None
        for number, trial in enumerate(trials):
            actions = rng.uniform(*map(np.array, robot.random_range), (STEPS, 7)) * bool(number)
            commands = robot.start()
            state = robot.tasks[tuple(robot.tasks)[trial.task]].states[trial.trial]
            if missing_files(ASSET_DIR, state):
                print("left out, as files are missing:", trial, state.environment)
                continue
            mine = through_simulator(simulator, trial, actions)
            if built != (
                state.environment,
                state.build,
            ):  # as the simulator does: physics remembers
                env, built = authors_environment(state), (state.environment, state.build)
            sent = [commands(action) for action in actions]
            theirs = through_authors_loop(env, robot.camera, dict(state.reset), sent)
            assert mine[:2] == theirs[:2], (trial, mine[:2], theirs[:2])
            assert np.array_equal(mine[2], theirs[2]), f"{trial}: joints differ"
            assert np.array_equal(mine[3], theirs[3]), f"{trial}: pictures differ"
            outcomes.append(mine[0])
    print(
        {
            name: f"{seconds / STEPS / len(outcomes):.3f} s a step"
            for name, seconds in SECONDS.items()
        }
    )
    print("solved", outcomes)


if __name__ == "__main__":
    main()
