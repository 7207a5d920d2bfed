"""Demonstrations of CALVIN's scripts: which can be written, and what they hold."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from tests.simulators.calvin.fake_calvin import open_fake
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.readers import open_reader
from univla_jax.errors import UserError
from univla_jax.simulators.calvin import calvin_demonstrations, calvin_package, calvin_scripts
from univla_jax.simulators.calvin.calvin_demonstrations import (
    DemonstrationScene,
    DemonstrationsConfig,
    demonstrate,
    draw_scene,
    write_demonstrations,
)

COUNTS = {"train_episodes": 1, "val_episodes": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tasks": ("juggle",)},
            "config.tasks: 'juggle', there are scripts for open_drawer, close",
        ),
        ({"tasks": ()}, "config.tasks: '', there are scripts"),
        ({"val_episodes": 0}, "config.val_episodes: 0, expected at least 1"),
        ({"draw_every": 0}, "config.draw_every: 0"),
        ({"push": -0.1}, "config.push: -0.1, expected at least 0 meters"),
        ({"renderer": "pov"}, "config.renderer: 'pov', calvin has egl, tiny"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        DemonstrationsConfig(**COUNTS | changes)


def test_a_folder_that_describes_no_scene_is_named_before_anything_opens(tmp_path):
    with pytest.raises(UserError, match=r"--assets: .* holds no validation"):
        write_demonstrations(DemonstrationsConfig(**COUNTS), tmp_path, assets=str(tmp_path))


def test_scenes_are_drawn_from_what_is_possible():
    scenes = np.stack([draw_scene(np.random.default_rng(seed)) for seed in range(100)])
    sliders, drawers = scenes[:, calvin_scripts.SLIDER], scenes[:, calvin_scripts.DRAWER]
    assert sliders.min() >= 0 and sliders.max() <= calvin_scripts.SLIDER_RANGE
    assert drawers.min() >= 0 and drawers.max() <= calvin_scripts.DRAWER_RANGE
    lit = scenes[:, calvin_scripts.LIGHTBULB]
    np.testing.assert_array_equal(lit * 0.088, scenes[:, calvin_scripts.SWITCH])
    blocks = scenes[:, 6:].reshape(100, 3, 6)[:, :, :2]
    gaps = [
        np.linalg.norm(blocks[:, a] - blocks[:, b], axis=1) for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    assert np.min(gaps) > 0.1  # none inside another
    # In about all of them there is something to do for each of the four things.
    for tasks in (("open_drawer", "close_drawer"), ("move_slider_left", "move_slider_right")):
        assert all(any(calvin_scripts.possible(task, scene) for task in tasks) for scene in scenes)


def _demonstrate(task, *, push=0.0, **options):
    scene = DemonstrationScene(open_fake())
    state = np.zeros(24)
    scene.begin(state)
    config = DemonstrationsConfig(**COUNTS, push=push, **options)
    return scene, demonstrate(scene, task, config, np.random.default_rng(0), "name")


def test_an_episode_is_made_of_chunks_that_a_policy_can_repeat():
    scene, episode = _demonstrate("turn_on_led")
    table = scene.calvin.env
    assert episode.instruction == "turn on led" and episode.corpus == "calvin_sim"
    assert len(episode) % 10 == 0 and episode.actions.shape[1] == 7
    assert episode.frames["image"].shape == (len(episode), 100, 100, 3)
    assert episode.frames["wrist_image"].shape == (len(episode), 42, 42, 3)
    assert episode.state.shape == (len(episode), 15) and episode.state.dtype == np.float32
    # Drawn once per chunk, when the step begins that it is shown with.
    drawn = episode.frames["image"][:, 0, 0, 0]
    np.testing.assert_array_equal(drawn, np.arange(len(episode)) // 10 * 10)
    # What was recorded was executed, until the task was done; the rest repeats the last action.
    executed = np.stack(table.actions)
    assert len(episode) - 10 < len(executed) <= len(episode)
    np.testing.assert_array_equal(episode.actions[: len(executed)], executed.astype(np.float32))
    last = episode.actions[len(executed) :]
    np.testing.assert_array_equal(
        last, np.broadcast_to(executed[-1].astype(np.float32), last.shape)
    )


def test_pushes_are_not_recorded_but_what_brings_the_hand_back():
    _, straight = _demonstrate("move_slider_left")
    scene, pushed = _demonstrate("move_slider_left", push=0.04)
    executed = np.stack(scene.calvin.env.actions)
    recorded = {tuple(action) for action in pushed.actions}
    hidden = [action for action in executed if tuple(action.astype(np.float32)) not in recorded]
    assert hidden and len(hidden) % 4 == 0
    assert np.abs(np.stack(hidden)[:, :3]).max() <= 0.04 / calvin_scripts.METERS / 4
    jumps = np.linalg.norm(np.diff(pushed.state[:, :3], axis=0), axis=1)
    assert jumps.max() > np.linalg.norm(np.diff(straight.state[:, :3], axis=0), axis=1).max()


def test_a_script_without_enough_time_has_failed():
    assert _demonstrate("open_drawer", max_steps=10)[1] is None


def test_the_splits_hold_as_many_of_each_task_and_begin_where_tasks_ended(tmp_path, monkeypatch):
    opened = []

    def open_once(dataset, renderer):
        opened.append((dataset, renderer))
        return open_fake()

    monkeypatch.setattr(calvin_package, "open_calvin", open_once)
    tasks = ("turn_on_led", "turn_off_led")
    config = DemonstrationsConfig(2, 1, tasks=tasks, push=0.01, reduction=8)
    folder = write_demonstrations(config, tmp_path)
    assert folder == write_demonstrations(config, tmp_path) and opened == [(None, "tiny")]
    dataset = find_dataset_config("calvin_sim")
    names = {}
    for split, count in (("train", 2), ("val", 1)):
        reader = open_reader(tmp_path / "calvin_sim", dataset, split)
        names[split] = [episode.episode_id for episode in reader]
        assert collections.Counter(name.split("/")[0] for name in names[split]) == dict.fromkeys(
            tasks, count
        )
    assert {name.split("/")[1][0] for name in names["train"]} == {"0"}
    assert {name.split("/")[1][0] for name in names["val"]} == {"1"}
    assert any(not name.endswith("-0") for name in names["train"])  # not the first of its scene
    with pytest.raises(UserError, match="holds other demonstrations"):
        write_demonstrations(DemonstrationsConfig(3, 1, tasks=tasks), tmp_path)


def test_too_many_failures_end_with_the_remedy(monkeypatch):
    monkeypatch.setattr(calvin_demonstrations, "demonstrate", lambda *args: None)
    config = DemonstrationsConfig(**COUNTS)
    episodes = calvin_demonstrations._Episodes(DemonstrationScene(open_fake()), config, 0, 1)
    with pytest.raises(UserError, match=r"0 of 24 demonstrations .* 8 are needed; lower config"):
        list(episodes)
