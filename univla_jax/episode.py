"""Contracts between robots, data and policies: episode, observation, action chunk.

Axes: T steps, H/W image height and width, A action dimensions, P proprioceptive state dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

TURN = "\x1e"
"""Between the questions about one step in a text "question", and between their answers."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """One robot episode before tokenization.

    Attributes:
      instruction: natural-language task, UTF-8, not empty.
      frames: per view (for example ``"image"``, ``"wrist_image"``) uint8 [T, H, W, 3], RGB.
      actions: float32 [T, A], physical units of the dataset; ``actions[t]`` follows ``frames[t]``.
      control_hz: control rate in steps per second.
      corpus: name of the dataset in ``data/datasets.py``.
      episode_id: unique inside the dataset, used in error messages and manifests.
      state: float32 [T, P] proprioception, or None where the dataset has none.
      texts: further texts by kind, each one for the whole episode or one per step: ``"reasoning"``
        before an action, ``"question"`` and ``"answer"`` about a frame (several with ``TURN``
        between them).
      groundings: per step what phrases mean in its frames, as ``data/grounding_annotations.py``
        writes it; empty where the dataset has none.
      paraphrases: other instructions of the same episode; each training sample draws one of all.
      metadata: what else the dataset says about the episode, by name, as JSON values; kept in the
        token store.
    """

    instruction: str
    frames: Mapping[str, np.ndarray]
    actions: np.ndarray
    control_hz: float
    corpus: str
    episode_id: str
    state: np.ndarray | None = None
    texts: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    groundings: Sequence[str] = ()
    paraphrases: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        """Number of steps T."""
        return len(self.actions)


@dataclasses.dataclass(frozen=True)
class Observation:
    """Input of a policy at one step.

    Attributes:
      instruction: natural-language task.
      frames: per view uint8 [H, W, 3], RGB, at the size the camera delivers.
      state: float32 [P] or None.
      committed: float32 [N, A], the actions that will be executed from this step on before the
        answer is there, in physical units; None where the robot waits for it.
    """

    instruction: str
    frames: Mapping[str, np.ndarray]
    state: np.ndarray | None = None
    committed: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class ActionChunk:
    """Output of a policy: the next actions of one robot.

    Attributes:
      actions: float32 [chunk, A] in physical units (unnormalized), from the step of the observation
        on; with committed actions [N + chunk, A], which it repeats first.
      valid: False when the generated tokens did not decode to a whole chunk; ``actions`` then
        holds the "no motion" fallback and must be counted, never taken for a prediction.
      reason: why it is not valid, empty when it is.
      num_overridden: tokens where constrained decoding replaced the model's likeliest one, because
        it would have led to no whole chunk. Many of them mean a model that does not know what to
        do.
    """

    actions: np.ndarray
    valid: bool = True
    reason: str = ""
    num_overridden: int = 0
