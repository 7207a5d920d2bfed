"""A program for CALVIN's environment: our simulator against the loop of CALVIN's authors.

Prints how many tasks were solved in each episode; ends with an error where anything differs.
"""

from __future__ import annotations

import numpy as np

from univla_jax.simulators import StepResult, Trial
from univla_jax.simulators.calvin.calvin_benchmark import CalvinProtocol, CalvinSimulator
from univla_jax.simulators.calvin.calvin_package import official_chains

STEPS = 40  # of a task
BUTTON_CHAIN = 23  # its first task is to press the button


def press_the_button(simulator):
    """Actions that do the first task of ``BUTTON_CHAIN``, from the privileged state."""
    simulator.reset(Trial(0, BUTTON_CHAIN))
    env, actions = simulator.calvin.env, []
    table = env.scene.fixed_objects[0].uid
    joints = range(env.p.getNumJoints(table, physicsClientId=env.cid))
    names = [env.p.getJointInfo(table, joint, physicsClientId=env.cid)[1] for joint in joints]
    link = names.index(b"base__button")
    button = np.array(env.p.getLinkState(table, link, physicsClientId=env.cid)[0])
    for offset, steps in (((0, 0, 0.12), 18), ((0, 0, -0.06), 20)):
        for _ in range(steps):
            gap = (button + offset - simulator.observe().state[:3]) / 0.02
            actions.append(np.array([*np.clip(gap, -1, 1), 0, 0, 0, -1], np.float32))
            if simulator.step(actions[-1]) is not StepResult.CONTINUES:
                return np.stack(actions)
    raise AssertionError("the button was not pressed")


def through_simulator(simulator, chain, actions, *, render):
    """Solved tasks, and state and pictures at the end."""
    simulator.reset(Trial(0, chain))
    for action in actions:
        if simulator.step(action, render=render) is StepResult.ENDED:
            break
    seen = simulator.observe()
    return (
        simulator.result()["solved"],
        seen.state,
        seen.frames["image"],
        seen.frames["wrist_image"],
    )


def through_authors_loop(calvin, cameras, chain, actions):
    """What ``evaluate_sequence`` and ``rollout`` of calvin_agent do, in a scene loaded anew."""
    from calvin_agent.evaluation.utils import get_env_state_for_initial_condition

    initial, tasks = official_chains()[chain]
    robot, scene = get_env_state_for_initial_condition(initial)
    env = calvin.env
    env.load()
    env.robot.gripper_action = 1
    env.cameras = cameras
    env.reset(robot_obs=robot, scene_obs=scene)
    queue, solved = list(actions), 0
    for task in tasks:
        start, done = env.get_info(), False
        for _ in range(min(STEPS, len(queue))):
            *motion, gripper = queue.pop(0).astype(np.float64)
            info = env.step(np.array([*motion, 1 if gripper > 0 else -1], np.float64))[3]
            done = bool(calvin.oracle.get_task_info_for_set(start, info, {task}))
            if done:
                break
        if not done:
            break
        solved += 1
    seen = env.get_obs()
    pictures = seen["rgb_obs"]["rgb_static"], seen["rgb_obs"]["rgb_gripper"]
    return solved, np.asarray(seen["robot_obs"], np.float32), *pictures


def main():
    """Compares one solved, one idle and two random episodes."""
    simulator = CalvinSimulator(CalvinProtocol(steps_per_task=STEPS, renderer="tiny"))
    calvin, cameras, solved = simulator.calvin, simulator.calvin.env.cameras, []
    low, shape = np.full(7, -1), (2 * STEPS, 7)
    draws = {chain: np.random.default_rng(chain).uniform(low, 1, shape) for chain in (0, 6)}
    episodes = [
        (BUTTON_CHAIN, press_the_button(simulator)),
        (BUTTON_CHAIN, np.zeros((STEPS, 7), np.float32)),
        *((chain, actions.astype(np.float32)) for chain, actions in draws.items()),
    ]
    for chain, actions in episodes:
        found = through_simulator(simulator, chain, actions, render=False)
        drawn = through_simulator(simulator, chain, actions, render=True)
        authors = through_authors_loop(calvin, cameras, chain, actions)
        for other, what in ((drawn, "drawing"), (authors, "the authors' loop")):
            for mine, theirs in zip(found, other, strict=True):
                assert np.array_equal(mine, theirs), f"chain {chain}: {what} differs"
        solved.append(found[0])
    print("solved", solved)


if __name__ == "__main__":
    main()
