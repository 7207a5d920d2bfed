"""The configuration of the input pipeline, and what it refuses."""

from __future__ import annotations

import pytest

from tests.pipeline import small
from univla_jax.errors import UserError
from univla_jax.tasks import TASK_NAMES, task_class
from univla_jax.tasks.base import TaskSettings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "policy_vdeo"}, "data.task: 'policy_vdeo' is not one of"),
        ({"loss_on": "actions"}, "data.loss_on"),
        ({"batch_size": 0}, "data.batch_size: 0, expected at least 1"),
        ({"chunk_size": 0}, "data.chunk_size: 0, expected at least 1"),
        ({"weights": (1.0, 2.0)}, "2 weights for 1 stores"),
        ({"weights": (0.0,)}, "weights are positive"),
        ({"weight_unit": "frame"}, "data.weight_unit"),
        ({"null_prompt_prob": 1.5}, "data.null_prompt_prob"),
        ({"aligned_windows": -0.1}, "data.aligned_windows"),
        ({"state_steps": 0}, "data.state_steps: 0, expected at least 1"),
        ({"held_out_every": 1}, "data.held_out_every"),
        ({"task": "policy_image"}, "shows one moment"),
        ({"task": "world_model", "state": True}, "has no place for it"),
        ({"task": "world_model", "question_first": True}, "asks no question"),
        ({"task": "world_model", "wordless": True}, "needs its instruction"),
        ({"task": "world_model", "max_committed": 2}, "has no place for committed actions"),
        ({"max_committed": -1}, "data.max_committed: -1, expected at least 0"),
        ({"task": "policy_flow", "frames": 1}, "set packing=False"),
        ({"vision_weight": -0.5}, "data.vision_weight: -0.5, expected at least 0"),
        ({"value_weight": -1.0}, "data.value_weight: -1.0, expected at least 0"),
        ({"vision_weight": (1.0, -0.5, 10)}, "data.vision_weight: .* expected at least 0"),
        ({"vision_weight": (1.0, 0.5)}, "a number or \\(start, end, steps\\)"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        small.config(**changes)


def test_a_vision_weight_is_a_number_or_a_schedule():
    assert small.config(vision_weight=0.25).vision_schedule == (0.25, 0.25, 0)
    assert small.config(vision_weight=(1.0, 0.5, 10)).vision_schedule == (1.0, 0.5, 10)


@pytest.mark.parametrize("task", TASK_NAMES)
def test_labels_are_the_tasks_unless_they_are_set(task):
    own = {"frames": 1, "packing": not task_class(task).needs.own_row, "task": task}
    assert small.config(**own).labels == task_class(task).labels
    assert small.config(**own, loss_on="all").labels == "all"
    assert small.config(**own).needs is task_class(task).needs


def test_the_settings_of_the_task_are_fields_of_the_config():
    values = {"frame_spacing": 4, "views": ("b", "a"), "state": True, "aligned_windows": 0.5}
    config = small.config(**values, max_committed=2, state_steps=3)
    assert config.settings == TaskSettings(2, 3, 4, ("b", "a"), False, True, 0.5, 2, state_steps=3)


def test_weights_count_per_episode_or_per_store():
    config = {"stores": ("a", "b"), "weights": (1.0, 2.0)}
    assert small.config(**config).proportions([12, 4], [5, 5]) == [12, 8]
    assert small.config(**config, weight_unit="store").proportions([12, 4], [5, 5]) == [1, 2]
    assert small.config(stores=("a", "b")).proportions([12, 4], [0.5, 2]) == [6, 8]
