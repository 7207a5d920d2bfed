"""Tiny datasets with the whole feature structure of the public corpora, as their files have it.

Structures: the TFDS catalog and the data sets' own pages. Pixels and numbers are made up.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from univla_jax.data.datasets import DATASETS

KINDS = tfds.features
WORDS = "pick up the red cup"
Structure = dict[str, Any]


def _tensor(*shape: int, dtype: Any = np.float32) -> Any:
    return KINDS.Tensor(shape=shape, dtype=dtype)


_double = functools.partial(_tensor, dtype=np.float64)


def _string() -> Any:
    return KINDS.Tensor(shape=(), dtype=np.str_)


def _image(height: int, width: int, channels: int = 3, dtype: Any = np.uint8, form: Any = None):
    return KINDS.Image(shape=(height, width, channels), dtype=dtype, encoding_format=form)


_jpeg = functools.partial(_image, form="jpeg")


def _flags(dtype: Any = np.bool_) -> Structure:
    return {name: _tensor(dtype=dtype) for name in ("is_first", "is_last", "is_terminal")}


def _rt1_action() -> Structure:
    return {
        "base_displacement_vector": _tensor(2),
        "base_displacement_vertical_rotation": _tensor(1),
        "gripper_closedness_action": _tensor(1),
        "rotation_delta": _tensor(3),
        "terminate_episode": _tensor(3, dtype=np.int32),
        "world_vector": _tensor(3),
    }


def _posed(**gripper: Any) -> Structure:
    movement = {name: _tensor(3) for name in ("rotation_delta", "world_vector")}
    return {**gripper, **movement, "terminate_episode": _tensor()}


def _observed(**fields: Any) -> Structure:
    """An observation with the instruction in it."""
    text = {"natural_language_embedding": _tensor(512), "natural_language_instruction": _string()}
    return {**fields, **text}


def _steps(action: Any, observation: Structure, **fields: Any) -> Structure:
    steps = {"action": action, "observation": observation, "reward": _tensor(), **fields}
    return {"steps": {**steps, **_flags()}}


def _spoken(action_dim: int, observation: Structure, dtype: Any = np.float32) -> Structure:
    """The instruction beside the observation."""
    text = {"language_embedding": _tensor(512), "language_instruction": KINDS.Text()}
    action = _tensor(action_dim, dtype=dtype)
    steps = _steps(action, observation, discount=_tensor(), **text)
    return {**steps, "episode_metadata": {"file_path": KINDS.Text()}}


def _fractal() -> Structure:
    names = ("collection_mode", "data_type", "env", "location", "objects_family", "task_family")
    aspects = ("already_success", "feasible", "has_aspects", "success", "undesirable")
    observation = _observed(
        base_pose_tool_reached=_tensor(7),
        gripper_closed=_tensor(1),
        gripper_closedness_commanded=_tensor(1),
        height_to_bottom=_tensor(1),
        image=_image(256, 320),
        orientation_box=_tensor(2, 3),
        orientation_start=_tensor(4),
        robot_orientation_positions_box=_tensor(3, 3),
        rotation_delta_to_go=_tensor(3),
        src_rotation=_tensor(4),
        vector_to_go=_tensor(3),
        workspace_bounds=_tensor(3, 3),
    )
    return {
        "aspects": {name: _tensor(dtype=np.bool_) for name in aspects},
        "attributes": {
            **{name: _tensor(dtype=np.int64) for name in names},
            **{f"{name}_name": _string() for name in names},
        },
        **_steps(_rt1_action(), observation),
    }


def _kuka() -> Structure:
    observation = _observed(
        **{
            "clip_function_input/base_pose_tool_reached": _tensor(7),
            "clip_function_input/workspace_bounds": _tensor(3, 3),
        },
        gripper_closed=_tensor(1),
        height_to_bottom=_tensor(1),
        image=_image(512, 640),
        task_id=_tensor(1),
    )
    return {"success": _tensor(dtype=np.bool_), **_steps(_rt1_action(), observation)}


def _fmb() -> Structure:
    cameras = ("image_side_1", "image_side_2", "image_wrist_1", "image_wrist_2")
    observation = {
        **{name: _image(256, 256) for name in cameras},
        **{f"{name}_depth": _tensor(256, 256) for name in cameras},
        **{name: _tensor(dtype=np.uint8) for name in ("color_id", "object_id", "shape_id")},
        **{name: _string() for name in ("length", "primitive", "size")},
        **{name: _tensor(3) for name in ("eef_force", "eef_torque")},
        **{name: _tensor(7) for name in ("eef_pose", "joint_pos", "joint_vel")},
        "eef_vel": _tensor(6),
        "state_gripper_pose": _tensor(),
    }
    text = {"language_embedding": _tensor(512), "language_instruction": _string()}
    metadata = {name: _string() for name in ("episode_language_instruction", "episode_task")}
    return {
        **_steps(_tensor(7), observation, discount=_tensor(), **text),
        "episode_metadata": {**metadata, "file_path": _string()},
    }


def _droid() -> Structure:
    action = {
        **{name: _double(6) for name in ("cartesian_position", "cartesian_velocity")},
        **{name: _double(1) for name in ("gripper_position", "gripper_velocity")},
        **{name: _double(7) for name in ("joint_position", "joint_velocity")},
    }
    cameras = ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")
    observation = {
        **{name: _jpeg(180, 320) for name in cameras},
        "cartesian_position": _double(6),
        "gripper_position": _double(1),
        "joint_position": _double(7),
    }
    paths = ("language_instruction", "language_instruction_2", "language_instruction_3")
    texts = {name: _string() for name in paths}
    return {
        **_steps(_double(7), observation, action_dict=action, discount=_tensor(), **texts),
        "episode_metadata": {"file_path": _string(), "recording_folderpath": _string()},
    }


def _bridge() -> Structure:
    cameras = {f"image_{i}": _jpeg(256, 256) for i in range(4)}
    structure = _spoken(7, {**cameras, "state": _tensor(7)})
    has = {f"has_image_{i}": _tensor(dtype=np.bool_) for i in range(4)}
    structure["episode_metadata"] |= {"episode_id": _tensor(dtype=np.int32), **has}
    structure["episode_metadata"] |= {"has_language": _tensor(dtype=np.bool_)}
    return structure


def _libero() -> Structure:
    cameras = {name: _jpeg(256, 256) for name in ("image", "wrist_image")}
    return _spoken(7, {**cameras, "state": _tensor(8), "joint_state": _tensor(7)})


STRUCTURES: dict[str, Callable[[], Structure]] = {
    "fractal": _fractal,
    "droid": _droid,
    "bridge": _bridge,
    "toto": lambda: _steps(
        _posed(open_gripper=_tensor(dtype=np.bool_)),
        _observed(image=_image(480, 640), state=_tensor(7)),
    ),
    "taco_play": lambda: _steps(
        {
            **{n: _tensor(7) for n in ("actions", "rel_actions_gripper", "rel_actions_world")},
            "terminate_episode": _tensor(),
        },
        _observed(
            depth_gripper=_tensor(84, 84),
            depth_static=_tensor(150, 200),
            rgb_gripper=_image(84, 84),
            rgb_static=_image(150, 200),
            robot_obs=_tensor(15),
            structured_language_instruction=_string(),
        ),
    ),
    "fmb": _fmb,
    "maniskill": lambda: _spoken(
        7,
        {
            "base_pose": _tensor(7),
            "depth": _image(256, 256, 1, np.uint16),
            "image": _image(256, 256),
            "main_camera_cam2world_gl": _tensor(4, 4),
            "state": _tensor(18),
            "target_object_or_part_final_pose_valid": _tensor(7, dtype=np.uint8),
            "tcp_pose": _tensor(7),
            "wrist_depth": _image(256, 256, 1, np.uint16),
            "wrist_image": _image(256, 256),
        },
    ),
    "kuka": _kuka,
    "berkeley_autolab_ur5": lambda: _steps(
        _posed(gripper_closedness_action=_tensor()),
        _observed(
            hand_image=_image(480, 640),
            image=_image(480, 640),
            image_with_depth=_image(480, 640, 1, np.float32),
            robot_state=_tensor(15),
        ),
    ),
    "cmu_play_fusion": lambda: _spoken(9, {"image": _image(128, 128), "state": _tensor(8)}),
    "viola": lambda: _steps(
        _posed(gripper_closedness_action=_tensor()),
        _observed(
            agentview_rgb=_image(224, 224),
            ee_states=_tensor(16),
            eye_in_hand_rgb=_image(224, 224),
            gripper_states=_tensor(1),
            joint_states=_tensor(7),
        ),
    ),
    "utaustin_mutex": lambda: _spoken(
        7, {"image": _image(128, 128), "state": _tensor(24), "wrist_image": _image(128, 128)}
    ),
    "libero": _libero,
    "libero_10": _libero,
}
"""Dataset -> the features of its episodes."""


def write(folder: pathlib.Path, name: str, episodes: int, steps: int) -> pathlib.Path:
    """Writes a dataset of the structure ``name``, each episode of ``steps`` steps."""
    structure = STRUCTURES[name]()
    features = KINDS.FeaturesDict(
        {k: KINDS.Dataset(v) if k == "steps" else v for k, v in structure.items()}
    )
    folder.mkdir(parents=True)
    path = folder / f"{name}-train.array_record-00000-of-00001"
    writer, size = array_record_module.ArrayRecordWriter(str(path), "group_size:1"), 0
    for number in range(episodes):
        rng = np.random.default_rng(number)
        made = [_values(structure["steps"], rng, step) for step in range(steps)]
        rest = {k: _values(v, rng, 0) for k, v in structure.items() if k != "steps"}
        record = features.serialize_example({**rest, "steps": made})
        writer.write(record)
        size += len(record)
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, split="train", filetype_suffix="array_record"
    )
    info = tfds.core.SplitInfo(
        name="train", shard_lengths=[episodes], num_bytes=size, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=[info], version="1.0.0", check_data=False
    )
    return folder


def _values(feature: Any, rng: np.random.Generator, step: int) -> Any:
    if isinstance(feature, dict):
        return {key: _values(part, rng, step) for key, part in feature.items()}
    if isinstance(feature, KINDS.Text) or feature.np_dtype in (np.str_, object):
        return WORDS
    if isinstance(feature, KINDS.Image):
        # A gradient that moves compresses well and differs from step to step.
        height, width, channels = feature.shape
        ramp = (np.arange(width) + 7 * step) % 256
        return np.broadcast_to(ramp[None, :, None], (height, width, channels)).astype(
            feature.np_dtype
        )
    dtype = np.dtype(feature.np_dtype)
    if np.prod(feature.shape) > 10_000:
        return np.zeros(feature.shape, dtype)  # depth, which nothing reads
    if dtype == np.bool_:
        return rng.integers(0, 2, feature.shape).astype(bool)
    if dtype.kind in "iu":
        return rng.integers(0, 3, feature.shape).astype(dtype)
    return rng.uniform(-1, 1, feature.shape).astype(dtype)


def steps_needed(name: str, frames: int = 6) -> int:
    """Steps of an episode with ``frames`` frames of a world model, and one to spare at the ends."""
    dataset = DATASETS[name]
    return frames * dataset.frame_spacing + sum(dataset.trim)


# ----------------------------------------------------------------------------
# The formats that are not RLDS.


def write_calvin(folder: pathlib.Path, episodes: int, steps: int) -> pathlib.Path:
    """CALVIN's npz files, one stretch of language after the other."""
    training = folder / "training"
    (training / "lang_annotations").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(episodes * steps):
        np.savez(
            training / f"episode_{number:07d}.npz",
            rgb_static=np.full((200, 200, 3), number % 256, np.uint8),
            rgb_gripper=np.full((84, 84, 3), number % 256, np.uint8),
            rel_actions=rng.uniform(-1, 1, 7),
            actions=rng.uniform(-1, 1, 7),
            robot_obs=rng.uniform(-1, 1, 15),
            scene_obs=np.zeros(24),
        )
    ranges = [(e * steps, (e + 1) * steps - 1) for e in range(episodes)]
    table = {
        "language": {"ann": [WORDS] * episodes, "task": ["lift"] * episodes},
        "info": {"episodes": [], "indx": ranges},
    }
    np.save(training / "lang_annotations" / "auto_lang_ann.npy", table, allow_pickle=True)
    return folder


def write_clip(path: pathlib.Path, frames: int, rate: int, size: tuple[int, int]) -> None:
    """A video of ``frames`` frames of (height, width)."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            picture = np.full((*size, 3), 7 * number % 256, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def write_something(folder: pathlib.Path) -> pathlib.Path:
    """Something-Something: clips of 2.5 to 4 s at 12 fps of several widths, and a test list."""
    labels = []
    for number, width in enumerate((320, 426, 240)):
        write_clip(folder / "videos" / f"{number}.mp4", 30 + 9 * number, 12, (240, width))
        labels.append({"id": str(number), "label": WORDS, "template": WORDS, "placeholders": []})
    for split, listed in {"train": labels, "validation": labels[:1], "test": [{"id": "0"}]}.items():
        name = f"something-something-v2-{split}.json"
        (folder / name).write_text(json.dumps(listed))
    return folder


def write_segments(folder: pathlib.Path) -> pathlib.Path:
    """One long video with a text for each of its segments."""
    write_clip(folder / "walk.mp4", 160, 10, (120, 160))
    starts = range(0, 16, 4)
    segments = [[float(start), start + 4.0, f"{WORDS} {start}"] for start in starts]
    (folder / "train.json").write_text(json.dumps({"walk": segments}))
    return folder


def write_lerobot(folder: pathlib.Path, version: str, episodes: int, steps: int) -> pathlib.Path:
    """An ALOHA in LeRobot's format ``"v2.1"`` or ``"v3.0"``, at 50 steps a second."""
    import pyarrow as pa
    from pyarrow import parquet

    dataset, rate, size = DATASETS["aloha"], 50, (96, 128)
    cameras = list(dataset.views.values())
    old = version == "v2.1"
    file = "episode_{n:06d}.parquet" if old else "file-{n:03d}.parquet"
    data = "data/chunk-{chunk:03d}/" + file
    names = ("episode_chunk", "episode_index") if old else ("chunk_index", "file_index")
    pattern = data.replace("{chunk", "{" + names[0]).replace("{n", "{" + names[1])
    video = "videos/chunk-{chunk:03d}/{key}/episode_{n:06d}.mp4"
    video = video if old else "videos/{key}/chunk-{chunk:03d}/file-{n:03d}.mp4"
    shown = video.replace("{chunk", "{" + names[0]).replace("{n", "{" + names[1])
    feature = {"dtype": "video", "shape": [*size, 3], "names": ["height", "width", "channels"]}
    numbers = {"dtype": "float32", "shape": [14], "names": None}
    info = {
        "codebase_version": version,
        "robot_type": "aloha",
        "fps": rate,
        "chunks_size": 1000,
        "total_episodes": episodes,
        "total_frames": episodes * steps,
        "data_path": pattern,
        "video_path": shown.replace("{key", "{video_key"),
        "features": {
            **dict.fromkeys(cameras, feature),
            **dict.fromkeys(("action", "observation.state"), numbers),
        },
        "splits": {"train": f"0:{episodes}"},
    }
    meta = folder / "meta"
    meta.mkdir(parents=True)
    (meta / "info.json").write_text(json.dumps(info))
    rng = np.random.default_rng(0)
    tables = []
    for number in range(episodes):
        poses = np.cumsum(rng.normal(0, 0.02, (steps, 14)), 0).astype(np.float32)
        tables.append(
            {
                "action": list(poses),
                "observation.state": list(poses),
                "timestamp": [t / rate for t in range(steps)],
                "frame_index": list(range(steps)),
                "index": [number * steps + t for t in range(steps)],
                "episode_index": [number] * steps,
                "task_index": [0] * steps,
            }
        )

    def save(path: pathlib.Path, rows: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.table(rows), path)

    if old:
        for number, table in enumerate(tables):
            save(folder / data.format(chunk=0, n=number), table)
            for key in cameras:
                write_clip(folder / video.format(key=key, chunk=0, n=number), steps, rate, size)
        entries = [{"episode_index": n, "length": steps, "tasks": [WORDS]} for n in range(episodes)]
        (meta / "episodes.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n")
        (meta / "tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": WORDS}) + "\n")
        return folder
    joined = {key: [value for table in tables for value in table[key]] for key in tables[0]}
    save(folder / data.format(chunk=0, n=0), joined)
    rows: dict[str, Any] = {
        "episode_index": list(range(episodes)),
        "length": [steps] * episodes,
        "tasks": [[WORDS]] * episodes,
        "data/chunk_index": [0] * episodes,
        "data/file_index": [0] * episodes,
        "dataset_from_index": [n * steps for n in range(episodes)],
        "dataset_to_index": [(n + 1) * steps for n in range(episodes)],
    }
    for key in cameras:
        write_clip(folder / video.format(key=key, chunk=0, n=0), episodes * steps, rate, size)
        for what in ("chunk_index", "file_index"):
            rows[f"videos/{key}/{what}"] = [0] * episodes
        rows[f"videos/{key}/from_timestamp"] = [n * steps / rate for n in range(episodes)]
        rows[f"videos/{key}/to_timestamp"] = [(n + 1) * steps / rate for n in range(episodes)]
    save(meta / "episodes" / "chunk-000" / "file-000.parquet", rows)
    save(meta / "tasks.parquet", {"task_index": [0], "__index_level_0__": [WORDS]})
    return folder
