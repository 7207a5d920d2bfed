"""The RLDS reader: splits, other field names, and damaged folders."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.data.episodes import DATASET, assert_same, make_episode
from univla_jax.data import rlds
from univla_jax.data.episode_reader import DatasetMismatchError
from univla_jax.data.rlds_writer import write_rlds
from univla_jax.errors import UserError

EPISODES = [make_episode(i) for i in range(5)]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    splits = {"train": EPISODES[:4], "val": EPISODES[4:]}
    return write_rlds(tmp_path_factory.mktemp("rlds"), "blocks", "1.0.0", splits, progress=False)


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "blocks" / "1.0.0")


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", [0, 1, 2, 3]),
        ("train[50%:]", [2, 3]),
        ("val", [4]),
    ],
)
def test_reads_a_split(original, split, expected):
    read = list(rlds.RldsReader(original, DATASET, split))
    assert [e.episode_id for e in read] == [f"blocks-{i}" for i in expected]
    assert_same(read[0], EPISODES[expected[0]])


def test_only_the_views_asked_for_are_read(original):
    dataset = dataclasses.replace(DATASET, views={"hand": "observation/wrist_image"}, state=None)
    episode = rlds.RldsReader(original, dataset, "train")[1]
    np.testing.assert_array_equal(episode.frames["hand"], EPISODES[1].frames["wrist_image"])
    assert list(episode.frames) == ["hand"] and episode.state is None


def test_an_action_function_sees_every_field(original):
    dataset = dataclasses.replace(
        DATASET, actions=lambda steps: steps["action"][:, :2] + steps["observation/state"][:, :2]
    )
    episode = rlds.RldsReader(original, dataset, "train")[0]
    np.testing.assert_allclose(
        episode.actions, EPISODES[0].actions[:, :2] + EPISODES[0].state[:, :2], rtol=1e-6
    )


def test_tensorflow_is_not_imported(original):
    program = (
        "import sys; from tests.data.episodes import DATASET; from univla_jax.data import rlds;"
        f"print(len(list(rlds.RldsReader({str(original)!r}, DATASET, 'train'))),"
        "'tensorflow' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.stdout.split() == ["4", "False"], result.stderr


def first_shard(folder):
    return next(folder.glob("*train*"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-2000])


BREAKAGES = {
    "no dataset folder": lambda folder: shutil.rmtree(folder.parent.parent),
    "holds no TFDS dataset": lambda folder: shutil.rmtree(folder),
    "lacks features.json": lambda folder: (folder / "features.json").unlink(),
    "not a readable TFDS dataset": lambda folder: (folder / "dataset_info.json").write_text("{"),
    "is missing": lambda folder: first_shard(folder).unlink(),
    "0 readable records, expected 4": lambda folder: cut(first_shard(folder)),
    "holds several datasets": lambda folder: shutil.copytree(folder, folder.parent / "2.0.0"),
}


@pytest.mark.parametrize("message", BREAKAGES)
def test_a_damaged_folder_is_named(copy, message):
    BREAKAGES[message](copy)
    with pytest.raises(UserError, match=message):
        rlds.RldsReader(copy.parent.parent, DATASET, "train")


@pytest.mark.parametrize(
    ("changes", "split", "message"),
    [
        ({}, "test", "no split 'test'; it has train, val"),
        ({}, "train[3:3]", "holds no episodes"),
        ({"views": {"image": "observation/rgb"}}, "train", "no field 'observation/rgb'"),
        ({"state": "observation/joints"}, "train", "no field 'observation/joints'"),
        ({"instruction": ("task",)}, "train", "it has action, discount, is_first"),
    ],
)
def test_a_config_that_does_not_fit_is_named(original, changes, split, message):
    with pytest.raises(UserError, match=message):
        rlds.RldsReader(original, dataclasses.replace(DATASET, **changes), split)


def test_a_field_that_the_actions_need_and_no_episode_has_is_an_error_of_the_dataset(original):
    dataset = dataclasses.replace(DATASET, actions=lambda steps: steps["world_vector"])
    source = rlds.RldsReader(original, dataset, "train")
    with pytest.raises(DatasetMismatchError, match=r"no field 'world_vector' in .*; it has action"):
        source[0]
