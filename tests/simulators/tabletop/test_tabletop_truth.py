"""Boxes, masks, phrases, questions and thoughts of the tabletop, against its pictures."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from univla_jax.data.grounding_annotations import parse_groundings
from univla_jax.simulators.tabletop import tabletop_render, tabletop_truth
from univla_jax.simulators.tabletop.tabletop_env import BLOCK_RGB, TabletopEnv
from univla_jax.simulators.tabletop.tabletop_expert import demonstrate
from univla_jax.tokenizers.coordinates import find_places


@pytest.fixture(scope="module")
def scene():
    env = TabletopEnv(lazy=True)
    env.reset(seed=3)
    return env.scene


@pytest.mark.parametrize("view", ["image", "wrist_image"])
def test_masks_are_the_pixels_of_the_color(scene, view):
    camera = tabletop_truth.views(scene)[view]
    size = camera.size
    render = tabletop_render.render_fixed if view == "image" else tabletop_render.render_wrist
    picture = render(scene, size).astype(int)
    for block, thing in zip(scene.blocks, tabletop_truth.see(scene, camera)):
        tints = [
            np.array(BLOCK_RGB[block.color]) * share + (1 - share) * 255 for share in (1, 0.75)
        ]
        shown = np.min([np.abs(picture - tint).max(-1) for tint in tints], axis=0) < 12
        assert (shown & ~thing.mask).sum() <= 2
        inner = ndimage.binary_erosion(thing.mask, np.ones((3, 3)))
        assert (inner & ~shown).sum() <= 0.45 * inner.sum()  # where its two tints meet


def test_a_box_is_the_hull_of_an_uncovered_mask(scene):
    for thing in tabletop_truth.see(scene, tabletop_truth.views(scene)["image"]):
        if thing.visible > 0.99:
            rows, columns = np.where(thing.mask)
            hull = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 64
            np.testing.assert_allclose(thing.box, hull, atol=1.1 / 64)


def test_phrases_mean_what_they_say(scene):
    by_phrase = {
        g.phrase: g
        for g in tabletop_truth.groundings(scene, unseen_pairs=True)
        if g.view == "image"
    }
    colors = {block.color for block in scene.blocks}
    for color in BLOCK_RGB:
        assert bool(by_phrase[f"the {color} block"].places) == (color in colors)
    assert len(by_phrase["all blocks"].places) == 3
    leftmost = min(scene.blocks, key=lambda b: b.position[0])
    if "the leftmost block" in by_phrase:
        own = by_phrase[f"the {leftmost.color} block"].places
        assert by_phrase["the leftmost block"].places == own
    for block in scene.blocks:
        found = by_phrase.get(f"the block left of the {block.color} block")
        beside = [b for b in scene.blocks if b.position[0] < block.position[0] - 0.1]
        if found is not None:
            assert len(found.places) == len(beside)
    (spot,), (mask,) = by_phrase["a free spot"].places, by_phrase["a free spot"].masks
    assert mask.contains(*spot)


def test_held_out_pairs_are_for_evaluation_alone():
    found = [
        [g.phrase for g in parse_groundings(step)]
        for unseen in (False, True)
        for step in demonstrate(11, annotate=True, unseen_pairs=unseen).groundings[:1]
    ]
    assert not any(map(tabletop_truth.held_out, found[0]))
    assert any(map(tabletop_truth.held_out, found[1]))
    assert any(map(tabletop_truth.seen_pair, found[0]))
    assert not any(tabletop_truth.held_out(p) and tabletop_truth.seen_pair(p) for p in found[1])
    assert {p for p in found[1] if not tabletop_truth.held_out(p)} == set(found[0])


def test_every_step_is_annotated_and_plain_episodes_are_not():
    episode = demonstrate(5, family="place", annotate=True)
    assert set(episode.texts) == {"question", "answer", "reasoning"}
    assert {len(t) for t in episode.texts.values()} == {len(episode)} == {len(episode.groundings)}
    thought = episode.texts["reasoning"][0]
    assert [len(place) for place in find_places(thought)] == [4, 4, 2]
    assert "move" in thought
    assert demonstrate(5, family="place").texts == {}


def test_answers_are_true(scene):
    answers = dict(tabletop_truth.questions(scene))
    assert answers["what is the gripper doing?"] == "waiting"
    by_color = {block.color: block.position for block in scene.blocks}
    asked = 0
    for question, answer in answers.items():
        words = question.split()
        if words[0] == "is" and "left" in words:
            first, second = by_color[words[2]], by_color[words[-2]]
            assert answer == ("yes" if first[0] < second[0] else "no")
            asked += 1
    assert asked
