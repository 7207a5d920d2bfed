"""Scores of grounding, each beside a value worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.data.grounding_annotations import Grounding, Mask
from univla_jax.evaluation.grounding_scores import iou, match, score

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
HALF = (0.0, 0.0, 0.25, 1.0)


def test_iou():
    assert iou(LEFT, LEFT) == 1
    assert iou(LEFT, RIGHT) == 0
    assert iou(LEFT, HALF) == pytest.approx(0.5)
    assert iou((0.25, 0, 0.75, 1), LEFT) == pytest.approx(1 / 3)


def test_single_boxes_and_absent_things():
    box, none = Grounding("", "it", "box", (LEFT,)), Grounding("", "no", "box", ())
    found = score([box, box, box, box, none, none], [[LEFT], [HALF], [], None, [], [LEFT]])
    assert found["boxes"] == 4 and found["parse_failures"] == 1
    assert (found["acc@0.25"], found["acc@0.5"], found["acc@0.75"]) == (0.5, 0.5, 0.25)
    assert found["mean_iou"] == pytest.approx(1.5 / 4)
    assert found["center_error"] == pytest.approx(0.125 / 2)
    assert found["absent_accuracy"] == 0.5 and found["false_none"] == 0.25
    assert "f1" not in found and "point_in_mask" not in found


def test_points_are_scored_in_masks():
    mask = Mask.from_array(np.array([[1, 0], [0, 0]], bool))
    truth = Grounding("", "it", "box", (LEFT,), (mask,))
    found = score([truth] * 3, [[(0.1, 0.1)], [(0.1, 0.9)], []])
    # "none" is an answer to a box here: it is no point.
    assert found["points"] == 2 and found["point_in_mask"] == 0.5


def test_several_are_matched_one_to_one():
    truth = Grounding("", "all things", "box", (LEFT, RIGHT))
    assert match([LEFT, LEFT], truth) == 1
    assert match([RIGHT, HALF], truth) == 2
    found = score([truth, truth], [[RIGHT, HALF, LEFT], [LEFT]])
    assert found["precision"] == pytest.approx(3 / 4) and found["recall"] == pytest.approx(3 / 4)
    assert found["f1"] == 0.75 and found["count_exact"] == 0
    # Greedy matching would give the first answer the only thing that the second one hits.
    wide = Grounding("", "all", "box", ((0, 0, 0.6, 1), (0, 0, 0.5, 1)))
    assert match([(0, 0, 0.55, 1), (0, 0, 0.3, 1)], wide) == 2
