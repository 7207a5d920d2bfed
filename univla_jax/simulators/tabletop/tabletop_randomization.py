"""Domain randomization of the tabletop's demonstrations (Tobin et al. 2017, arXiv 1703.06907).

Each episode is drawn with some things about it changed, the same for all of its frames: what
``tabletop_plus_benchmark.py`` changes one at a time, here several at once, from other seeds and
further than there, because a policy does not extrapolate.

    camera       moved by up to 0.06 of the table, turned by up to 7 degrees, up to 9 % nearer or
                 further; the wrist's moved half as far
    robot_start  gripper up to 0.25 of the table to the side, 0.12 forward, 0.08 higher or lower
    words        verbs and nouns put together at random; no whole sentence of the evaluation
    light        55 to 135 % as bright, tinted by up to 15 %, shadows of any length to any side
    background   any color of table and floor but those of the evaluation, stripes of any contrast
    noise        normal noise of each pixel and color, standard deviation up to 22 of 255
    layout       things up to 0.06 instead of 0.01 off their places, half of the time a fourth block
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from univla_jax.simulators.tabletop.tabletop_env import BLOCK_RGB, Block, TabletopEnv
from univla_jax.simulators.tabletop.tabletop_layout import BLOCK_CELLS
from univla_jax.simulators.tabletop.tabletop_render import Look

EVALUATED_WORDINGS = {
    "touch": (
        "tap the {block} cube",
        "make contact with the {block} one",
        "go and feel the {block} box",
    ),
    "lift": (
        "pick up the {block} cube",
        "raise the {block} one from the table",
        "take the {block} box into the air",
    ),
    "push": (
        "shove the {block} cube towards the {target} side",
        "slide the {block} one {target}wards",
        "move the {block} box over to the {target}",
    ),
    "place": (
        "drop the {block} cube onto the {target} circle",
        "carry the {block} one over to the {target} disc",
        "the {block} box belongs on the {target} spot",
    ),
    "reach": (
        "go to the {target} circle",
        "move down to the {target} disc",
        "hover closely over the {target} spot",
    ),
}
"""Family → sentences that the evaluation says instead, none of which a demonstration says."""
EVALUATED_TABLES = ((122, 92, 66), (150, 160, 172), (168, 186, 160), (196, 170, 190))
EVALUATED_FLOORS = ((40, 44, 60), (150, 146, 140), (70, 88, 74))

# ``{noun}`` is a block's, ``{zone}`` a zone's.
_SENTENCES = {
    "touch": (
        "touch the {block} {noun}",
        "tap the {block} {noun}",
        "make contact with the {block} {noun}",
        "go and feel the {block} {noun}",
        "press on the {block} {noun}",
    ),
    "lift": (
        "lift the {block} {noun}",
        "pick up the {block} {noun}",
        "raise the {block} {noun} from the table",
        "take the {block} {noun} into the air",
        "hold up the {block} {noun}",
    ),
    "push": (
        "push the {block} {noun} to the {target}",
        "shove the {block} {noun} towards the {target} side",
        "slide the {block} {noun} {target}wards",
        "move the {block} {noun} over to the {target}",
        "nudge the {block} {noun} {target}wards",
    ),
    "place": (
        "put the {block} {noun} in the {target} {zone}",
        "drop the {block} {noun} onto the {target} {zone}",
        "carry the {block} {noun} over to the {target} {zone}",
        "the {block} {noun} belongs on the {target} {zone}",
        "set the {block} {noun} down on the {target} {zone}",
    ),
    "reach": (
        "reach the {target} {zone}",
        "go to the {target} {zone}",
        "move down to the {target} {zone}",
        "hover closely over the {target} {zone}",
        "stop above the {target} {zone}",
    ),
}
_NOUNS = ("block", "cube", "one", "box", "brick")
_ZONES = ("zone", "circle", "disc", "spot", "area")
_COLORS_APART = 12  # of 255: how far a color is from the evaluation's in one channel at least


@dataclasses.dataclass
class Perturbed:
    """What a perturbation may change about an episode.

    Attributes:
      env: reset to the scene.
      words: the instruction given.
      noise: standard deviation of the pixels, of 255.
    """

    env: TabletopEnv
    words: str
    noise: float = 0.0

    def turn_look(self, **changes: object) -> None:
        """Draws the scene with these fields of its ``Look`` changed."""
        self.env.look = dataclasses.replace(self.env.look, **changes)


def noisy(frames: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Frames uint8 of any shape with normal noise of each value, of 255."""
    noise = rng.normal(0.0, deviation, frames.shape)
    return np.rint(np.clip(frames + noise, 0.0, 255.0)).astype(np.uint8)


def add_block(env: TabletopEnv, rng: np.random.Generator) -> None:
    """Adds one block, of a color that no instruction of the scene means, in a cell that is free."""
    scene = env.scene
    colors = sorted(BLOCK_RGB.keys() - {block.color for block in scene.blocks})
    apart = [
        min(np.linalg.norm(cell - block.position) for block in scene.blocks) for cell in BLOCK_CELLS
    ]
    free = BLOCK_CELLS[np.array(apart) > 0.2]
    scene.blocks.append(Block(str(rng.choice(colors)), rng.permutation(free)[0].copy()))


def scatter(env: TabletopEnv, rng: np.random.Generator, reach: float) -> None:
    """Moves each thing by up to ``reach`` along each axis; the task begins there anew."""
    scene, task = env.scene, env.task
    for thing in (*scene.blocks, *scene.zones):
        # Not so near the edge that the gripper does not get behind a block.
        thing.position[:] = np.clip(thing.position + rng.uniform(-reach, reach, 2), 0.07, 0.93)
    if task.block:
        origin = tuple(map(float, scene.block(task.block).position))
        env.task = dataclasses.replace(task, origin=origin)


# ----------------------------------------------------------------------------
# What is drawn for a demonstration.


def sentences(family: str, block: str, target: str) -> Iterator[str]:
    """All sentences of demonstrations for a task, each once.

    Args:
      family: of the task.
      block: color of the block; empty where there is none.
      target: color of the zone, or direction; empty where there is none.
    """
    known = {s.format(block=block, target=target) for s in EVALUATED_WORDINGS[family]}
    for sentence in _SENTENCES[family]:
        for noun in _NOUNS if "{noun}" in sentence else ("",):
            for zone in _ZONES if "{zone}" in sentence else ("",):
                said = sentence.format(block=block, target=target, noun=noun, zone=zone)
                if said not in known:
                    yield said


def _camera(changed: Perturbed, rng: np.random.Generator) -> None:
    direction, distance = rng.uniform(0, 2 * np.pi), 0.06 * np.sqrt(rng.random())
    shift = float(distance * np.cos(direction)), float(distance * np.sin(direction))
    angle, zoom = np.deg2rad(rng.uniform(-7.0, 7.0)), rng.uniform(0.91, 1.09)
    changed.turn_look(shift=shift, zoom=float(zoom), angle=float(angle))


def _robot_start(changed: Perturbed, rng: np.random.Generator) -> None:
    gripper = changed.env.scene.gripper
    gripper.position = gripper.position + [rng.uniform(-0.25, 0.25), rng.uniform(-0.04, 0.12)]
    gripper.height += float(rng.uniform(-0.08, 0.08))


def _words(changed: Perturbed, rng: np.random.Generator) -> None:
    task = changed.env.task
    changed.words = str(rng.choice(list(sentences(task.family, task.block, task.target))))


def _light(changed: Perturbed, rng: np.random.Generator) -> None:
    gain = rng.uniform(0.55, 1.35) * rng.uniform(0.85, 1.15, 3)
    side, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.6)
    light = float(length * np.cos(side)), float(length * np.sin(side))
    changed.turn_look(light=light, gain=tuple(map(float, gain)))


def _background(changed: Perturbed, rng: np.random.Generator) -> None:
    table = _color(rng, (80, 225), 35, EVALUATED_TABLES)
    floor = _color(rng, (25, 175), 20, EVALUATED_FLOORS)
    factor = rng.uniform(0.75, 1.15)
    stripes = tuple(int(min(factor * value, 255)) for value in table)
    changed.turn_look(table=table, floor=floor, stripes=stripes if rng.random() < 0.7 else None)


def _color(
    rng: np.random.Generator,
    brightness: tuple[int, int],
    tint: int,
    others: tuple[tuple[int, int, int], ...],
) -> tuple[int, int, int]:
    """A color of little saturation that is none of the others."""
    while True:
        color = np.clip(rng.uniform(*brightness) + rng.uniform(-tint, tint, 3), 0, 255).astype(int)
        if (np.abs(color - np.array(others)).max(1) >= _COLORS_APART).all():
            return tuple(map(int, color))


def _noise(changed: Perturbed, rng: np.random.Generator) -> None:
    changed.noise = float(rng.uniform(0.0, 22.0))


def _layout(changed: Perturbed, rng: np.random.Generator) -> None:
    if rng.random() < 0.5:
        add_block(changed.env, rng)
    scatter(changed.env, rng, 0.05)


RANDOMIZATIONS: dict[str, Callable[[Perturbed, np.random.Generator], None]] = {
    "camera": _camera,
    "robot_start": _robot_start,
    "words": _words,
    "light": _light,
    "background": _background,
    "noise": _noise,
    "layout": _layout,
}
"""Name → what it changes; the names are those of ``tabletop_plus_benchmark.PERTURBATIONS``."""


def randomize(env: TabletopEnv, rng: np.random.Generator, share: float) -> Perturbed:
    """Changes each of ``RANDOMIZATIONS`` about an episode that was reset, or not.

    Args:
      env: reset to a scene; changed.
      rng: source of randomness.
      share: of the episodes in which each is changed.
    """
    env.look = Look()
    changed = Perturbed(env, env.task.instruction)
    for change in RANDOMIZATIONS.values():
        if rng.random() < share:
            change(changed, rng)
    return changed
