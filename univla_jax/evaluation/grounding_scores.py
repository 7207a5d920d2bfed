"""Scores of grounding: IoU, points in masks, Hungarian matching, and absent things.

acc@t is the share of boxes with an IoU of at least t, where an answer of none counts as no overlap
(github.com/QwenLM/Qwen-VL eval_mm/evaluate_grounding.py); a point hits where it lies in the mask
(github.com/wentaoyuan/RoboPoint robopoint/eval/summarize_vqa.py); several things are matched to
the answers one to one (github.com/allenai/molmo olmo/eval/evaluators.py).

Axes: N answers, M things.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.optimize

from univla_jax.data.grounding_annotations import Grounding, is_plural
from univla_jax.tokenizers.coordinates import Place

THRESHOLDS = (0.25, 0.5, 0.75)
Answered = Sequence[Place] | None
"""Places of an answer; None where it did not parse."""


def iou(first: Place, second: Place) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    a, b = np.asarray(first, float), np.asarray(second, float)
    sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    overlap = float(np.prod(sides))
    union = float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - overlap
    return overlap / union if union > 0 else 0.0


def hits(answer: Place, truth: Grounding, index: int, threshold: float = 0.5) -> bool:
    """Whether a place is the ``index``-th thing: a point in its mask or box, or a box on it."""
    place = truth.places[index]
    if len(answer) == 2:
        if truth.masks:
            return truth.masks[index].contains(*answer)
        inside = len(place) == 4 and place[0] <= answer[0] <= place[2]
        return bool(inside and place[1] <= answer[1] <= place[3])
    return len(place) == 4 and iou(answer, place) >= threshold


def match(answers: Sequence[Place], truth: Grounding) -> int:
    """How many answers hit a thing of their own, in the best one-to-one matching."""
    if not answers or not truth.places:
        return 0
    table = [[hits(a, truth, i) for i in range(len(truth.places))] for a in answers]
    rows, columns = scipy.optimize.linear_sum_assignment(np.array(table), maximize=True)
    return int(np.array(table)[rows, columns].sum())


def score(truths: Sequence[Grounding], answers: Sequence[Answered]) -> dict[str, Any]:
    """Figures over many answers; those for which there is nothing to count are left out.

    Args:
      truths: what the phrases mean.
      answers: of a model, in the same order.
    """
    pairs = list(zip(truths, answers, strict=True))
    found: dict[str, Any] = {"answers": len(pairs), "parse_failures": answers.count(None)}
    single = [(t, a) for t, a in pairs if t.places and not is_plural(t.phrase)]
    boxes = [(t, a) for t, a in single if t.kind == "box" and _size(a) != 2]
    if boxes:
        overlaps = np.array([iou(a[0], t.places[0]) if a else 0.0 for t, a in boxes])
        found["boxes"] = len(boxes)
        found |= {f"acc@{t}": _share(overlaps >= t) for t in THRESHOLDS}
        found["mean_iou"] = _share(overlaps)
        errors = [_center_error(a[0], t.places[0]) for t, a in boxes if a]
        found["center_error"] = _share(errors) if errors else None
    points = [(t, a) for t, a in single if t.kind == "point" or _size(a) == 2]
    if points:
        found["points"] = len(points)
        found["point_in_mask"] = _share([bool(a) and hits(a[0], t, 0) for t, a in points])
    if several := [(t, a or ()) for t, a in pairs if t.places and is_plural(t.phrase)]:
        matched = sum(match(a, t) for t, a in several)
        precision = matched / max(1, sum(len(a) for _, a in several))
        recall = matched / sum(len(t.places) for t, _ in several)
        found["several"] = len(several)
        found |= {"precision": round(precision, 4), "recall": round(recall, 4)}
        found["f1"] = round(2 * precision * recall / max(1e-9, precision + recall), 4)
        found["count_exact"] = _share([len(a) == len(t.places) for t, a in several])
    if absent := [a for t, a in pairs if not t.places]:
        found["absent"] = len(absent)
        found["absent_accuracy"] = _share([a is not None and not len(a) for a in absent])
    if single:
        found["false_none"] = _share([a is not None and not len(a) for _, a in single])
    return found


def _size(answer: Answered) -> int:
    return len(answer[0]) if answer else 0


def _center_error(first: Place, second: Place) -> float:
    a, b = np.asarray(first), np.asarray(second)
    return float(np.linalg.norm((a[:2] + a[2:]) / 2 - (b[:2] + b[2:]) / 2))


def _share(values: Any) -> float:
    return round(float(np.mean(values)), 4)
