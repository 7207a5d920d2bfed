"""Touches: the scripted gripper goes to the point that a checkpoint names, on held-out tables.

The model sees the fixed camera's picture of a table and is asked to point to a block. The gripper
goes over that point, down and up again; a touch counts where the block that was asked for is the
first one touched. Beside it: the truth's own point, the middle of the picture, the answer about
another block, and the answer about a black picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from univla_jax.data.grounding_annotations import ask_for
from univla_jax.episode import Observation
from univla_jax.inference.answers import Answerer
from univla_jax.simulators.tabletop import tabletop_render
from univla_jax.simulators.tabletop.tabletop_env import TabletopEnv
from univla_jax.simulators.tabletop.tabletop_expert import (
    EVALUATION_SEEDS,
    actions_along,
    touching,
)
from univla_jax.tokenizers.coordinates import Place

CORPUS = "tabletop"
VIEW = "image"
_MAX_STEPS = 40
_CENTER = (0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class Table:
    """A held-out table and the block that is asked for.

    Attributes:
      seed: of the environment.
      picture: uint8 [H, W, 3] of the fixed camera.
      color: of the block.
      other: color of another block on it.
      truth: the block's point in the picture.
    """

    seed: int
    picture: np.ndarray
    color: str
    other: str
    truth: Place


def tables(count: int) -> list[Table]:
    """The first tables of the seeds kept for evaluation.

    Args:
      count: of tables.
    """
    found = []
    for seed in EVALUATION_SEEDS[:count]:
        env = _opened(seed)
        view = tabletop_render.fixed_view(env.image_size)
        color = env.task.block
        truth = tuple(map(float, view.to_frame(env.scene.block(color).position)))
        other = next(block.color for block in env.scene.blocks if block.color != color)
        found.append(Table(seed, env.observe()[VIEW], color, other, truth))
    return found


def is_touched(table: Table, point: Place | None) -> bool:
    """Whether a gripper that goes to a point of the picture touches the block, and it first.

    Args:
      table: on which it moves.
      point: (x, y), 0 … 1; None where there is none, which touches nothing.
    """
    if point is None:
        return False
    # The scripted gripper knows nothing but the point: it goes there, down and up again. The task
    # counts a touch only where the named block is the first one that is touched.
    env = _opened(table.seed)
    view = tabletop_render.fixed_view(env.image_size)
    actions = actions_along(touching(view.to_table(np.asarray(point))), env.scene)
    return any(env.step(next(actions))[2] for _ in range(_MAX_STEPS))


def scores(answerer: Answerer, count: int) -> dict[str, Any]:
    """Shares of tables on which the block asked for is touched, by whose point it is.

    Args:
      answerer: of a checkpoint that points in the fixed camera.
      count: tables.
    """
    shown = tables(count)
    black = [dataclasses.replace(t, picture=np.zeros_like(t.picture)) for t in shown]
    points: Mapping[str, Sequence[Place | None]] = {
        "predicted point": _ask(answerer, shown, [t.color for t in shown]),
        "true point": [t.truth for t in shown],
        "center": [_CENTER] * len(shown),
        "another phrase": _ask(answerer, shown, [t.other for t in shown]),
        "black frame": _ask(answerer, black, [t.color for t in shown]),
    }
    touched = {
        name: float(np.mean([is_touched(t, p) for t, p in zip(shown, of)]))
        for name, of in points.items()
    }
    return {"tables": len(shown), **{name: round(share, 4) for name, share in touched.items()}}


def _ask(answerer: Answerer, shown: Sequence[Table], colors: Sequence[str]) -> list[Place | None]:
    """The model's point for a block of each table; None where it says that there is none."""
    asked = [
        Observation(ask_for(f"the {color} block", "point"), {VIEW: table.picture})
        for table, color in zip(shown, colors)
    ]
    return [a.places[0] if a.places else None for a in answerer.answer(asked, view=VIEW)]


def _opened(seed: int) -> TabletopEnv:
    env = TabletopEnv(max_steps=_MAX_STEPS, lazy=True)
    env.reset(seed=seed, options={"family": "touch"})
    return env
