"""Changes of conventions: what they do to episodes and simulators, and what undoes them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from univla_jax.episode import Episode
from univla_jax.evaluation import conventions
from univla_jax.evaluation.conventions import Change, ChangedSimulator
from univla_jax.normalization import ActionStatistics
from univla_jax.simulators import StepResult, Trial
from univla_jax.simulators.tabletop.tabletop_benchmark import TabletopSimulator
from univla_jax.simulators.tabletop.tabletop_expert import demonstrate

RNG = np.random.default_rng(0)
VIEWS = ("image", "wrist_image")


def _frames():
    return {view: RNG.integers(256, size=(4, 16, 16, 3), dtype=np.uint8) for view in VIEWS}


def _of(changes, what):
    return next(change for change in changes if change.what == what)


@pytest.mark.parametrize("change", conventions.frame_changes(VIEWS), ids=lambda c: c.what)
def test_frames_stay_frames_and_flips_undo_themselves(change):
    frames = _frames()
    changed = change.frames(frames)
    assert {v: (f.shape, f.dtype) for v, f in changed.items()} == {
        v: (f.shape, f.dtype) for v, f in frames.items()
    }
    assert any(not np.array_equal(changed[view], frames[view]) for view in VIEWS)
    if change.convention != "resize":
        again = change.frames(changed)
        assert all(np.array_equal(again[view], frames[view]) for view in VIEWS)


def test_a_margin_undoes_a_cut():
    smooth = np.linspace(0, 255, 64)[None, :, None] * np.ones((64, 1, 3))
    frame = smooth.astype(np.uint8)
    cut = conventions.zoomed(frame, share=0.8)
    back = conventions.zoomed(cut, share=1.25)
    middle = (slice(8, -8), slice(8, -8))
    assert np.abs(back[middle].astype(int) - frame[middle]).max() < 12
    assert np.abs(cut[middle].astype(int) - frame[middle]).max() > 12


@pytest.mark.parametrize(
    ("pair", "actions"),
    [
        (("gripper 2 g - 1", "gripper (g + 1) / 2"), RNG.uniform(-1, 1, (5, 7))),
        (("movement times 0.5", "movement times 2"), RNG.uniform(-1, 1, (5, 7))),
        (("degrees to radians", "radians to degrees"), RNG.uniform(-1, 1, (5, 7))),
        (("Euler angles to axis-angle", "axis-angle to Euler angles"), RNG.uniform(-1, 1, (5, 7))),
    ],
)
def test_changes_of_actions_come_in_pairs(pair, actions):
    changes = conventions.action_changes(7, turns=True)
    first, second = (_of(changes, what) for what in pair)
    assert not np.allclose(first.actions(actions), actions)
    np.testing.assert_allclose(second.actions(first.actions(actions)), actions, atol=1e-9)


def test_rotations_are_tried_where_something_turns():
    names = [
        {change.convention for change in conventions.action_changes(7, turns=turns)}
        for turns in (False, True)
    ]
    assert names[1] - names[0] == {"rotation form"}


@pytest.mark.parametrize(
    "text",
    [
        "push the red block",
        "Push the red block.",
        "PUSH_THE_RED_BLOCK",
        'Instruction: "push the red block"',
        "In: What action should the robot take to push the red block?\nOut:",
    ],
)
def test_words_are_made_plain(text):
    assert conventions.plain_words(text) == "push the red block"


def test_two_steps_become_one():
    actions = np.arange(35, dtype=np.float32).reshape(5, 7)
    frames = {"image": np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3))}
    episode = Episode("x", frames, actions, 10.0, "c", "e", state=np.arange(5.0)[:, None])
    merged = conventions.MERGED.episode(episode)
    assert len(merged) == 2 and merged.control_hz == 5.0
    np.testing.assert_array_equal(merged.actions[0, :6], actions[0, :6] + actions[1, :6])
    assert merged.actions[0, 6] == actions[1, 6]
    assert merged.frames["image"][:, 0, 0, 0].tolist() == [0, 2] and merged.state.tolist() == [
        [0],
        [2],
    ]


def test_a_gain_of_statistics_is_one_of_normalized_actions():
    statistics = ActionStatistics(mean=(0,), std=(1,), q01=(-2.0,), q99=(4.0,))
    twice = conventions.scaled(statistics, 2.0)
    wanted = statistics.unnormalize(np.array([[0.6]]))
    np.testing.assert_allclose(twice.unnormalize(np.array([[0.3]])), wanted, atol=1e-6)


def test_a_simulator_behind_changes_pickles_and_begins_where_an_episode_did():
    episode = demonstrate(7, family="lift")
    flip = _of(conventions.frame_changes(VIEWS), "image upside down")
    negate = _of(conventions.action_changes(7, turns=False), "gripper negated")
    made = ChangedSimulator(TabletopSimulator, (flip, negate), (episode,))
    simulator = pickle.loads(pickle.dumps(made))()
    simulator.reset(Trial(0, 0))
    seen = simulator.observe()
    np.testing.assert_array_equal(seen.frames["image"], episode.frames["image"][0, ::-1])
    np.testing.assert_array_equal(seen.frames["wrist_image"], episode.frames["wrist_image"][0])
    assert seen.instruction == episode.instruction
    for action in negate.actions(episode.actions):
        if simulator.step(action) is StepResult.ENDED:
            break
    assert simulator.result()["success"] and simulator.result()["seed"] == 7


def test_waiting_and_repeating_take_steps():
    change = Change("", "", ("", ""), merge=2)
    simulator = ChangedSimulator(TabletopSimulator, (conventions.waiting(3), change))()
    simulator.reset(Trial(0, 0))
    simulator.step(np.zeros(7))
    assert simulator.result()["steps"] == 5
