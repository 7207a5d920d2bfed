"""What a video policy remembers between calls."""

from __future__ import annotations

import numpy as np
import pytest

from tests.parity import assert_parity
from tests.pipeline import small
from tests.sequences.spelling import ASSETS, FRAME, chunk, code, spell
from univla_jax.errors import UserError
from univla_jax.tasks.history import EpisodeLog, History, close_action

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


def _moment(number):
    return np.array([100 + number], np.int32)


def _encode(actions):
    """Ids that spell the actions: twice their values."""
    return (2 * actions[:, 0]).astype(np.int32)


def _actions(*values):
    return np.array(values, np.float32)[:, None]


def _prompt(log, number):
    history = log.history(_encode).observe(_moment(number))
    return history.prompt(np.array([0], np.int32)).tolist()


def test_a_part_of_each_chunk_is_remembered_as_what_was_executed():
    """Two of four steps per call: observations four steps apart, both calls' actions between."""
    log, prompts = EpisodeLog(window=2, chunk_size=4), []
    for number in range(4):
        first, second = 2 * number + 1, 2 * number + 2
        prompts.append(_prompt(log, number))
        log = log.call(_moment(number), np.array([-1], np.int32), _actions(first, second, 9, 9))
        log = log.execute(_actions(first, second))
    assert prompts[:2] == [[0, 100], [0, 101]]
    assert prompts[2] == [0, 100, 2, 4, 6, 8, 102]
    assert prompts[3] == [0, 101, 6, 8, 10, 12, 103]
    assert len(log.calls) <= 2 and len(log.executed) == 4


def test_a_chunk_executed_as_answered_keeps_its_ids_and_another_does_not():
    log = EpisodeLog(window=3, chunk_size=2)
    log = log.call(_moment(0), np.array([-1], np.int32), _actions(1, 2)).execute(_actions(1, 2))
    assert _prompt(log, 1) == [0, 100, -1, 101]
    log = log.call(_moment(1), np.array([-2], np.int32), _actions(3, 4)).execute(_actions(3, 5))
    assert _prompt(log, 2) == [0, 100, -1, 101, 6, 10, 102]


def test_the_history_begins_anew_where_observations_are_not_a_chunk_apart():
    log = EpisodeLog(window=2, chunk_size=4)
    log = log.call(_moment(0), np.array([-1], np.int32), _actions(1, 2, 3, 4))
    log = log.execute(_actions(1, 2, 3))
    assert _prompt(log, 1) == [0, 101]
    log = log.call(_moment(1), np.array([-2], np.int32), _actions(5, 6, 7, 8))
    assert _prompt(log.execute(_actions(5)), 2) == [0, 100, 2, 4, 6, 10, 102]
    assert _prompt(log.execute(_actions(5, 6, 7, 8)), 3) == [0, 101, -2, 103]


def test_an_image_policy_logs_nothing_but_its_steps():
    log = EpisodeLog(window=1, chunk_size=2)
    log = log.call(_moment(0), np.array([-1], np.int32), _actions(1, 2)).execute(_actions(1, 2))
    assert (log.step, log.calls, log.executed) == (2, (), None) and _prompt(log, 1) == [0, 101]
