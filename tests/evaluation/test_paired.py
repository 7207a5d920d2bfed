"""Paired comparison of two evaluations."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.errors import UserError
from univla_jax.evaluation.paired import check_same_states, clustered_interval, compare, mcnemar


def _records(outcomes):
    """Records of ``{task: successes by trial}``."""
    return [
        {"number": number, "trial": trial, "task": f"task {number}", "success": bool(success)}
        for number, successes in outcomes.items()
        for trial, success in enumerate(successes)
    ]


def test_only_shared_episodes_are_compared():
    first = _records({0: [1, 1, 0, 0], 1: [1, 0], 2: [1, 1, 1]})
    second = _records({0: [1, 0, 1, 1], 1: [1, 1, 1, 1], 3: [0, 0]})
    found = compare(first, second)
    assert [(name, a["successes"], b["successes"]) for name, a, b in found["tasks"]] == [
        ("task 0", 2, 3),
        ("task 1", 1, 2),
        ("all", 3, 5),
    ]
    assert found["pairs"] == 6 and found["unpaired"] == [3, 4]
    assert (found["only_first"], found["only_second"]) == (1, 3)
    assert found["difference"] == pytest.approx(2 / 6, abs=1e-4)
    assert found["low"] <= found["difference"] <= found["high"]


def test_a_task_whose_episode_was_lost_keeps_its_name():
    lost = {"number": 0, "trial": 0, "task": "0", "success": False, "error": "gone"}
    first = [lost, {**lost, "trial": 1, "task": "open the drawer"} | {"error": ""}]
    del first[1]["error"]
    found = compare(first, _records({0: [1, 1]}))
    assert found["tasks"][0][0] == "open the drawer" and found["only_second"] == 2


def test_nothing_shared_or_other_states_are_refused():
    with pytest.raises(UserError, match="share no episode"):
        compare(_records({0: [1]}), _records({1: [1]}))
    check_same_states({"suite": "a", "max_steps": 3}, {"suite": "a", "max_steps": 4})
    with pytest.raises(UserError, match="first_seed is 0 in A and 100 in B"):
        check_same_states({"first_seed": 0}, {"first_seed": 100})


def test_mcnemars_exact_test():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 6) == mcnemar(6, 0) == pytest.approx(2 / 2**6)
    assert mcnemar(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 2**10, abs=1e-6)
    assert mcnemar(0, 100) == pytest.approx(2.0**-99, rel=1e-5)  # not rounded away


def test_tasks_are_drawn_whole():
    """Ten tasks of one outcome each tell as little as ten episodes, however many they repeat."""
    outcome = np.arange(10) % 2.0
    few = clustered_interval(outcome, np.arange(10))
    many = clustered_interval(np.repeat(outcome, 50), np.repeat(np.arange(10), 50))
    assert few == many and few[1] - few[0] > 0.5
    independent = clustered_interval(np.repeat(outcome, 50), np.zeros(500, int))
    assert independent[1] - independent[0] < 0.12
