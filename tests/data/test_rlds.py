"""The RLDS reader: splits, other field names, and damaged folders."""

from __future__ import annotations

import dataclasses
import io
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from tests.conftest import REPOSITORY
from tests.data.episodes import DATASET, assert_same, make_episode, read_all
from tests.data.test_image_decoding import encode
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


# ----------------------------------------------------------------------------
# Features of every kind: those in use are checked before the pass, others are never parsed.


KINDS = tfds.features
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), np.uint8)


def as_file(value):
    """TFDS stores an encoded image as it is when it gets a file; it encodes with TensorFlow."""
    return io.BytesIO(value) if isinstance(value, bytes) else value


def write_features(folder, observation, values, *, text=None, context=None, about=None):
    """One episode of three steps with fields of an observation of one's own.

    Args:
      folder: of the version.
      observation: field -> TFDS feature.
      values: field -> one value per step; of a sequence, its entries in the record.
      text: feature and value of the instruction.
      context: field of the episode -> TFDS feature.
      about: the values of ``context``, of one episode each.
    """
    feature, sentence = text or (KINDS.Text(), "stack")

    def make_features(fields):
        step = {
            "observation": fields,
            "action": KINDS.Tensor(shape=(7,), dtype=np.float32),
            "language_instruction": feature,
        }
        return KINDS.FeaturesDict({"steps": KINDS.Dataset(step), **(context or {})})

    # TFDS needs TensorFlow, seconds of import, to write sequences.
    sequences = {n for n, kind in observation.items() if isinstance(kind, KINDS.Sequence)}
    plain = {n: kind for n, kind in observation.items() if n not in sequences}
    folder.mkdir(parents=True)
    path = folder / "mine-train.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    episodes = about or [{}]
    for fields in episodes:
        steps = [
            {
                "observation": {name: as_file(values[name][t]) for name in plain},
                "action": np.full(7, t, np.float32),
                "language_instruction": sentence,
            }
            for t in range(3)
        ]
        record = make_features(plain).serialize_example({"steps": steps, **fields})
        example = tf_example_pb2.Example.FromString(record)
        for name in sequences:
            for entry, listed in values[name].items():
                key = f"steps/observation/{name}/ragged_{entry}"
                kind = {int: "int64_list", float: "float_list", bytes: "bytes_list"}[
                    type(listed[0])
                ]
                getattr(example.features.feature[key], kind).value.extend(listed)
        writer.write(example.SerializeToString())
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="mine", split="train", filetype_suffix="array_record"
    )
    info = tfds.core.SplitInfo(
        name="train", shard_lengths=[len(episodes)], num_bytes=1, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=make_features(observation),
        split_infos=[info],
        version="1.0.0",
        check_data=False,
    )
    return folder


MINE = dataclasses.replace(
    DATASET, views={"image": "observation/image"}, state=None, image_sizes={"image": (16, 24)}
)
IMAGE = {"image": KINDS.Image(shape=(16, 24, 3), encoding_format="png")}
ENCODED = [encode(pixels) for pixels in PIXELS]
FRAMES = {"image": ENCODED}

UNUSED = {
    "words": (
        KINDS.Sequence(KINDS.Text()),
        {"flat_values": [b"a", b"b", b"c"], "row_lengths_0": [2, 0, 1]},
    ),
    "boxes": (
        KINDS.Sequence(KINDS.BBoxFeature()),
        {"flat_values": [0.0, 0.0, 1.0, 1.0], "row_lengths_0": [0, 1, 0]},
    ),
    "scores": (
        KINDS.Sequence(np.float32),
        {"flat_values": [1.0, 1.5, 2.0], "row_lengths_0": [0, 1, 2]},
    ),
    "nested": (
        KINDS.Sequence(KINDS.Sequence(np.float32)),
        {"flat_values": [1.0, 2.0], "row_lengths_0": [1, 0, 1], "row_lengths_1": [1, 1]},
    ),
    "class": (KINDS.ClassLabel(names=["x", "y"]), ["x", "y", "x"]),
    "packed": (
        KINDS.Tensor(shape=(4,), dtype=np.uint8, encoding="zlib"),
        [np.ones(4, np.uint8)] * 3,
    ),
    "open": (
        KINDS.Tensor(shape=(None, None), dtype=np.float32, encoding="bytes"),
        [np.ones((2, 2), np.float32)] * 3,
    ),
    "depth": (KINDS.Tensor(shape=(8, 8), dtype=np.float32), [np.ones((8, 8), np.float32)] * 3),
}


@pytest.mark.parametrize("name", UNUSED)
def test_unused_fields_of_any_kind_do_no_harm(tmp_path, name):
    feature, values = UNUSED[name]
    folder = write_features(tmp_path / "1.0.0", {**IMAGE, name: feature}, {**FRAMES, name: values})
    (episode,) = rlds.RldsReader(folder, MINE, "train")
    np.testing.assert_array_equal(episode.frames["image"], PIXELS)
    assert episode.instruction == "stack"


USED = {
    "packed": lambda values: values.sum(1, keepdims=True) == 4,
    "depth": lambda values: values.reshape(3, -1) == 1,
    "scores": lambda values: np.array([[v.sum()] for v in values]) == [[0], [1], [3.5]],
    "words": lambda values: np.array([[len(v)] for v in values]) == [[2], [0], [1]],
    "class": lambda values: values[:, None] == [[0], [1], [0]],
}


@pytest.mark.parametrize("name", USED)
def test_fields_of_many_kinds_can_be_used_by_the_actions(tmp_path, name):
    feature, values = UNUSED[name]
    folder = write_features(tmp_path / "1.0.0", {**IMAGE, name: feature}, {**FRAMES, name: values})
    config = dataclasses.replace(
        MINE, actions=lambda steps: USED[name](steps[f"observation/{name}"])
    )
    (episode,) = rlds.RldsReader(folder, config, "train")
    assert (episode.actions == 1).all()


def test_pixels_that_are_stored_as_numbers_are_a_camera(tmp_path):
    feature = KINDS.Tensor(shape=(16, 24, 3), dtype=np.uint8)
    folder = write_features(tmp_path / "1.0.0", {"image": feature}, {"image": list(PIXELS)})
    reader = rlds.RldsReader(folder, MINE, "train")
    np.testing.assert_array_equal(reader[0].frames["image"], PIXELS)
    assert reader.image_sizes == {"image": (16, 24)}


WRONG_KINDS = {
    "a camera of depth": (
        {"image": KINDS.Image(shape=(16, 24, 1), dtype=np.uint16)},
        {},
        "'observation/image' .* is Image of .*uint16.*, expected an 8-bit image",
    ),
    "a camera of numbers": (
        {"image": KINDS.Tensor(shape=(16,), dtype=np.float32)},
        {},
        "expected an 8-bit image",
    ),
    "an instruction of codes": (
        IMAGE,
        {"text": (KINDS.Tensor(shape=(4,), dtype=np.int32), np.zeros(4, np.int32))},
        "'language_instruction' .* expected a text",
    ),
    "a state of pictures": (IMAGE, {"state": "observation/image"}, "expected a vector of numbers"),
    "a state of matrices": (
        {**IMAGE, "pose": KINDS.Tensor(shape=(4, 4), dtype=np.float32)},
        {"state": "observation/pose"},
        "'observation/pose' .* expected a vector",
    ),
}


@pytest.mark.parametrize("name", WRONG_KINDS)
def test_fields_of_another_kind_end_before_the_pass(tmp_path, name):
    observation, changes, message = WRONG_KINDS[name]
    numbers = {"image": np.zeros((3, 16), np.float32), "pose": np.zeros((3, 4, 4), np.float32)}
    values = numbers | (FRAMES if isinstance(observation["image"], KINDS.Image) else {})
    changes = dict(changes)
    folder = write_features(tmp_path / "1.0.0", observation, values, text=changes.pop("text", None))
    with pytest.raises(DatasetMismatchError, match=message):
        rlds.RldsReader(folder, dataclasses.replace(MINE, **changes), "train")


FILTERED = {
    "flag": ({"success": True}, [0, 2]),
    "text": ({"about/kind": "good"}, [0, 1]),
    "number": ({"about/count": 3}, [0]),
    "both": ({"success": True, "about/kind": "good"}, [0]),
    "last step": ({"action": [2.0] * 7}, [0, 1, 2]),
}


@pytest.mark.parametrize("name", FILTERED)
def test_episodes_are_filtered_by_their_fields(tmp_path, name):
    filters, expected = FILTERED[name]
    context = {
        "success": KINDS.Scalar(np.bool_),
        "about": KINDS.FeaturesDict({"kind": KINDS.Text(), "count": KINDS.Scalar(np.int32)}),
    }
    about = [
        {"success": s, "about": {"kind": k, "count": c}}
        for s, k, c in ((True, "good", 3), (False, "good", 4), (True, "bad", 4))
    ]
    folder = write_features(tmp_path / "1.0.0", IMAGE, FRAMES, context=context, about=about)
    valid, invalid = read_all(folder, dataclasses.replace(MINE, episode_filters=filters))
    assert sorted(valid) == [f"train/{n:06d}" for n in expected]
    assert {kind for _, kind in invalid.values()} <= {"episode_filters"}
    with pytest.raises(DatasetMismatchError, match="no field 'sucess'"):
        rlds.RldsReader(
            folder, dataclasses.replace(MINE, episode_filters={"sucess": True}), "train"
        )


def test_idle_steps_are_left_out_of_every_field(original):
    config = dataclasses.replace(DATASET, idle_steps=lambda actions: actions[:, 0] < 0)
    plain = rlds.RldsReader(original, DATASET, "train")
    for index, episode in enumerate(rlds.RldsReader(original, config, "train")):
        kept = plain[index].actions[:, 0] >= 0
        np.testing.assert_array_equal(episode.actions, plain[index].actions[kept])
        np.testing.assert_array_equal(episode.state, plain[index].state[kept])
        for view, frames in episode.frames.items():
            np.testing.assert_array_equal(frames, plain[index].frames[view][kept])


TEXTS = {
    "printed": "[b'stack the cubes']",
    "array": "array(['stack'], dtype=object)",
    "tuple": "('stack',)",
}


@pytest.mark.parametrize("name", TEXTS)
def test_printed_texts_break_their_episode(tmp_path, name):
    folder = write_features(tmp_path / "1.0.0", IMAGE, FRAMES, text=(KINDS.Text(), TEXTS[name]))
    _, invalid = read_all(folder, MINE)
    assert "printed Python object" in invalid["train/000000"][0]
