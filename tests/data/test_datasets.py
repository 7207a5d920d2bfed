"""The dataset registry, and every built-in RLDS dataset read in its published structure."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.data import published
from tests.data.episodes import DATASET, make_episode
from univla_jax.data import action_conventions, datasets
from univla_jax.data.datasets import (
    DATASETS,
    build_episode,
    find_dataset_config,
    register_dataset,
)
from univla_jax.data.readers import open_reader
from univla_jax.errors import UserError


def test_datasets_are_found_by_name():
    assert all(find_dataset_config(name).name == name for name in DATASETS)


def test_a_mistyped_name_is_corrected():
    with pytest.raises(UserError, match="did you mean 'libero_goal'"):
        find_dataset_config("libero_gaol")
    with pytest.raises(UserError, match="known: tabletop"):
        find_dataset_config("qqq")


def test_a_dataset_can_be_registered_again_but_replaces_no_built_in_one(monkeypatch):
    monkeypatch.setattr(datasets, "DATASETS", dict(DATASETS))
    register_dataset(DATASET)
    register_dataset(dataclasses.replace(DATASET, min_frames=7))
    assert find_dataset_config("blocks").min_frames == 7
    with pytest.raises(UserError, match="'droid' is built in"):
        register_dataset(dataclasses.replace(DATASET, name="droid"))


def test_views_can_be_chosen():
    assert list(DATASET.with_views(["wrist_image"]).views) == ["wrist_image"]
    with pytest.raises(UserError, match="no view 'top'; it has image, wrist_image"):
        DATASET.with_views(["image", "top"])


def test_an_unknown_reader_is_named(tmp_path):
    with pytest.raises(UserError, match="reader 'csv' is not one of rlds, calvin"):
        open_reader(tmp_path, dataclasses.replace(DATASET, reader="csv"), "train")


TRIMMED = {"bridge": 2}
SIGNED = ("libero", "libero_spatial", "libero_10", "fmb", "maniskill", "cmu_play_fusion")


@pytest.mark.parametrize("name", published.STRUCTURES)
def test_the_published_structure_is_read(name, tmp_path):
    published.write(tmp_path / name, name)
    dataset = DATASETS[name]
    source = open_reader(tmp_path / name, dataset, "train")
    (episode,) = source
    steps = 14 - TRIMMED.get(name, 0)
    dimensions = 8 if name == "cmu_play_fusion" else 7
    assert episode.actions.shape == (steps, dimensions) and episode.actions.dtype == np.float32
    assert {v: f.shape for v, f in episode.frames.items()} == {
        view: (steps, 16, 24, 3) for view in dataset.views
    }
    assert episode.instruction == "pick up the cup" and episode.corpus == name
    assert (episode.state is None) == (dataset.state is None)
    assert episode.state is None or len(episode.state) == steps
    gripper = episode.actions[:, 6]
    if name not in SIGNED:
        assert gripper.min() >= 0 and gripper.max() <= 1
    assert set(dataset.image_sizes) == set(dataset.views)


def test_every_rlds_dataset_has_a_structure_here():
    rlds = {name for name, dataset in DATASETS.items() if dataset.reader == "rlds"}
    written_here = {"tabletop", "aloha_sim", "calvin_sim"}
    assert rlds - set(published.STRUCTURES) == {*written_here, "libero_object", "libero_goal"}


def test_bridge_takes_the_reached_movement(tmp_path):
    made = published.write(tmp_path / "bridge", "bridge")
    (episode,) = open_reader(tmp_path / "bridge", DATASETS["bridge"], "train")
    states = np.stack([step["observation"]["state"] for step in made])
    np.testing.assert_allclose(episode.actions[:, :6], np.diff(states[1:, :6], axis=0), atol=1e-6)
    np.testing.assert_array_equal(episode.state, states[1:-1])


def test_droid_takes_velocities_and_an_open_gripper_is_1(tmp_path):
    made = published.write(tmp_path / "droid", "droid")
    (episode,) = open_reader(tmp_path / "droid", DATASETS["droid"], "train")
    velocity = np.stack([step["action_dict"]["cartesian_velocity"] for step in made])
    closed = np.stack([step["action_dict"]["gripper_position"] for step in made])[:, 0]
    np.testing.assert_allclose(episode.actions[:, :6], velocity, atol=1e-6)
    decided = (closed < 0.05) | (closed > 0.95)
    np.testing.assert_array_equal(episode.actions[decided, 6], (closed < 0.05)[decided])
    assert decided.sum() > 3


def test_cmu_play_fusion_has_no_terminate(tmp_path):
    made = published.write(tmp_path / "cmu", "cmu_play_fusion")
    (episode,) = open_reader(tmp_path / "cmu", DATASETS["cmu_play_fusion"], "train")
    commands = np.stack([step["action"] for step in made])
    np.testing.assert_array_equal(episode.actions, commands[:, :8])


STEPS = {"action": np.arange(84, dtype=np.float64).reshape(12, 7)} | {
    "language_instruction": np.array(["lift"] * 12, object)
}


def test_images_with_blue_first_are_turned():
    frames = make_episode(0, steps=12).frames
    dataset = dataclasses.replace(DATASET, state=None, bgr_views=("wrist_image",))
    made = build_episode(dataset, STEPS, frames, "0")
    np.testing.assert_array_equal(made.frames["image"], frames["image"])
    np.testing.assert_array_equal(made.frames["wrist_image"], frames["wrist_image"][..., ::-1])
    assert dataset.with_views(["image"]).bgr_views == ()
    turned = {name: DATASETS[name].bgr_views for name in DATASETS if DATASETS[name].bgr_views}
    both = ("image", "wrist_image")
    assert turned == {"utaustin_mutex": both, "berkeley_autolab_ur5": ("wrist_image",)}


def test_a_stride_keeps_every_so_many_th_step_that_is_left():
    frames = make_episode(0, steps=12).frames
    dataset = dataclasses.replace(
        DATASET,
        state=None,
        trim=(1, 0),
        frame_stride=4,
        actions=lambda steps: steps["action"][1:],
    )
    made = build_episode(dataset, STEPS, frames, "0")
    np.testing.assert_array_equal(made.frames["image"], frames["image"][[1, 5, 9]])
    np.testing.assert_array_equal(made.actions, np.float32(STEPS["action"][[1, 5, 9]]))
    assert made.control_hz == DATASET.control_hz / 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bgr_views": ("top",)}, "bgr_views: dataset 'blocks' has no view 'top'"),
        ({"policy_views": ("image", "top")}, "policy_views: .*'top'"),
        ({"world_model_views": ("top",)}, "world_model_views: .*'top'"),
        ({"normalization": ("quantile",)}, "normalization 'quantile' is not one of quantiles"),
        ({"frame_stride": 0}, "frame_stride 0 is below 1"),
    ],
)
def test_rows_that_cannot_work_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(DATASET, **changes)


def test_every_built_in_row_says_what_its_actions_are():
    # No gripper, a part of the episodes without, and cars.
    without = {"tabletop", "fmb", "navsim", "road"}
    for dataset in datasets._BUILT_IN:
        if dataset.actions is not action_conventions.no_actions:
            assert dataset.action_units and (dataset.gripper or dataset.name in without), dataset


def test_droid_takes_the_first_instruction_there_is(tmp_path):
    options = {"instruction": "stack the blocks", "blank": ("language_instruction",)}
    published.write(tmp_path / "droid", "droid", **options)
    (episode,) = open_reader(tmp_path / "droid", DATASETS["droid"], "train")
    assert episode.instruction == "stack the blocks" and not episode.paraphrases
    assert episode.metadata == {"file": "somewhere"}


def test_instructions_beside_the_first_are_paraphrases():
    paths = ("language_instruction", "language_instruction_2", "language_instruction_3")
    dataset = dataclasses.replace(DATASET, instruction=paths, state=None)
    texts = ("", "lift the cup", "lift the cup", "raise it")
    paths = (*paths, "language_instruction_4")
    steps = {path: np.array([text] * 4, object) for path, text in zip(paths, texts)}
    steps["action"] = np.zeros((4, 7))
    frames = make_episode(0, steps=4).frames
    made = build_episode(dataclasses.replace(dataset, instruction=paths), steps, frames, "0")
    assert (made.instruction, made.paraphrases) == ("lift the cup", ("raise it",))


def test_weights_spacings_and_sizes_of_the_world_model_mixture():
    expected = {
        "fractal": (0.3, 3, (192, 240)),
        "droid": (0.2, 15, (144, 256)),
        "bridge": (1.0, 5, (256, 256)),
        "toto": (1.0, 20, (256, 256)),
        "taco_play": (1.0, 5, (256, 256)),
        "fmb": (1.0, 5, (256, 256)),
        "maniskill": (0.5, 10, (256, 256)),
        "kuka": (0.1, 3, (256, 256)),
        "berkeley_autolab_ur5": (1.0, 5, (256, 256)),
        "cmu_play_fusion": (1.0, 10, (256, 256)),
        "viola": (1.0, 15, (256, 256)),
        "utaustin_mutex": (1.0, 10, (256, 256)),
        "something_something": (1.0, 1, (256, 256)),
        "1x": (1.0, 1, (256, 256)),
    }
    for name, values in expected.items():
        dataset = DATASETS[name]
        first = dataset.image_sizes[next(iter(dataset.views))]
        assert (dataset.mixture_weight, dataset.frame_spacing, first) == values, name
    assert (DATASETS["calvin"].mixture_weight, DATASETS["calvin"].frame_spacing) == (0.8, 10)
    assert DATASETS["libero"].frame_spacing == 10
