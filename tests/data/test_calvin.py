"""CALVIN's folders of npz files."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.data.episodes import read_all
from univla_jax.data.action_conventions import action_field
from univla_jax.data.datasets import DATASETS
from univla_jax.data.episode_reader import DatasetMismatchError
from univla_jax.data.readers import open_reader
from univla_jax.errors import UserError

CONFIG = dataclasses.replace(DATASETS["calvin"], min_frames=3)
SENTENCES = ("push the button", "open the drawer", "lift the block")


def write(folder, frames=30, indices=((0, 9), (5, 16), (17, 29)), annotations=None):
    training = folder / "training"
    (training / "lang_annotations").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(frames):
        np.savez(
            training / f"episode_{number:07d}.npz",
            rgb_static=rng.integers(0, 256, (20, 20, 3), np.uint8),
            rgb_gripper=rng.integers(0, 256, (8, 8, 3), np.uint8),
            rel_actions=np.full(7, number, np.float64),
            actions=np.zeros(7),
            robot_obs=np.full(15, number, np.float64),
            scene_obs=np.zeros(24),
        )
    table = annotations or {
        "language": {"ann": list(SENTENCES), "task": ["a", "b", "c"], "emb": np.zeros((3, 1, 4))},
        "info": {"episodes": [], "indx": list(indices)},
    }
    np.save(training / "lang_annotations" / "auto_lang_ann.npy", table, allow_pickle=True)


def source(folder, split="train"):
    return open_reader(folder, DATASETS["calvin"], split)


def test_annotated_stretches_are_episodes(tmp_path):
    write(tmp_path)
    read = source(tmp_path)
    episodes = list(read)
    assert [e.instruction for e in episodes] == list(SENTENCES)
    assert [len(e) for e in episodes] == [10, 12, 13]
    np.testing.assert_array_equal(episodes[1].actions[:, 0], np.arange(5, 17))
    assert episodes[1].state.shape == (12, 15)
    assert episodes[1].frames["image"].shape == (12, 20, 20, 3)
    assert episodes[1].frames["wrist_image"].shape == (12, 8, 8, 3)
    assert read.episode_id(2) == episodes[2].episode_id == "train/0000017-0000029"


def test_splits_can_be_cut(tmp_path):
    write(tmp_path)
    assert len(source(tmp_path, "train[:67%]")) == 2
    assert source(tmp_path, "train[2:]")[0].instruction == SENTENCES[2]
    for split, message in (("validation", "no split 'validation'; it has train"), ("t[", "t")):
        with pytest.raises(UserError, match=message):
            source(tmp_path, split)
    with pytest.raises(UserError, match="holds no episodes"):
        source(tmp_path, "train[3:]")


def test_damage_is_named(tmp_path):
    write(tmp_path)
    read = source(tmp_path)
    frame = tmp_path / "training" / "episode_0000003.npz"
    frame.write_bytes(frame.read_bytes()[:300])
    with pytest.raises(UserError, match=r"episode_0000003.npz is damaged"):
        read[0]
    frame.unlink()
    with pytest.raises(UserError, match=r"no frame .*episode_0000003.npz"):
        read[0]
    assert len(read[2]) == 13
    with pytest.raises(UserError, match="is no CALVIN dataset"):
        source(tmp_path / "training")


def test_annotations_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    write(tmp_path, annotations={"language": Evil()})
    with pytest.raises(UserError, match=r"no annotation table: .*it holds .*print"):
        source(tmp_path)


# ----------------------------------------------------------------------------
# Damage breaks the episodes that show it, and no others.


def change_frame(folder, number, **changes):
    path = folder / "training" / f"episode_{number:07d}.npz"
    with np.load(path) as stored:
        arrays = {**stored, **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def flip_in_data(folder, number):
    path = folder / "training" / f"episode_{number:07d}.npz"
    data = bytearray(path.read_bytes())
    data[data.index(b"rel_actions.npy") + 200] ^= 4
    path.write_bytes(data)


FRAMES = {
    "another picture size": (
        lambda folder: change_frame(folder, 7, rgb_static=np.zeros((9, 9, 3), np.uint8)),
        "must have the same shape",
    ),
    "a picture of floats": (
        lambda folder: change_frame(folder, 7, rgb_static=np.zeros((20, 20, 3))),
        "expected uint8",
    ),
    "a field that is missing": (
        lambda folder: change_frame(folder, 7, robot_obs=None),
        "no item named 'robot_obs.npy'",
    ),
    "objects instead of numbers": (
        lambda folder: change_frame(folder, 7, rel_actions=np.array([None] * 7)),
        "Object arrays cannot be loaded",
    ),
    "fewer numbers": (
        lambda folder: change_frame(folder, 7, rel_actions=np.zeros(6)),
        "must have the same shape",
    ),
    "words": (
        lambda folder: change_frame(folder, 7, rel_actions=np.array(["a"] * 7)),
        "actions holds <U",
    ),
    "NaN": (
        lambda folder: change_frame(folder, 7, rel_actions=np.full(7, np.nan)),
        "action of step 2 is not finite",
    ),
    "a flipped bit": (lambda folder: flip_in_data(folder, 7), "Bad CRC-32"),
}


@pytest.mark.parametrize("case", FRAMES)
def test_a_damaged_frame_breaks_its_episode_alone(tmp_path, case):
    change, reason = FRAMES[case]
    write(tmp_path)
    change(tmp_path)
    valid, invalid = read_all(tmp_path, CONFIG)
    # Two episodes show frame 7.
    assert sorted(valid) == ["train/0000017-0000029"]
    assert sorted(invalid) == ["train/0000000-0000009", "train/0000005-0000016"]
    assert reason in invalid["train/0000005-0000016"][0]


ANNOTATIONS = {
    "backwards": ((9, 0), "push", "frames 9 to 0"),
    "before the beginning": ((-3, 4), "push", "frames -3 to 4"),
    "without end": ((0, 10**9), "push", "frames 0 to 1000000000"),
    "no numbers": ((0.5, 4.0), "push", "'float' object cannot be"),
    "one number": ((4,), "push", "not enough values"),
    "nothing": (None, "push", "the annotation is damaged"),
    "no sentence": ((0, 9), 7, "int 7 instead of a text"),
    "printed sentence": ((0, 9), "['push']", "printed Python object"),
}


@pytest.mark.parametrize("case", ANNOTATIONS)
def test_a_damaged_annotation_breaks_its_episode_alone(tmp_path, case):
    limits, sentence, reason = ANNOTATIONS[case]
    table = {
        "language": {"ann": [SENTENCES[0], sentence, SENTENCES[2]]},
        "info": {"indx": [(0, 9), limits, (17, 29)]},
    }
    write(tmp_path, annotations=table)
    valid, invalid = read_all(tmp_path, CONFIG)
    assert sorted(valid) == ["train/0000000-0000009", "train/0000017-0000029"]
    assert list(invalid) == ["train/annotation-000001"]
    assert reason in invalid["train/annotation-000001"][0]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"views": {"image": "rgb_top"}}, "rgb_top"),
        ({"state": "robot"}, "robot"),
        ({"actions": action_field("actions_abs")}, "actions_abs"),
        ({"episode_filters": {"success": True}}, "success"),
    ],
)
def test_a_field_that_no_frame_has_ends_before_the_pass(tmp_path, changes, field):
    write(tmp_path)
    with pytest.raises(DatasetMismatchError, match=f"no field '{field}' in .*; it has actions"):
        open_reader(tmp_path, dataclasses.replace(CONFIG, **changes), "train")[0]
