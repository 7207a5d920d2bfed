"""HDF5 episodes of ACT and robomimic."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.data.episodes import read_all
from tests.data.test_image_decoding import encode
from univla_jax.data.action_conventions import action_field
from univla_jax.data.datasets import DatasetConfig
from univla_jax.data.episode_reader import DatasetMismatchError
from univla_jax.data.readers import open_reader
from univla_jax.errors import UserError

h5py = pytest.importorskip("h5py")

ACT = DatasetConfig(
    "act",
    views={"cam_high": "observations/images/cam_high"},
    image_sizes={"cam_high": (16, 24)},
    control_hz=50.0,
    frame_spacing=50,
    instruction=("folder",),
    state="observations/qpos",
    min_frames=3,
    reader="hdf5",
)
ROBOMIMIC = dataclasses.replace(
    ACT,
    views={"cam_high": "obs/agentview_rgb"},
    instruction=("language_instruction",),
    actions=action_field("actions"),
    state="obs/joint_states",
)
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 5, 16, 24, 3), np.uint8)


def padded(frames):
    """JPEG-like rows of one length, as ACT pads them."""
    rows = [np.frombuffer(encode(frame), np.uint8) for frame in frames]
    width = max(map(len, rows))
    return np.stack([np.pad(row, (0, width - len(row))) for row in rows])


def write_act(folder, count=12, images=lambda frames: frames, **changes):
    folder = folder / "fold_the_towel"
    folder.mkdir(parents=True)
    for number in range(count):
        with h5py.File(folder / f"episode_{number}.hdf5", "w") as file:
            file.attrs["sim"] = False
            file.attrs["success"] = number != 4
            fields = {
                "action": np.full((5, 14), number, np.float32),
                "observations/qpos": np.zeros((5, 14)),
                "observations/images/cam_high": images(PIXELS[number]),
            }
            if number == 2:
                fields |= changes
            for path, values in fields.items():
                if values is not None:
                    file.create_dataset(path, data=values)
    return folder.parent


@pytest.mark.parametrize("images", [lambda frames: frames, padded])
def test_the_episodes_of_act_are_read(tmp_path, images):
    write_act(tmp_path, images=images)
    valid, invalid = read_all(tmp_path, ACT)
    assert not invalid and list(valid) == [f"fold_the_towel/episode_{n}" for n in range(12)]
    for number, episode in enumerate(valid.values()):
        np.testing.assert_array_equal(episode.frames["cam_high"], PIXELS[number])
        assert (episode.actions == number).all() and episode.state.shape == (5, 14)
        assert episode.instruction == "fold the towel"
    assert len(open_reader(tmp_path, ACT, "train[:50%]")) == 6


def test_rows_of_any_length_are_images(tmp_path):
    write_act(tmp_path, count=3)
    for number in range(3):
        with h5py.File(tmp_path / f"fold_the_towel/episode_{number}.hdf5", "a") as file:
            path = ACT.views["cam_high"]
            del file[path]
            rows = file.create_dataset(path, (5,), h5py.vlen_dtype(np.uint8))
            for step, frame in enumerate(PIXELS[number]):
                rows[step] = np.frombuffer(encode(frame), np.uint8)
    valid, invalid = read_all(tmp_path, ACT)
    assert not invalid
    np.testing.assert_array_equal(valid["fold_the_towel/episode_2"].frames["cam_high"], PIXELS[2])


def test_the_demos_of_robomimic_are_read(tmp_path):
    with h5py.File(tmp_path / "pick.hdf5", "w") as file:
        file["data"] = h5py.SoftLink("/none")
        del file["data"]
        for number in range(11):
            demo = file.create_group(f"data/demo_{number}")
            demo.attrs["language_instruction"] = f"pick {number}"
            demo["actions"] = np.full((5, 7), number, np.float64)
            demo["obs/agentview_rgb"] = PIXELS[number]
            demo["obs/joint_states"] = np.zeros((5, 7))
    valid, invalid = read_all(tmp_path, ROBOMIMIC)
    assert not invalid and list(valid) == [f"pick/demo_{n}" for n in range(11)]
    episode = valid["pick/demo_10"]
    assert episode.instruction == "pick 10" and (episode.actions == 10).all()


FIELDS = {
    "no actions": ({"action": None}, "object 'action' doesn't exist"),
    "fewer actions": ({"action": np.zeros((4, 14))}, "4 actions for 5 steps"),
    "other actions": ({"action": np.full((5, 14), np.nan)}, "step 0 is not finite"),
    "words": ({"action": np.array([b"a"] * 5)}, "actions holds"),
    "pictures of another size": (
        {"observations/images/cam_high": np.zeros((5, 8, 8, 3), np.uint8)},
        "expected uint8[5, 16, 24, 3]",
    ),
    "pictures of floats": (
        {"observations/images/cam_high": np.zeros((5, 16, 24, 3))},
        "is float64",
    ),
    "broken pictures": (
        {"observations/images/cam_high": np.zeros((5, 100), np.uint8)},
        "the image of step 0 is damaged",
    ),
    "a state of matrices": ({"observations/qpos": np.zeros((5, 2, 2))}, "has the shape [5, 2, 2]"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_damaged_field_breaks_its_episode_alone(tmp_path, case):
    changes, reason = FIELDS[case]
    write_act(tmp_path, count=4, **changes)
    valid, invalid = read_all(tmp_path, ACT)
    assert list(valid) == [f"fold_the_towel/episode_{n}" for n in (0, 1, 3)]
    assert reason in invalid["fold_the_towel/episode_2"][0]


FILES = {
    "cut short": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "words": lambda data: b"no file of this format",
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("number", [0, 2])
def test_a_damaged_file_breaks_its_episode_alone(tmp_path, case, number):
    write_act(tmp_path, count=4)
    path = tmp_path / f"fold_the_towel/episode_{number}.hdf5"
    path.write_bytes(FILES[case](path.read_bytes()))
    valid, invalid = read_all(tmp_path, ACT)
    assert len(valid) == 3
    assert "is damaged" in invalid[f"fold_the_towel/episode_{number}"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": {"cam_high": "observations/images/top"}}, "no field 'observations/images/top'"),
        ({"views": {"cam_high": "observations/qpos"}}, "expected 8-bit images"),
        ({"state": "qpos"}, "no field 'qpos' in .*; it has action"),
        ({"actions": action_field("actions")}, "no field 'actions'"),
        ({"instruction": ("task",)}, "no field 'task'"),
        ({"episode_filters": {"good": True}}, "no field 'good'"),
    ],
)
def test_a_config_that_does_not_fit_ends_before_the_pass(tmp_path, changes, message):
    write_act(tmp_path, count=2)
    with pytest.raises(DatasetMismatchError, match=message):
        open_reader(tmp_path, dataclasses.replace(ACT, **changes), "train")[0]


def test_attributes_filter_episodes(tmp_path):
    write_act(tmp_path, count=6)
    valid, invalid = read_all(tmp_path, dataclasses.replace(ACT, episode_filters={"success": True}))
    assert len(valid) == 5
    assert invalid["fold_the_towel/episode_4"] == ("success is False, not True", "episode_filters")


def test_a_folder_without_files_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no HDF5 files"):
        open_reader(tmp_path, ACT, "train")
