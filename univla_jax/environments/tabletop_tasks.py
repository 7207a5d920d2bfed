"""Task families of the tabletop: instructions and success predicates.

Every scene holds several blocks and zones of different colours, so only the instruction tells
which of them is meant. A task counts as failed once another block was touched first; reaching a
zone touches none.
"""

from __future__ import annotations

import dataclasses

import numpy as np

BLOCK_RGB = {
    "red": (205, 48, 44),
    "green": (58, 150, 70),
    "blue": (48, 92, 200),
    "yellow": (236, 190, 40),
}
ZONE_RGB = {"white": (250, 250, 250), "black": (20, 20, 24)}
FAMILIES = ("touch", "lift", "push", "place", "reach")
PUSH_DIRECTIONS = {"left": np.array([-1.0, 0.0]), "right": np.array([1.0, 0.0])}
PUSH_DISTANCE = 0.1
LIFT_HEIGHT = 0.12
ZONE_REACH = 0.08
REACH_HEIGHT = 0.1  # above a block's top, to which the expert goes down


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked for in one episode.

    Attributes:
      family: one of ``FAMILIES``.
      block: colour of the block meant; empty for reach.
      target: zone colour (place, reach), direction (push) or empty.
      origin: (x, y) of the block at the start, table units; unused by reach.
    """

    family: str
    block: str
    target: str
    origin: tuple[float, float] = (0.0, 0.0)

    @property
    def instruction(self) -> str:
        """The task in words."""
        if self.family == "push":
            return f"push the {self.block} block to the {self.target}"
        if self.family == "place":
            return f"put the {self.block} block in the {self.target} zone"
        if self.family == "reach":
            return f"reach the {self.target} zone"
        return f"{self.family} the {self.block} block"

    def succeeded(self, scene) -> bool:
        """Whether ``scene`` (a ``tabletop.Scene``) fulfils the task."""
        if self.family == "reach":
            return self._in_zone(scene, scene.gripper.position) and (
                scene.gripper.height < REACH_HEIGHT and not scene.touched
            )
        index = next(i for i, b in enumerate(scene.blocks) if b.colour == self.block)
        if not scene.touched or scene.touched[0] != index:
            return False
        block = scene.blocks[index]
        if self.family == "lift":
            return scene.held == index and block.height > LIFT_HEIGHT
        if self.family == "push":
            moved = block.position - np.array(self.origin)
            along = float(moved @ PUSH_DIRECTIONS[self.target])
            return along > PUSH_DISTANCE and abs(moved[1]) < 0.08 and scene.held is None
        if self.family == "place":
            return self._in_zone(scene, block.position) and scene.held is None
        return True

    def others(self, scene) -> list[Task]:
        """The same kind of task for each other block of ``scene``, or each other zone (reach)."""
        if self.family == "reach":
            zones = [z for z in scene.zones if z.colour != self.target]
            return [dataclasses.replace(self, target=zone.colour) for zone in zones]
        blocks = [b for b in scene.blocks if b.colour != self.block]
        return [
            dataclasses.replace(self, block=b.colour, origin=tuple(map(float, b.position)))
            for b in blocks
        ]

    def _in_zone(self, scene, position: np.ndarray) -> bool:
        offset = np.linalg.norm(position - scene.zone(self.target).position)
        return bool(offset < ZONE_REACH)


def sample_task(
    rng: np.random.Generator,
    scene,
    block_colours: list[str],
    zone_colours: list[str],
    family: str | None = None,
) -> Task:
    """Draws a task that the scene allows.

    Args:
      rng: source of randomness.
      scene: a ``tabletop.Scene``, to read the block's place.
      block_colours: colours on the table.
      zone_colours: zones on the table.
      family: one of ``FAMILIES``, or None for any.

    Raises:
      ValueError: unknown family.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"unknown task family {family!r}; known: {', '.join(FAMILIES)}")
    family = family or str(rng.choice(FAMILIES))
    block = str(rng.choice(block_colours))
    if family == "reach":  # after the block, so that a seed means the same zone as in place
        return Task(family, "", str(rng.choice(zone_colours)))
    position = scene.block(block).position
    target = ""
    if family == "place":
        target = str(rng.choice(zone_colours))
    elif family == "push":
        # Towards the middle: the gripper needs room behind the block, the block room ahead.
        target = "right" if position[0] < 0.5 else "left"
        if 0.35 < position[0] < 0.65:
            target = str(rng.choice(list(PUSH_DIRECTIONS)))
    return Task(family, block, target, (float(position[0]), float(position[1])))
