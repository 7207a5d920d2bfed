"""The embedded tabletop as a benchmark: which episodes, what the policy is told, what counts.

Scenes come from the seeds kept for evaluation, which no demonstration uses; the task families take
turns, so each has the same number of episodes. An episode succeeds when the predicate of its true
task holds after any step, and ends there, when the task in the policy's words is done, or after
``max_steps``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.simulators.tabletop.tabletop_env import CONTROL_HZ, FAMILIES, TabletopEnv
from univla_jax.simulators.tabletop.tabletop_expert import EVALUATION_SEEDS


class TabletopEpisode:
    """One episode; the policy may be told the same kind of task for another thing on the table.

    Attributes:
      seed: of the scene and the task.
      instruction: of the true task, which alone decides about success.
      told: what the policy is told.
    """

    def __init__(
        self, seed: int, family: str, *, max_steps: int, other_instruction: bool = False
    ) -> None:
        """Resets the scene.

        Args:
          seed: of ``TabletopEnv.reset``.
          family: task family.
          max_steps: steps after which the episode ends.
          other_instruction: tell the policy about another block, or another zone.
        """
        self.seed = seed
        self._env = _Table(max_steps=max_steps)
        self._env.reset(seed=seed, options={"family": family})
        self._told = self._other_task() if other_instruction else self._env.task
        self.instruction, self.told = self._env.task.instruction, self._told.instruction
        self._steps, self._success, self._told_success = 0, False, False

    def observe(self) -> Observation:
        """Both cameras, the state, and the words the policy is told."""
        seen = self._env.look()
        frames = {view: seen[view] for view in ("image", "wrist_image")}
        return Observation(self.told, frames, seen["state"])

    def step(self, action: np.ndarray) -> bool:
        """Executes float [7] (gripper > 0 closes); True when the episode ended.

        It also ends when the told task is done. Where that took touching another block, the true
        task can no longer succeed; where it took reaching another zone, the robot has answered.
        """
        _, _, terminated, truncated, _ = self._env.step(action)
        self._steps += 1
        self._success = terminated
        self._told_success = self._told.succeeded(self._env.scene)
        return terminated or truncated or self._told_success

    def result(self) -> dict[str, Any]:
        """Task and outcome; ``told_success`` is that of the task in the policy's words."""
        return {
            "seed": self.seed,
            "family": self._env.task.family,
            "instruction": self.instruction,
            "told": self.told,
            "success": self._success,
            "told_success": self._told_success,
            "steps": self._steps,
        }

    def render(self, size: int) -> np.ndarray:
        """The fixed camera, uint8 [size, size, 3]."""
        return self._env.render(size)

    def _other_task(self):
        """The same kind of task for another block or zone, which one depends on the seed alone."""
        others = self._env.task.others(self._env.scene)
        return others[int(np.random.default_rng(self.seed).integers(len(others)))]


class Tabletop:
    """The benchmark ``"tabletop"``."""

    name = "tabletop"
    corpus = "tabletop"
    control_hz = CONTROL_HZ

    def __init__(self, *, first_seed: int = 0, max_steps: int = 40) -> None:
        """Chooses the episodes.

        Args:
          first_seed: place of the first seed in the range kept for evaluation.
          max_steps: steps after which an episode ends.

        Raises:
          UserError: a number out of range.
        """
        if max_steps < 1 or not 0 <= first_seed < len(EVALUATION_SEEDS):
            raise UserError(
                f"tabletop: max_steps {max_steps} must be at least 1, first_seed {first_seed} in "
                f"0...{len(EVALUATION_SEEDS) - 1}"
            )
        self._first, self._max_steps = first_seed, max_steps

    def episode(self, index: int, *, other_instruction: bool = False) -> TabletopEpisode:
        """Episode ``index``, freshly reset."""
        seed = EVALUATION_SEEDS[self._first + index]
        family = FAMILIES[index % len(FAMILIES)]
        return TabletopEpisode(
            seed, family, max_steps=self._max_steps, other_instruction=other_instruction
        )

    def protocol(self) -> dict[str, Any]:
        """Every choice that moves the score, for the report."""
        return {
            "benchmark": self.name,
            "first_seed": EVALUATION_SEEDS[self._first],
            "families": list(FAMILIES),
            "max_steps": self._max_steps,
            "control_hz": self.control_hz,
            "views": ["image", "wrist_image"],
            "image_orientation": "as recorded",
            "gripper": "unnormalized value, > 0 closes",
            "success": "predicate of the true task after any step",
        }


class _Table(TabletopEnv):
    """Draws the cameras only when looked at: once per chunk, not at every step."""

    def _observe(self) -> dict[str, np.ndarray]:
        return {}

    def look(self) -> dict[str, np.ndarray]:
        """The observation of now."""
        return super()._observe()
