"""The scripted expert of the tabletop and the demonstrations it gives.

Demonstrations and evaluation draw their seeds from disjoint ranges, so a scored episode was never
shown in training.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from univla_jax.environments import tabletop
from univla_jax.environments.tabletop import MAX_STEP, Scene, TabletopEnv
from univla_jax.environments.tabletop_tasks import PUSH_DIRECTIONS, Task
from univla_jax.episode import Episode

DEMONSTRATION_SEEDS = range(0, 1_000_000)
EVALUATION_SEEDS = range(1_000_000, 2_000_000)
HIGH = 0.22  # travelling height, clear of lifted and standing blocks
OPEN, CLOSE = -1.0, 1.0

# A waypoint: x, y, height, gripper command.
Waypoint = tuple[float, float, float, float]


def waypoints(task: Task, scene: Scene) -> list[Waypoint]:
    """The corners of the expert's path through the scene as it lies at the start.

    Args:
      task: what to do.
      scene: the scene after reset.

    Returns:
      (x, y, height, gripper) in table units; gripper is -1 open or +1 closed.
    """
    if task.family == "reach":
        return _down_and_up(scene.zone(task.target).position)
    block = scene.block(task.block).position
    if task.family == "touch":
        return _down_and_up(block)
    if task.family == "push":
        return _push_path(block, PUSH_DIRECTIONS[task.target])
    path = [
        (*block, HIGH, OPEN),
        (*block, 0.04, OPEN),
        (*block, 0.04, CLOSE),
        (*block, HIGH, CLOSE),
    ]
    if task.family == "place":
        zone = scene.zone(task.target).position
        path += [
            (*zone, HIGH, CLOSE),
            (*zone, 0.04, CLOSE),
            (*zone, 0.04, OPEN),
            (*zone, HIGH, OPEN),
        ]
    return path


def _down_and_up(spot: np.ndarray) -> list[Waypoint]:
    return [(*spot, HIGH, CLOSE), (*spot, tabletop.BLOCK_TOP, CLOSE), (*spot, HIGH, CLOSE)]


def _push_path(block: np.ndarray, direction: np.ndarray) -> list[Waypoint]:
    behind = block - 0.11 * direction
    beyond = block + 0.06 * direction
    return [
        (*behind, HIGH, CLOSE),
        (*behind, 0.04, CLOSE),
        (*beyond, 0.04, CLOSE),
        (*beyond, HIGH, CLOSE),
    ]


def actions_along(path: list[Waypoint], scene: Scene) -> Iterator[np.ndarray]:
    """Straight moves from corner to corner, then holding still; endless.

    Args:
      path: corners as of :func:`waypoints`.
      scene: read anew before every action, so the expert is closed-loop.

    Yields:
      float32 [7] actions.
    """
    grip = OPEN
    for x, y, height, grip in path:
        for _ in range(20):
            gripper = scene.gripper
            offset = np.array([x, y, height]) - [*gripper.position, gripper.height]
            turned = gripper.is_open == (grip == OPEN)
            if np.abs(offset).max() < 1e-3 and turned:
                break
            yield _action(offset, grip)
    while True:
        yield _action(np.zeros(3), grip)


def _action(offset: np.ndarray, grip: float) -> np.ndarray:
    """One step along ``offset``, slowed on all axes alike so that the path stays straight."""
    longest = max(np.abs(offset).max() / MAX_STEP, 1.0)
    return np.array([*(offset / longest), 0.0, 0.0, 0.0, grip], np.float32)


def demonstrate(seed: int, *, min_steps: int = 12, family: str | None = None) -> Episode:
    """One successful scripted episode.

    Args:
      seed: fixes scene and task.
      min_steps: the expert holds still after its path until the episode has this many steps.
      family: restricts the task family.

    Returns:
      An ``Episode`` with views ``image`` and ``wrist_image``.

    Raises:
      RuntimeError: the expert failed, which a test rules out for every family.
    """
    env = TabletopEnv(max_steps=10_000)
    observation, info = env.reset(seed=seed, options={"family": family} if family else None)
    path = waypoints(env.task, env.scene)
    frames, actions, states, success = [], [], [], False
    for action in actions_along(path, env.scene):
        idle = not np.any(action[:6]) and env.scene.gripper.is_open == (action[6] <= 0)
        if idle and len(actions) >= min_steps:
            break
        frames.append((observation["image"], observation["wrist_image"]))
        states.append(observation["state"])
        actions.append(action)
        observation, _, _, _, info = env.step(action)
        success = success or info["success"]
    if not success:
        raise RuntimeError(f"the scripted expert failed: seed {seed}, {info['instruction']!r}")
    image, wrist = (np.stack(view) for view in zip(*frames))
    return Episode(
        instruction=info["instruction"],
        frames={"image": image, "wrist_image": wrist},
        actions=np.stack(actions),
        control_hz=tabletop.CONTROL_HZ,
        corpus="tabletop",
        episode_id=f"tabletop-{seed:07d}",
        state=np.stack(states),
    )
