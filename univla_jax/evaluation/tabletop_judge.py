"""Where things are in a picture of the tabletop: the judge of imagined frames.

The gripper is found by fitting its drawing to what differs from the scene drawn without it; blocks
are found by their colors. The scene as it lay at the beginning is known to the judge, as it is to
the simulator, so that "did the imagined gripper go where the instruction says" has a true answer.

Axes: H/W pixels of a square picture.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.signal
from PIL import Image

from univla_jax.simulators.tabletop import tabletop_env
from univla_jax.simulators.tabletop.tabletop_env import BLOCK_RGB, Gripper, Scene
from univla_jax.simulators.tabletop.tabletop_render import Canvas, View, draw_gripper, draw_scene

SIZE = 64  # pixels in which pictures are compared
_EXTENT = 1.0 + 2 * tabletop_env.MARGIN  # table units that the fixed camera shows
_HEIGHTS = (0.03, 0.08, 0.15, 0.22)
_NEAR = 70.0  # levels; pixels this near to a block's color belong to it
_LEAST_CHROMA = 60.0  # levels between the strongest and the weakest channel
_LEAST_PIXELS = 6  # of a block in a picture of SIZE x SIZE


def find_gripper(picture: np.ndarray, scene: Scene) -> np.ndarray:
    """Position (x, y) of the gripper in table units, float64 [2]; see ``find_grippers``."""
    return find_grippers(picture[None], scene)[0]


def find_grippers(pictures: np.ndarray, scene: Scene) -> np.ndarray:
    """Positions (x, y) of the gripper in table units, float64 [N, 2].

    Args:
      pictures: uint8 [N, H, H, 3] of the fixed camera, at any size.
      scene: blocks and zones as they lie, the gripper's own pose ignored; blocks that moved since
        disturb the fit only where they are.
    """
    background = _without_gripper(scene)
    differences = np.stack([_enlarge(picture) for picture in pictures]) - background
    shaded = (differences * background).sum(-1)
    best, found = np.full(len(pictures), np.inf), np.zeros((len(pictures), 2))
    # The squared error of drawing the gripper at every pixel, by correlation: where its opacity is
    # M and its color P, the drawn pixel is background * (1 - M) + P. What does not depend on the
    # picture is computed once.
    for height, is_open in itertools.product(_HEIGHTS, (False, True)):
        m, p = _gripper_drawing(height, is_open)
        alike = _correlate((background**2).sum(-1), m * m) + np.sum(p * p)
        alike -= 2 * sum(
            _correlate(background[..., channel], m * p[..., channel]) for channel in range(3)
        )
        for number, difference in enumerate(differences):
            error = alike + 2 * _correlate(shaded[number], m)
            for channel in range(3):
                error -= 2 * _correlate(difference[..., channel], p[..., channel])
            row, column = np.unravel_index(np.argmin(error), error.shape)
            if error[row, column] < best[number]:
                best[number] = error[row, column]
                found[number] = _table_position(row, column)
    return found


def find_blocks(
    picture: np.ndarray, colors_rgb: Mapping[str, tuple[int, int, int]] = BLOCK_RGB
) -> dict[str, np.ndarray]:
    """Position (x, y) in table units of every block color that is seen, float64 [2] each.

    Args:
      picture: uint8 [H, H, 3] of the fixed camera, at any size.
      colors_rgb: that may be seen; of gray ones none is found.
    """
    frame, blocks = _enlarge(picture), {}
    colors = np.array(list(colors_rgb.values()), np.float64)
    distance = np.linalg.norm(frame[:, :, None] - colors, axis=-1)
    # Blends of table and gripper may come near to a color, but they are gray.
    colored = (frame.max(-1) - frame.min(-1) > _LEAST_CHROMA) & (distance.min(-1) < _NEAR)
    nearest = np.where(colored, distance.argmin(-1), -1)
    for number, name in enumerate(colors_rgb):
        rows, columns = np.nonzero(nearest == number)
        if len(rows) >= _LEAST_PIXELS:
            blocks[name] = _table_position(np.median(rows), np.median(columns))
    return blocks


def visited_object(pictures: np.ndarray, scene: Scene, kind: str) -> str:
    """The color of the block or zone that the gripper of an imagined episode comes nearest to.

    Args:
      pictures: uint8 [N, H, H, 3] of the fixed camera, one after another.
      scene: as it lay before the first of them.
      kind: ``"block"`` or ``"zone"``.
    """
    things = scene.zones if kind == "zone" else scene.blocks
    path = find_grippers(pictures, scene)
    distance = {
        thing.color: float(np.linalg.norm(path - thing.position, axis=1).min()) for thing in things
    }
    return min(distance, key=distance.__getitem__)


def _enlarge(picture: np.ndarray) -> np.ndarray:
    image = Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float64)


def _without_gripper(scene: Scene) -> np.ndarray:
    canvas = Canvas(View((0.5, 0.5), _EXTENT, SIZE))
    draw_scene(canvas, scene)
    return canvas.image().astype(np.float64)


@functools.lru_cache(None)
def _gripper_drawing(height: float, is_open: bool) -> tuple[np.ndarray, np.ndarray]:
    """Opacity [n, n] and color [n, n, 3] (over black) of a gripper at the middle pixel."""
    size = 31
    drawn = []
    for level in (0.0, 255.0):
        canvas = Canvas(View((0.0, 0.0), _EXTENT * size / SIZE, size))
        canvas._rgb[:] = level
        draw_gripper(canvas, Gripper(np.zeros(2), height, np.zeros(3), is_open))
        drawn.append(canvas._rgb.astype(np.float64))
    return 1 - (drawn[1] - drawn[0]).mean(-1) / 255, drawn[0]


def _correlate(image: np.ndarray, template: np.ndarray) -> np.ndarray:
    """Sum of image times template, the template's middle at every pixel; [H, W]."""
    return scipy.signal.fftconvolve(image, template[::-1, ::-1], mode="same")


def _table_position(row: float, column: float) -> np.ndarray:
    """Table units of the middle of a pixel."""
    pixel = _EXTENT / SIZE
    x = 0.5 - _EXTENT / 2 + (column + 0.5) * pixel
    return np.array([x, 0.5 + _EXTENT / 2 - (row + 0.5) * pixel])


def scene_at(seed: int, world: str = "cells") -> Scene:
    """The scene of a seed before anything moved; it is the same for every task."""
    env = tabletop_env.TabletopEnv(lazy=True, world=world)
    env.reset(seed=seed)
    return env.scene


def scene_of(episode_id: str) -> Scene:
    """The scene in which a demonstration began."""
    name, _, seed = episode_id.rpartition("-")
    return scene_at(int(seed), name.partition("-")[2] or "cells")


def named_object(instruction: str) -> tuple[str, str]:
    """What an instruction sends the gripper to first: ``"block"`` or ``"zone"``, and its color."""
    words = instruction.split()
    kind = "block" if "block" in words else "zone"
    return kind, words[words.index(kind) - 1]


def score(
    pictures: np.ndarray, scenes: Sequence[Scene], instructions: Sequence[str]
) -> dict[str, float]:
    """How true imagined episodes are to their instructions and to what lay on the table.

    Args:
      pictures: uint8 [E, N, H, H, 3] of the fixed camera.
      scenes: as they lay before.
      instructions: that the model was given.

    Returns:
      ``right_object``: share of episodes in which the gripper comes nearest to the object that the
      instruction names; ``colors_kept``: share of the named block colors that the last frame shows
      among those that were there, and no others.
    """
    kept = []
    for own, scene in zip(pictures, scenes):
        palette = {**BLOCK_RGB, **{block.color: block.rgb for block in scene.blocks}}
        there = {block.color for block in scene.named_blocks}
        seen = {color for color in find_blocks(own[-1], palette) if color in BLOCK_RGB}
        kept.append(len(there & seen) / len(there | seen))
    right = right_objects(pictures, scenes, instructions)
    return {"right_object": float(np.mean(right)), "colors_kept": float(np.mean(kept))}


def right_objects(
    pictures: np.ndarray, scenes: Sequence[Scene], instructions: Sequence[str]
) -> list[bool]:
    """Whether the gripper of each episode comes nearest to what its instruction names."""
    found = []
    for own, scene, instruction in zip(pictures, scenes, instructions, strict=True):
        kind, color = named_object(instruction)
        found.append(visited_object(own, scene, kind) == color)
    return found
