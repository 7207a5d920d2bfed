"""Groundings and their text; what moves with the pixels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from univla_jax.data.augmentation import Window, crop, draw_crop, draw_shift, shift
from univla_jax.data.grounding_annotations import (
    Grounding,
    Mask,
    ask_for,
    asked_for,
    dump_groundings,
    parse_groundings,
)
from univla_jax.errors import UserError

BOX = (0.25, 0.5, 0.5, 0.75)


def test_round_trip():
    mask = Mask.from_array(np.eye(4, dtype=bool))
    groundings = [
        Grounding("image", "the réd block", "box", (BOX,), (mask,)),
        Grounding("", "all blocks", "point", ((0.5, 0.25), (1.0, 0.0))),
        Grounding("image", "the cat", "box", ()),
    ]
    assert parse_groundings(dump_groundings(groundings)) == groundings


@pytest.mark.parametrize("text", ["", "{}", '[["a"]]', '[["a","b","box",[[1,2]],[]]]'])
def test_damaged_texts_are_refused(text):
    if text == "{}":
        assert parse_groundings(text) == []
        return
    with pytest.raises(UserError):
        parse_groundings(text)


@pytest.mark.parametrize("seed", range(4))
def test_masks_are_run_lengths_by_column(seed):
    array = np.random.default_rng(seed).random((5, 7)) < [0.5, 0.0, 1.0, 0.2][seed]
    mask = Mask.from_array(array)
    assert sum(mask.counts) == 35
    np.testing.assert_array_equal(mask.to_array(), array)
    assert mask.contains(0.99, 0.01) == array[0, 6]


def test_coco_counts():
    assert Mask.from_array(np.array([[0, 1], [1, 1]], bool)).counts == (1, 3)


@pytest.mark.parametrize("change", ["shift", "crop"])
@pytest.mark.parametrize("seed", range(3))
def test_boxes_move_with_the_pixels(change, seed):
    frame = np.zeros((1, 64, 64, 3), np.uint8)
    frame[0, 32:48, 16:32] = 255
    rng = np.random.default_rng(seed)
    window = draw_shift(0.2, rng) if change == "shift" else draw_crop(0.6, rng)
    changed = (shift if change == "shift" else crop)(frame, window)[0, :, :, 0] > 127
    moved = Grounding("", "it", "box", (BOX,)).seen_through(window)
    rows, columns = np.where(changed)
    seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 64
    np.testing.assert_allclose(moved.places[0], seen, atol=1.5 / 64)


def test_what_is_cut_off_is_dropped():
    box, point = Grounding("", "it", "box", (BOX,)), Grounding("", "it", "point", (BOX[:2],))
    assert box.seen_through(Window(0.45, 0.0)) is None
    assert box.seen_through(Window(0.3, 0.0)).places == ((0.0, 0.5, 0.2, 0.75),)
    assert point.seen_through(Window(0.3, 0.0)) is None
    assert dataclasses.replace(box, places=()).seen_through(Window(0.9, 0.9)).places == ()


def test_wrong_places_are_refused():
    with pytest.raises(UserError, match="are no point"):
        Grounding("", "it", "point", (BOX,))
    with pytest.raises(UserError, match="1 masks, 0 places"):
        Grounding("", "it", "box", (), (Mask((1, 1), (1,)),))


def test_questions_for_places():
    assert ask_for("the red block", "box") == "where is the red block?"
    assert ask_for("all blocks", "box") == "where are all blocks?"
    for kind in ("box", "point"):
        assert asked_for(ask_for("the red block", kind)) == ("the red block", kind)
    assert asked_for("Locate the cup.") == ("the cup", "box")
    assert asked_for("how many blocks are there?") is None
