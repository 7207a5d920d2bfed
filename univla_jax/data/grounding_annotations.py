"""Groundings: what a phrase means in a frame, as boxes or points, and their records in a store.

A store keeps those of one step as a text of JSON, ``[[view, phrase, kind, places, masks], …]``, so
that only a task that needs them parses it.

Axes: H/W mask pixels.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from univla_jax.data.augmentation import Window
from univla_jax.errors import UserError
from univla_jax.tokenizers.coordinates import Place

KINDS = {"box": 4, "point": 2}
"""Kind of a place -> numbers that describe it."""
_LEAST_VISIBLE = 0.25  # of a box inside a changed frame
_DECIMALS = 4


@dataclasses.dataclass(frozen=True)
class Mask:
    """A mask in COCO's uncompressed run lengths: column by column, beginning with zeros.

    Attributes:
      size: height and width in pixels.
      counts: lengths of the runs.
    """

    size: tuple[int, int]
    counts: tuple[int, ...]

    @classmethod
    def from_array(cls, mask: np.ndarray) -> Mask:
        """The mask of bool [H, W]."""
        flat = np.asarray(mask, bool).T.ravel()
        changes = np.flatnonzero(np.diff(np.concatenate([[False], flat]).astype(np.int8)))
        ends = np.concatenate([[0], changes, [flat.size]])
        return cls(tuple(mask.shape), tuple(int(n) for n in np.diff(ends)))

    def to_array(self) -> np.ndarray:
        """bool [H, W]."""
        values = np.arange(len(self.counts)) % 2 == 1
        return np.repeat(values, self.counts).reshape(self.size[::-1]).T

    def contains(self, x: float, y: float) -> bool:
        """Whether the pixel at the point (x, y), 0 … 1, belongs to it."""
        height, width = self.size
        row, column = min(int(y * height), height - 1), min(int(x * width), width - 1)
        return bool(self.to_array()[row, column])


@dataclasses.dataclass(frozen=True)
class Grounding:
    """What a phrase means in one frame.

    Attributes:
      view: camera of the frame; empty where there is one alone.
      phrase: such as "the red block"; plural ones begin with "all".
      kind: a key of ``KINDS``.
      places: none where there is no such thing, several where the phrase is plural.
      masks: of the same things, in the same order; empty where they are not known.
    """

    view: str
    phrase: str
    kind: str
    places: tuple[Place, ...]
    masks: tuple[Mask, ...] = ()

    def __post_init__(self) -> None:
        """Raises UserError for places of another kind or masks of another number."""
        if self.kind not in KINDS or any(len(p) != KINDS[self.kind] for p in self.places):
            raise UserError(f"grounding of {self.phrase!r}: {self.places} are no {self.kind}")
        if self.masks and len(self.masks) != len(self.places):
            raise UserError(
                f"grounding of {self.phrase!r}: {len(self.masks)} masks, {len(self.places)} places"
            )

    def seen_through(self, window: Window) -> Grounding | None:
        """The same in a frame that shows ``window`` of this one; None where too little is left.

        A thing of which under a quarter is left has no clear answer any more, nor has a phrase that
        compares it with others, so such a grounding is dropped and not turned into "none".
        """
        places = []
        for place in self.places:
            moved = np.array(place).reshape(-1, 2)
            moved = (moved - [window.left, window.top]) / [window.width, window.height]
            inside = np.clip(moved, 0, 1)
            if self.kind == "point":
                if not (moved == inside).all():
                    return None
            elif np.prod(inside[1] - inside[0]) < _LEAST_VISIBLE * np.prod(moved[1] - moved[0]):
                return None
            places.append(tuple(float(v) for v in inside.ravel()))
        return dataclasses.replace(self, places=tuple(places), masks=())


def ask_for(phrase: str, kind: str) -> str:
    """The question for the boxes or points of a phrase."""
    if kind == "point":
        return f"point to {phrase}"
    return f"where {'are' if is_plural(phrase) else 'is'} {phrase}?"


_ASKED = re.compile(
    r"(?:(?P<point>point to)|where (?:is|are)|locate|find)\s+(?P<phrase>.+?)[?.!]*", re.IGNORECASE
)


def asked_for(question: str) -> tuple[str, str] | None:
    """Phrase and kind of a question for places; None of any other question."""
    found = _ASKED.fullmatch(question.strip())
    return found and (found["phrase"], "point" if found["point"] else "box")


def is_plural(phrase: str) -> bool:
    """Whether a phrase means several things."""
    return phrase.split()[:1] == ["all"]


def dump_groundings(groundings: Sequence[Grounding]) -> str:
    """The groundings of one step as the text that a store keeps."""
    rows = [
        [
            g.view,
            g.phrase,
            g.kind,
            [[round(float(v), _DECIMALS) for v in place] for place in g.places],
            [[*mask.size, *mask.counts] for mask in g.masks],
        ]
        for g in groundings
    ]
    return json.dumps(rows, separators=(",", ":"), ensure_ascii=False)


def parse_groundings(text: str) -> list[Grounding]:
    """The inverse of ``dump_groundings``.

    Raises:
      UserError: no such text.
    """
    try:
        return [_grounding(*row) for row in json.loads(text)]
    except (ValueError, TypeError) as error:
        raise UserError(f"damaged groundings {text[:60]!r}: {error}") from error


def count_places(text: str) -> set[tuple[str, str, int]]:
    """Phrase, kind and number of places of the groundings of one step, whatever they are.

    Raises:
      UserError: no such text.
    """
    try:
        return {(phrase, kind, len(places)) for _, phrase, kind, places, _ in json.loads(text)}
    except (ValueError, TypeError) as error:
        raise UserError(f"damaged groundings {text[:60]!r}: {error}") from error


def _grounding(view: str, phrase: str, kind: str, places: Any, masks: Any) -> Grounding:
    return Grounding(
        view,
        phrase,
        kind,
        tuple(tuple(map(float, place)) for place in places),
        tuple(Mask((height, width), tuple(counts)) for height, width, *counts in masks),
    )
