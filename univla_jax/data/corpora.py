"""The corpora, one row each: where the fields lie, what the actions mean, how often it is seen.

Bring your own data with one row: name its views and fields as they are called inside ``steps`` of
the TFDS dataset and, where its actions are not simply the field ``action``, give a small function.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping

import numpy as np

from univla_jax.errors import UserError

Steps = Mapping[str, np.ndarray]
"""The non-image fields of an episode by path, for example ``"observation/state"``: [T, ...]."""


def commanded(steps: Steps) -> np.ndarray:
    """The field ``action`` as it lies there."""
    return steps["action"]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One row of the table.

    Attributes:
      name: key in ``CORPORA``.
      views: camera name in this package -> path of its image inside a step.
      control_hz: control rate in steps per second.
      frame_spacing: steps between the frames of a world-model window.
      instruction: path of the instruction inside the first step.
      actions: ``Steps`` -> [T, A] in the corpus' physical units.
      state: path of the proprioceptive state, None where there is none.
      mixture_weight: share in the world-model mixture relative to the other corpora.
      min_frames: shortest episode kept, in frames: one action chunk.
    """

    name: str
    views: Mapping[str, str]
    control_hz: float
    frame_spacing: int
    instruction: str = "language_instruction"
    actions: Callable[[Steps], np.ndarray] = commanded
    state: str | None = "observation/state"
    mixture_weight: float = 1.0
    min_frames: int = 10


_TWO_VIEWS = {"image": "observation/image", "wrist_image": "observation/wrist_image"}


def _libero(suite: str) -> Corpus:
    """LIBERO without its no-op steps, as RLDS: raw actions, gripper -1 open and +1 closed."""
    return Corpus(f"libero_{suite}", views=_TWO_VIEWS, control_hz=20.0, frame_spacing=10)


CORPORA: dict[str, Corpus] = {
    row.name: row
    for row in (
        Corpus("tabletop", views=_TWO_VIEWS, control_hz=5.0, frame_spacing=5),
        _libero("spatial"),
        _libero("object"),
        _libero("goal"),
        _libero("10"),
    )
}


def find_corpus(name: str) -> Corpus:
    """The row called ``name``.

    Raises:
      UserError: there is none; names the nearest one.
    """
    if name in CORPORA:
        return CORPORA[name]
    near = difflib.get_close_matches(name, CORPORA, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(CORPORA)}"
    raise UserError(f"unknown corpus {name!r}; {hint} Add a row to univla_jax/data/corpora.py")
