"""Small TFDS datasets with the feature structures that the datasets publish."""

from __future__ import annotations

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

KINDS = tfds.features
IMAGE = KINDS.Image(shape=(16, 24, 3), encoding_format="jpeg")


def vector(size, dtype=np.float32):
    return KINDS.Tensor(shape=(size,), dtype=dtype)


def scalar(dtype=np.float32):
    return KINDS.Scalar(dtype)


def _posed(gripper, **more):
    return {
        "world_vector": vector(3),
        "rotation_delta": vector(3),
        **gripper,
        "terminate_episode": scalar(),
        **more,
    }


_OBSERVED_TEXT = {"natural_language_instruction": KINDS.Text()}
_STEP_TEXT = {"language_instruction": KINDS.Text()}
_CLOSING = {"gripper_closedness_action": vector(1)}
_CLOSING_SCALAR = {"gripper_closedness_action": scalar()}
_LIBERO = (
    {"image": IMAGE, "wrist_image": IMAGE, "state": vector(8), "joint_state": vector(7)},
    vector(7),
    _STEP_TEXT,
)

STRUCTURES = {
    **{name: _LIBERO for name in ("libero", "libero_spatial", "libero_10")},
    "bridge": (
        {**{f"image_{i}": IMAGE for i in range(4)}, "state": vector(7)},
        vector(7),
        {**_STEP_TEXT, "language_embedding": vector(8)},
    ),
    "fractal": (
        {
            "image": IMAGE,
            "base_pose_tool_reached": vector(7),
            "gripper_closed": vector(1),
            **_OBSERVED_TEXT,
        },
        _posed(_CLOSING, base_displacement_vector=vector(2)),
        {},
    ),
    "droid": (
        {
            "exterior_image_1_left": IMAGE,
            "exterior_image_2_left": IMAGE,
            "wrist_image_left": IMAGE,
            "cartesian_position": vector(6, np.float64),
            "gripper_position": vector(1, np.float64),
        },
        vector(7, np.float64),
        {
            "action_dict": {
                "cartesian_velocity": vector(6, np.float64),
                "gripper_position": vector(1, np.float64),
            },
            **_STEP_TEXT,
            "language_instruction_2": KINDS.Text(),
            "language_instruction_3": KINDS.Text(),
        },
    ),
    "toto": (
        {"image": IMAGE, "state": vector(7), **_OBSERVED_TEXT},
        _posed({"open_gripper": scalar(np.bool_)}),
        {},
    ),
    "taco_play": (
        {"rgb_static": IMAGE, "rgb_gripper": IMAGE, "robot_obs": vector(15), **_OBSERVED_TEXT},
        {"actions": vector(7), "rel_actions_world": vector(7), "terminate_episode": scalar()},
        {},
    ),
    "fmb": (
        {
            "image_side_1": IMAGE,
            "image_side_2": IMAGE,
            "image_wrist_1": IMAGE,
            "eef_pose": vector(7),
            "state_gripper_pose": scalar(),
        },
        vector(7),
        _STEP_TEXT,
    ),
    "maniskill": (
        {"image": IMAGE, "wrist_image": IMAGE, "state": vector(18), "tcp_pose": vector(7)},
        vector(7),
        _STEP_TEXT,
    ),
    "kuka": ({"image": IMAGE, **_OBSERVED_TEXT}, _posed(_CLOSING), {}),
    "berkeley_autolab_ur5": (
        {"image": IMAGE, "hand_image": IMAGE, "robot_state": vector(15), **_OBSERVED_TEXT},
        _posed(_CLOSING_SCALAR),
        {},
    ),
    "cmu_play_fusion": ({"image": IMAGE, "state": vector(8)}, vector(9), _STEP_TEXT),
    "viola": (
        {
            "agentview_rgb": IMAGE,
            "eye_in_hand_rgb": IMAGE,
            "joint_states": vector(7),
            "gripper_states": vector(1),
            **_OBSERVED_TEXT,
        },
        _posed(_CLOSING_SCALAR),
        {},
    ),
    "utaustin_mutex": (
        {"image": IMAGE, "wrist_image": IMAGE, "state": vector(24)},
        vector(7),
        _STEP_TEXT,
    ),
}
"""Dataset -> features of an observation, of the action, and further ones of the step."""


def write(folder, name, steps=14, instruction="pick up the cup", blank=()):
    """Writes one episode of a dataset's structure.

    Returns:
      its steps as nested dictionaries of arrays.
    """
    observation, action, extra = STRUCTURES[name]
    flags = {flag: scalar(np.bool_) for flag in ("is_first", "is_last", "is_terminal")}
    step = {"observation": observation, "action": action, "reward": scalar(), **extra, **flags}
    features = KINDS.FeaturesDict(
        {
            "steps": KINDS.Dataset(step),
            "episode_metadata": {"file_path": KINDS.Text()},
        }
    )
    rng = np.random.default_rng(0)
    made = [_values(step, rng, instruction) | dict.fromkeys(blank, " ") for _ in range(steps)]
    folder.mkdir(parents=True)
    path = folder / f"{name}-train.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    example = {"steps": made, "episode_metadata": {"file_path": "somewhere"}}
    record = features.serialize_example(example)
    writer.write(record)
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, split="train", filetype_suffix="array_record"
    )
    info = tfds.core.SplitInfo(
        name="train", shard_lengths=[1], num_bytes=len(record), filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=[info], version="1.0.0", check_data=False
    )
    return made


def _values(feature, rng, instruction):
    if isinstance(feature, dict):
        return {key: _values(part, rng, instruction) for key, part in feature.items()}
    if isinstance(feature, KINDS.Text):
        return instruction
    if isinstance(feature, KINDS.Image):
        return rng.integers(0, 256, feature.shape, np.uint8)
    dtype = np.dtype(feature.np_dtype)
    if dtype == np.bool_:
        return bool(rng.integers(2))
    return rng.uniform(-1.2, 1.2, feature.shape).astype(dtype)
