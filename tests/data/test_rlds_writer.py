"""What is written is a real TFDS dataset, and reads back to the last bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.data import published
from tests.data.episodes import DATASET, assert_same, make_episode
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.rlds import RldsReader
from univla_jax.data.rlds_writer import RecordedEpisode, successes, write_rlds
from univla_jax.errors import UserError


def test_tfds_opens_it(tmp_path):
    episodes = [make_episode(i) for i in range(3)]
    folder = write_rlds(
        tmp_path, "blocks", "1.2.0", {"train": episodes}, description="made up", progress=False
    )
    builder = tfds.builder_from_directory(folder)
    assert (builder.info.name, str(builder.info.version)) == ("blocks", "1.2.0")
    assert builder.info.description == "made up"
    assert builder.info.splits["train"].num_examples == 3
    first = builder.as_data_source("train")[0]
    assert first["episode_metadata"]["episode_id"] == b"blocks-0"
    steps = list(first["steps"])
    assert [s["is_first"] for s in steps] == [True, False, False]
    assert [s["is_last"] for s in steps] == [s["is_terminal"] for s in steps]
    assert [float(s["reward"]) for s in steps] == [0.0, 0.0, 1.0]
    assert {float(s["discount"]) for s in steps} == {1.0}
    assert steps[1]["language_instruction"] == b"push block 0"
    np.testing.assert_array_equal(steps[2]["observation"]["image"], episodes[0].frames["image"][2])
    np.testing.assert_array_equal(steps[1]["action"], episodes[0].actions[1])
    np.testing.assert_array_equal(steps[1]["observation"]["state"], episodes[0].state[1])


def test_more_sensors_give_the_published_fields_of_libero(tmp_path):
    plain = make_episode(0, steps=4, state=np.zeros((4, 8), np.float32), corpus="libero_goal")
    joints = np.arange(28, dtype=np.float32).reshape(4, 7)
    values = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
    values["frames"] = dict.fromkeys(("image", "wrist_image"), plain.frames["image"])
    episode = RecordedEpisode(**values, sensors={"joint_state": joints})
    folder = write_rlds(
        tmp_path,
        "libero_goal",
        "1.0.0",
        {"train": [episode]},
        image_format="jpeg",
        id_field="file_path",
        progress=False,
    )
    made = tfds.builder_from_directory(folder).info.features["steps"].feature
    observation, action, _ = published.STRUCTURES["libero_spatial"]
    assert {k: repr(v) for k, v in made["observation"].items()} == {
        name: repr(feature) for name, feature in observation.items()
    }
    assert repr(made["action"]) == repr(action)
    (record,) = tfds.builder_from_directory(folder).as_data_source("train")
    assert record["episode_metadata"] == {"file_path": b"blocks-0"}
    np.testing.assert_array_equal(list(record["steps"])[2]["observation"]["joint_state"], joints[2])
    (read,) = RldsReader(folder, find_dataset_config("libero_goal"), "train")
    np.testing.assert_array_equal(read.actions, episode.actions)


def test_reads_back_over_several_shards(tmp_path):
    train, val = [make_episode(i) for i in range(5)], [make_episode(9)]
    folder = write_rlds(
        tmp_path, "blocks", "1.0.0", {"train": train, "val": val}, shard_bytes=4000, progress=False
    )
    assert len(list(folder.glob("blocks-train.array_record-*"))) > 1
    for split, episodes in {"train": train, "val": val}.items():
        source = RldsReader(folder, DATASET, split)
        assert len(source) == len(episodes)
        for got, want in zip(source, episodes):
            assert_same(got, want)


def test_tfrecord_reads_back_the_same(tmp_path):
    pytest.importorskip("tensorflow")
    episodes = [make_episode(i) for i in range(3)]
    folder = write_rlds(
        tmp_path, "blocks", "1.0.0", {"train": episodes}, file_format="tfrecord", progress=False
    )
    for got, want in zip(RldsReader(folder, DATASET, "train"), episodes, strict=True):
        assert_same(got, want)


def test_a_complete_dataset_is_left_alone_and_an_interrupted_one_replaced(tmp_path):
    def interrupted():
        yield make_episode(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rlds(tmp_path, "blocks", "1.0.0", {"train": interrupted()}, progress=False)
    with pytest.raises(UserError, match="no TFDS dataset"):
        RldsReader(tmp_path, DATASET, "train")
    episodes = [make_episode(1)]
    folder = write_rlds(tmp_path, "blocks", "1.0.0", {"train": episodes}, progress=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert [path.name for path in folder.parent.iterdir()] == ["1.0.0"]
    write_rlds(tmp_path, "blocks", "1.0.0", {"train": interrupted()}, progress=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_episodes_must_fit_the_first(tmp_path):
    odd = make_episode(1, size=(8, 8))
    with pytest.raises(UserError, match="blocks-1: image sizes"):
        write_rlds(tmp_path, "b", "1.0.0", {"train": [make_episode(0), odd]}, progress=False)
    blind = make_episode(1, state=None)
    with pytest.raises(UserError, match="dimensions"):
        write_rlds(tmp_path, "b", "1.0.0", {"train": [make_episode(0), blind]}, progress=False)
    with pytest.raises(UserError, match="no episodes"):
        write_rlds(tmp_path, "b", "1.0.0", {"train": []}, progress=False)
    with pytest.raises(UserError, match="at least one split"):
        write_rlds(tmp_path, "b", "1.0.0", {}, progress=False)
    with pytest.raises(UserError, match="file_format"):
        write_rlds(tmp_path, "b", "1.0.0", {}, file_format="csv")


def test_open_sizes_and_no_state(tmp_path):
    episodes = [make_episode(i, size=(8 * (i + 1), 8), state=None) for i in range(2)]
    folder = write_rlds(
        tmp_path, "b", "1.0.0", {"train": episodes}, fixed_sizes=False, progress=False
    )
    source = RldsReader(folder, dataclasses.replace(DATASET, state=None), "train")
    assert source.image_sizes == {"image": None, "wrist_image": None}
    assert [e.frames["image"].shape[1] for e in source] == [8, 16]


def test_demonstrations_that_fail_are_made_up_for_and_no_further_ones_are_made():
    made = []

    def attempts():
        for number in range(6):
            made.append(number)
            yield make_episode(number) if number % 2 else None

    options = {"most": 6, "name": "lift", "remedy": "push less"}
    found = list(successes(attempts(), 2, **options))
    assert [e.episode_id for e in found] == [make_episode(i).episode_id for i in (1, 3)]
    assert made == [0, 1, 2, 3]
    with pytest.raises(
        UserError, match="lift: 3 of 6 demonstrations succeeded, 4 are needed; push"
    ):
        list(successes(attempts(), 4, **options))
