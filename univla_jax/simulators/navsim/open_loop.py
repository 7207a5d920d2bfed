"""Open-loop errors of nuScenes planning in both conventions, which are never to be mixed.

    UniAD      the value AT 1, 2 and 3 seconds
    ST-P3      the mean of all steps UP TO 1, 2 and 3 seconds

Sources: github.com/OpenDriveLab/UniAD planning_metrics.py, github.com/hustvl/VAD metric_stp3.py.
Collisions are counted on a grid of 200 x 200 cells of 0.5 m with an ego box of 4.084 m x 1.85 m,
0.5 m ahead of the pose and never turned; steps at which the true trajectory collides are left out.

Axes: T steps of 0.5 s, N boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

_SECONDS, _PER_SECOND = (1, 2, 3), 2
_CELLS, _CELL = 200, 0.5  # the grid reaches 50 m to each side
_LENGTH, _WIDTH, _AHEAD = 4.084, 1.85, 0.5


def displacement_errors(planned: np.ndarray, human: np.ndarray) -> np.ndarray:
    """Distance in meters at each step, float64 [T], of poses or points [T, >= 2]."""
    return np.linalg.norm(np.asarray(planned)[:, :2] - np.asarray(human)[:, :2], axis=1)


def collisions(planned: np.ndarray, human: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Whether the ego is in an occupied cell at each step; False where the human is in one, too.

    Args:
      planned: float [T, >= 2], in the frame of the present pose, forward and left.
      human: float [T, >= 2].
      boxes: float [T, N, 4, 2] corners in the same frame; NaN where absent.

    Returns:
      bool [T].
    """
    found = np.zeros(len(planned), bool)
    for step, corners in enumerate(boxes[: len(planned)]):
        occupied = _occupied(corners)
        hits = [_hits(occupied, np.asarray(path)[step, :2]) for path in (planned, human)]
        found[step] = hits[0] and not hits[1]
    return found


def in_both_conventions(values: Sequence[float], name: str) -> dict[str, float]:
    """A quantity of each step as each convention reports it, for 1, 2 and 3 seconds.

    Args:
      values: one per step of 0.5 s, at least six.
      name: of the quantity, such as ``"L2"``.

    Returns:
      ``"<name> <n> s (<convention>)"`` -> value.
    """
    values = np.asarray(values, np.float64)
    found = {}
    for seconds in _SECONDS:
        steps = seconds * _PER_SECOND
        found[f"{name} {seconds} s (UniAD)"] = float(values[steps - 1])
        found[f"{name} {seconds} s (ST-P3)"] = float(values[:steps].mean())
    return found


def mean_over(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each quantity over records that have it, in the order of their first."""
    names = dict.fromkeys(name for record in records for name in record)
    return {n: float(np.mean([record[n] for record in records if n in record])) for n in names}


def _occupied(corners: np.ndarray) -> np.ndarray:
    """bool [200, 200]: row by forward, column by left."""
    image = Image.new("1", (_CELLS, _CELLS))
    draw = ImageDraw.Draw(image)
    for box in corners:
        if np.isfinite(box).all():
            cells = np.floor(box / _CELL + _CELLS / 2)
            draw.polygon([(left, forward) for forward, left in cells], fill=1)
    return np.asarray(image)


def _hits(occupied: np.ndarray, point: np.ndarray) -> bool:
    forward = point[0] + _AHEAD + np.array([-_LENGTH / 2, _LENGTH / 2])
    left = point[1] + np.array([-_WIDTH / 2, _WIDTH / 2])
    low, high = (np.floor(np.array([forward[i], left[i]]) / _CELL + _CELLS / 2) for i in (0, 1))
    low, high = (np.clip(c, 0, _CELLS - 1).astype(int) for c in (low, high))
    return bool(occupied[low[0] : high[0] + 1, low[1] : high[1] + 1].any())
