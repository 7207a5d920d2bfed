"""What a video policy remembers between calls."""

from __future__ import annotations

import numpy as np
import pytest

from tests.parity import assert_parity
from tests.pipeline import small
from tests.sequences.spelling import ASSETS, FRAME, chunk, code, spell
from univla_jax.errors import UserError
from univla_jax.tasks.history import History, close_action

TASK = small.task("policy_video", frames=2)


def test_golden_prompts_of_a_policy(golden_dir):
    assert_parity(golden_dir, "step", "prompt ids")


def test_the_history_of_a_video_policy_is_its_training_sequence():
    frames = [code(1, 2), code(3, 4), code(5, 6)]
    actions, end = [chunk(1), chunk(2)], [ASSETS.vocabulary.eoa]
    opening = TASK.opening("go")
    history = History(TASK.history_window).observe(TASK.moment_prompt(frames[:1]))
    assert spell(history.prompt(opening)) == f"<bos> g o {FRAME.format(1, 2)} <boa>"
    history = history.act(np.concatenate([actions[0], end]))
    history = history.observe(TASK.moment_prompt(frames[1:2]))
    two = [np.concatenate(frames[:2])]
    whole = TASK.build("go", two, actions).ids
    np.testing.assert_array_equal(history.prompt(opening), whole[:-2])
    np.testing.assert_array_equal(history.prompt(opening), TASK.build("go", two, actions[:1]).ids)
    history = history.act(np.concatenate([actions[1], end]))
    prefix = history.prefix(opening)
    history = history.observe(TASK.moment_prompt(frames[2:]))
    third = history.prompt(opening)
    assert spell(third).startswith(f"<bos> g o {FRAME.format(3, 4)} <boa> a2 <eoa>")
    np.testing.assert_array_equal(third[: len(prefix)], prefix)
    np.testing.assert_array_equal(third[len(prefix) :], TASK.moment_prompt(frames[2:]))
    assert len(history.moments) == 2 and len(history.actions) == 1


def test_a_history_of_one_observation_is_the_image_policy():
    task = small.task("policy_image")
    history = History(task.history_window)
    for frame in (code(1, 2), code(3, 4)):
        history = history.observe(task.moment_prompt([frame]))
        prompt = history.prompt(task.opening("go"))
        np.testing.assert_array_equal(prompt, task.build("go", [frame]).ids)
        history = history.act(chunk(1))


def test_states_stand_in_the_prompt_where_training_shows_them():
    two, states = np.concatenate([code(1, 2), code(3, 4)]), [chunk(1), chunk(3)]
    history = History(2)
    for t in (0, 1):
        history = history.observe(TASK.moment_prompt([two[t : t + 1]], states[t]))
        prompt = history.prompt(TASK.opening("go"))
        history = history.act(np.append(chunk(2), ASSETS.vocabulary.eoa))
    expected = TASK.build("go", [two], [chunk(2)], states)
    np.testing.assert_array_equal(prompt, expected.ids)


def test_a_wrong_order_is_refused():
    moment = TASK.moment_prompt([code(1, 2)])
    waiting = History().observe(moment)
    cases = [
        lambda: History(window=0),
        lambda: History().prompt(np.zeros(1, np.int32)),
        lambda: History().act(moment),
        lambda: waiting.observe(moment),
    ]
    for call in cases:
        with pytest.raises(UserError, match="history"):
            call()


def test_a_closed_action_ends_with_exactly_one_eoa():
    v = ASSETS.vocabulary
    for generated in ([5, 6], [5, 6, v.eoa], [5, 6, v.eoa, 7, v.eoa]):
        assert close_action(v, generated).tolist() == [5, 6, v.eoa]
