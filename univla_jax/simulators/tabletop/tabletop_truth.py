"""Truth of the tabletop in its pictures: boxes and masks of things, phrases, questions, thoughts.

A mask is what the renderer's own drawing order leaves visible of a thing; a box is the hull of its
drawn corners, clipped to the frame, also where something lies in front. A thing of which less than
a quarter is visible is neither asked for nor said to be absent.

Axes: H/W mask pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy import ndimage

from univla_jax.data.grounding_annotations import Grounding, Mask
from univla_jax.simulators.tabletop import tabletop_env, tabletop_render
from univla_jax.simulators.tabletop.tabletop_env import (
    BLOCK_RGB,
    GRASP_REACH,
    HOME,
    Scene,
    TabletopTask,
)
from univla_jax.simulators.tabletop.tabletop_render import Canvas, View
from univla_jax.tokenizers.coordinates import Place, places_text

RELATIONS = ("left of", "right of", "above", "below")
HELD_OUT_PAIRS = (("red", "left of"), ("blue", "above"), ("yellow", "right of"))
"""Colors and relations that no demonstration puts together."""
_MASK_SIZE = 64
_VISIBLE = 0.25
_MARGIN = 0.06  # of a frame, by which one thing has to lie beside another
_NEAR_MARGIN = 0.04  # table units by which the nearest block has to be nearer than the next
_SUPERLATIVES: dict[str, Callable[[np.ndarray], float]] = {
    "leftmost": lambda c: c[0],
    "rightmost": lambda c: -c[0],
    "topmost": lambda c: c[1],
    "bottommost": lambda c: -c[1],
}


@dataclasses.dataclass(frozen=True)
class Seen:
    """A thing as a camera shows it.

    Attributes:
      name: such as "red block".
      box: (x1, y1, x2, y2) clipped to the frame, 0 … 1; None outside of it.
      mask: bool [H, W] of its visible part.
      visible: share of it that is visible.
    """

    name: str
    box: Place | None
    mask: np.ndarray
    visible: float

    @property
    def clear(self) -> bool:
        """Whether enough of it is visible to be asked for."""
        return self.box is not None and self.visible >= _VISIBLE

    @property
    def center(self) -> np.ndarray:
        """Center (x, y) of its box."""
        x1, y1, x2, y2 = self.box
        return np.array([(x1 + x2) / 2, (y1 + y2) / 2])


class _LabelCanvas(Canvas):
    """Draws which thing a pixel belongs to instead of its color; shadows belong to nothing."""

    def __init__(self, view: View) -> None:
        super().__init__(view)
        self._view_drawn = view
        self.labels = np.full((view.size, view.size), -1, np.int16)
        self.corners: dict[int, list[np.ndarray]] = {}
        self.areas: dict[int, float] = {}
        self.label = -1

    def disc(self, center: np.ndarray, radius: float, rgb: tuple, alpha: float = 1.0) -> None:
        if alpha == 1:
            self._extend([center - radius, center + radius], np.pi * radius**2)
        super().disc(center, radius, rgb, alpha)

    def box(
        self,
        center: np.ndarray,
        half: tuple[float, float],
        yaw: float,
        rgb: tuple,
        alpha: float = 1.0,
    ) -> None:
        if alpha == 1:
            cos, sin = abs(np.cos(yaw)), abs(np.sin(yaw))
            reach = np.array([half[0] * cos + half[1] * sin, half[0] * sin + half[1] * cos])
            self._extend([center - reach, center + reach], 4 * half[0] * half[1])
        super().box(center, half, yaw, rgb, alpha)

    def hull(self, label: int) -> np.ndarray:
        """Corners [[x1, y1], [x2, y2]] of a thing in fractions of the frame, not clipped."""
        corners = self._view_drawn.to_frame(np.stack(self.corners[label]))
        return np.stack([corners.min(0), corners.max(0)])

    def _extend(self, corners: Sequence[np.ndarray], area: float) -> None:
        self.corners.setdefault(self.label, []).extend(corners)
        # The largest part of a thing: its other parts lie on it, or are the gripper's fingers.
        self.areas[self.label] = max(self.areas.get(self.label, 0.0), area)

    def _blend(self, window: tuple, distance: np.ndarray, rgb: tuple, alpha: float) -> None:
        del rgb
        if alpha == 1:
            self.labels[window][distance < 0] = self.label


def see(scene: Scene, view: View) -> list[Seen]:
    """The things of a scene as a camera shows them: blocks, zones, the gripper."""
    canvas = _LabelCanvas(view)
    names = [f"{b.color} block" for b in scene.blocks] + [f"{z.color} zone" for z in scene.zones]
    names.append("gripper")

    def mark(thing: object) -> None:
        things = [*scene.blocks, *scene.zones, scene.gripper]
        canvas.label = next((i for i, t in enumerate(things) if t is thing), -1)

    tabletop_render.draw_scene(canvas, scene, on_thing=mark)
    mark(scene.gripper)
    tabletop_render.draw_gripper(canvas, scene.gripper)
    pixel = (view.extent / view.size) ** 2
    seen = []
    for label, name in enumerate(names):
        mask, hull = canvas.labels == label, canvas.hull(label)
        clipped = np.clip(hull, 0, 1)
        inside = (clipped[1] > clipped[0]).all()
        box = tuple(float(v) for v in clipped.ravel()) if inside else None
        visible = min(1.0, float(mask.sum()) * pixel / canvas.areas[label])
        seen.append(Seen(name, box, mask, visible))
    return seen


def views(scene: Scene) -> dict[str, View]:
    """The cameras by name, at the size of the masks."""
    return {
        "image": tabletop_render.fixed_view(_MASK_SIZE),
        "wrist_image": tabletop_render.wrist_view(scene, _MASK_SIZE),
    }


# ----------------------------------------------------------------------------
# Phrases.


def held_out(phrase: str) -> bool:
    """Whether a phrase puts a held-out pair of color and relation together."""
    return any(f"{relation} the {color} block" in phrase for color, relation in HELD_OUT_PAIRS)


def seen_pair(phrase: str) -> bool:
    """Whether a phrase puts a color and a relation together that are together in training."""
    related = any(f" block {relation} the " in phrase for relation in RELATIONS)
    return related and not held_out(phrase)


def groundings(scene: Scene, *, unseen_pairs: bool = False) -> list[Grounding]:
    """What phrases mean in both pictures of a scene.

    Args:
      scene: as it lies.
      unseen_pairs: whether phrases with a held-out pair are among them, for evaluation.
    """
    found = []
    for name, view in views(scene).items():
        seen = see(scene, view)
        for phrase, things in _phrases(scene, seen):
            if unseen_pairs or not held_out(phrase):
                boxes = tuple(thing.box for thing in things)
                masks = tuple(Mask.from_array(thing.mask) for thing in things)
                found.append(Grounding(name, phrase, "box", boxes, masks))
        if name == "image":
            found += _free_space(seen, name)
    return found


def _phrases(scene: Scene, seen: Sequence[Seen]) -> Iterator[tuple[str, list[Seen]]]:
    """Phrases that have one clear meaning, and what they mean: nothing, a thing, or several."""
    by_name = {thing.name: thing for thing in seen}
    for name in (*(f"{color} block" for color in BLOCK_RGB), "white zone", "black zone", "gripper"):
        thing = by_name.get(name)
        if thing is None or thing.box is None:
            yield f"the {name}", []
        elif thing.clear:
            yield f"the {name}", [thing]
    blocks = [thing for thing in seen[: len(scene.blocks)] if thing.box is not None]
    if not all(thing.clear for thing in blocks):
        return  # whether a block that is hardly visible counts is not clear
    yield "all blocks", blocks
    if len(blocks) >= 2:
        for word, measure in _SUPERLATIVES.items():
            first, second = sorted(blocks, key=lambda b: measure(b.center))[:2]
            if measure(second.center) - measure(first.center) > _MARGIN:
                yield f"the {word} block", [first]
    for other in blocks:
        for relation in RELATIONS:
            beside = _beside(other, blocks, relation)
            if beside is not None and len(beside) < 2:
                yield f"the block {relation} the {other.name}", beside
    yield from _placed(scene, seen)


def _beside(other: Seen, blocks: Sequence[Seen], relation: str) -> list[Seen] | None:
    """The blocks in a relation to another; None where that is not clear."""
    axis = 0 if relation in ("left of", "right of") else 1
    sign = -1 if relation in ("left of", "above") else 1
    offsets = {b.name: sign * (b.center - other.center)[axis] for b in blocks if b is not other}
    if any(abs(offset) <= _MARGIN for offset in offsets.values()):
        return None
    return [b for b in blocks if offsets.get(b.name, -1) > 0]


def _placed(scene: Scene, seen: Sequence[Seen]) -> Iterator[tuple[str, list[Seen]]]:
    """Phrases about blocks, zones and the gripper on the table."""
    things = seen[: len(scene.blocks)]
    position = scene.gripper.position
    distances = np.array([np.linalg.norm(b.position - position) for b in scene.blocks])
    first, second = np.argsort(distances)[:2]
    if distances[second] - distances[first] > _NEAR_MARGIN and things[first].clear:
        yield "the block nearest to the gripper", [things[first]]
    for zone, shown in zip(scene.zones, seen[len(scene.blocks) :]):
        inside = [
            np.linalg.norm(b.position - zone.position) / tabletop_env.ZONE_RADIUS
            for b in scene.blocks
        ]
        if not shown.clear or any(0.7 < share < 1.4 for share in inside):
            continue
        within = [thing for thing, share in zip(things, inside) if share <= 0.7]
        if len(within) < 2 and all(thing.clear for thing in within):
            yield f"the block in the {zone.color} zone", within


def _free_space(seen: Sequence[Seen], view: str) -> list[Grounding]:
    """The middle of the largest free spot of the table, with all of the free table as its mask."""
    size = seen[0].mask.shape[0]
    edge = round(size * tabletop_env.MARGIN / (1 + 2 * tabletop_env.MARGIN)) + 1
    free = np.zeros((size, size), bool)
    free[edge:-edge, edge:-edge] = True
    for thing in seen:
        free &= ~thing.mask
    # Of equally free spots the first in reading order.
    row, column = np.unravel_index(np.argmax(ndimage.distance_transform_edt(free)), free.shape)
    point = (float(column + 0.5) / size, float(row + 0.5) / size)
    return [Grounding(view, "a free spot", "point", (point,), (Mask.from_array(free),))]


# ----------------------------------------------------------------------------
# Questions and thoughts.


def doing(scene: Scene) -> str:
    """What a picture shows the gripper doing."""
    gripper = scene.gripper
    if scene.held is not None:
        return f"holding the {scene.blocks[scene.held].color} block"
    for block in scene.blocks:
        if np.linalg.norm(block.position - gripper.position) < GRASP_REACH:
            return f"over the {block.color} block"
    for zone in scene.zones:
        if np.linalg.norm(zone.position - gripper.position) < tabletop_env.ZONE_REACH:
            return f"over the {zone.color} zone"
    return "waiting" if np.linalg.norm(gripper.position - HOME[:2]) < 0.02 else "moving"


def questions(scene: Scene) -> list[tuple[str, str]]:
    """Questions about the fixed camera's picture that have one clear answer, and the answers."""
    seen = see(scene, views(scene)["image"])
    blocks = [thing for thing in seen[: len(scene.blocks)] if thing.clear]
    found = [("what is the gripper doing?", doing(scene))]
    if len(blocks) < len(scene.blocks):
        return found
    for other in blocks:
        for relation in RELATIONS:
            beside = _beside(other, blocks, relation)
            if beside is None:
                continue
            found.append((f"how many blocks are {relation} the {other.name}?", str(len(beside))))
            for block in blocks:
                if block is not other and not held_out(f"{relation} the {other.name}"):
                    answer = "yes" if block in beside else "no"
                    found.append((f"is the {block.name} {relation} the {other.name}?", answer))
    for word, measure in _SUPERLATIVES.items():
        first, second = sorted(blocks, key=lambda b: measure(b.center))[:2]
        if measure(second.center) - measure(first.center) > _MARGIN:
            found.append((f"which color is the {word} block?", first.name.split()[0]))
    return found


def draw_questions(scene: Scene, rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """At most ``count`` of ``questions``; every kind of question is equally likely."""
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for question, answer in questions(scene):
        by_kind.setdefault(question.split()[0], []).append((question, answer))
    drawn = []
    # Kinds first: there are dozens of "is X left of Y" and one "what is the gripper doing".
    while by_kind and len(drawn) < count:
        kind = str(rng.choice(sorted(by_kind)))
        drawn.append(by_kind[kind].pop(int(rng.integers(len(by_kind[kind])))))
        if not by_kind[kind]:
            del by_kind[kind]
    return drawn


def reasoning(scene: Scene, task: TabletopTask, coming: np.ndarray) -> str:
    """A thought before an action, with a box, a gripper point and the next move, as ECoT has them.

    Args:
      scene: as it lies.
      task: what is to be done.
      coming: float [T, 7] the next actions.
    """
    seen = {thing.name: thing for thing in see(scene, views(scene)["image"])}
    name = f"{task.block} block" if task.block else f"{task.target} zone"
    target = seen[name]
    parts = [f"{name} {places_text([target.box] if target.box else [])}"]
    if task.family == "place":
        zone = seen[f"{task.target} zone"]
        parts.append(f"{zone.name} {places_text([zone.box])}")
    point = tabletop_render.fixed_view(_MASK_SIZE).to_frame(scene.gripper.position).clip(0, 1)
    parts.append(f"gripper {places_text([tuple(map(float, point))])}")
    moved = coming[:, :3].sum(0)
    words = [
        word
        for value, low, high in zip(moved, ("left", "back", "down"), ("right", "ahead", "up"))
        if abs(value) > 0.02
        for word in (low if value < 0 else high,)
    ]
    parts.append(f"move {' '.join(words) or 'nowhere'}")
    parts.append("close" if coming[-1, 6] > 0 else "open")
    return ". ".join(parts)
