"""NAVSIM logs, written by hand in OpenScene's layout, and what must not be read."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from univla_jax.data.datasets import DATASETS
from univla_jax.data.ego_motion import COMMANDS, compose_motions
from univla_jax.data.readers import open_reader
from univla_jax.errors import UserError

FRAMES = 24
LOG = "2021.05.12.22.00.38_veh-35_01008_01518"


def yaw(i):
    return 0.05 * i - 0.3


def frame(i):
    """One dictionary as create_openscene_metadata.py writes it; x = 2 i, y = 0.1 i²."""
    half = yaw(i) / 2
    cameras = {
        name: {
            "data_path": f"{LOG}/{name}/{i:016x}.jpg",
            "sensor2lidar_rotation": np.eye(3),
            "sensor2lidar_translation": np.zeros(3),
            "cam_intrinsic": np.eye(3),
            "distortion": np.zeros(5),
        }
        for name in ("CAM_F0", "CAM_L0", "CAM_B0")
    }
    return {
        "token": f"{i:016x}",
        "frame_idx": i,
        "timestamp": 1_620_000_000_000_000 + 500_000 * i,
        "log_name": LOG,
        "log_token": "l" * 16,
        "scene_name": f"{LOG}-000",
        "scene_token": "s" * 16,
        "map_location": "us-nv-las-vegas-strip",
        "roadblock_ids": ["1", "2"] if i != 11 else [],
        "vehicle_name": "veh-35",
        "can_bus": np.zeros(18),
        "lidar_path": f"{LOG}/MergedPointCloud/{i:016x}.pcd",
        "ego2global_translation": np.array([664430.0 + 2 * i, 3997650.0 + 0.1 * i * i, 606.0]),
        "ego2global_rotation": np.array([np.cos(half), 0.0, 0.0, np.sin(half)]),
        "ego2global": np.eye(4),
        "ego_dynamic_state": [4.0 + 0.1 * i, 0.01, 0.2, -0.02],
        "traffic_lights": [(1234, True)],
        "driving_command": np.eye(4, dtype=int)[i % 3],
        "cams": cameras,
        "sample_prev": None,
        "sample_next": None,
        "anns": {
            "gt_boxes": np.zeros((2, 7)),
            "gt_names": np.array(["vehicle", "pedestrian"]),
            "gt_velocity_3d": np.zeros((2, 3)),
            "instance_tokens": ["a", "b"],
            "track_tokens": ["c", "d"],
        },
    }


def write(folder, frames=None, tokens=None, part="mini"):
    frames = [frame(i) for i in range(FRAMES)] if frames is None else frames
    logs, images = folder / "navsim_logs" / part, folder / "sensor_blobs" / part / LOG / "CAM_F0"
    logs.mkdir(parents=True)
    images.mkdir(parents=True)
    (logs / f"{LOG}.pkl").write_bytes(pickle.dumps(frames))
    for i in range(len(frames)):
        grey = np.full((18, 32, 3), 10 * i, np.uint8)
        Image.fromarray(grey).save(images / f"{i:016x}.jpg", quality=95)
    if tokens is not None:
        listed = "".join(f"  - '{token}'\n" for token in tokens)
        (folder / "navlist.yaml").write_text(f"log_names:\n  - {LOG}\ntokens:\n{listed}")
    return folder


def source(folder, split="mini"):
    return open_reader(folder, DATASETS["navsim"], split)


def test_runs_of_moments_are_episodes(tmp_path):
    read = source(write(tmp_path))
    # Frames 3 ... 13 have three before and ten after them; frame 11 has no route.
    assert [read.episode_id(i) for i in range(len(read))] == [
        f"mini/{LOG}/00003",
        f"mini/{LOG}/00012",
    ]
    first = read[0]
    assert len(first) == 8 + 2 + 7 and first.instruction == COMMANDS[1]
    assert first.texts["token"][:4] == ("", "", f"{3:016x}", f"{4:016x}")
    assert first.texts["command"][2:5] == (COMMANDS[0], COMMANDS[1], COMMANDS[2])
    for view, ago in (("image", 0), ("previous_image", 2)):
        shade = first.frames[view][:, 9, 16, 0].astype(int)
        np.testing.assert_allclose(shade[2:], 10 * (np.arange(3, 18) - ago), atol=2)


def test_numbers_of_the_log(tmp_path):
    episode = source(write(tmp_path))[0]
    steps = np.arange(1, 18)
    turned = yaw(steps)
    dx, dy = 2.0, 0.1 * (2 * steps + 1)
    np.testing.assert_allclose(
        episode.actions,
        np.stack(
            [
                np.cos(turned) * dx + np.sin(turned) * dy,
                -np.sin(turned) * dx + np.cos(turned) * dy,
                0 * steps + 0.05,
            ],
            -1,
        ),
        atol=1e-6,
    )
    step = 6 - 1  # frame 6 of the log
    status = episode.state[step]
    np.testing.assert_allclose(status[:4], [4.6, 0.01, 0.2, -0.02], atol=1e-6)
    np.testing.assert_array_equal(status[4:12], [*np.eye(4)[0], *np.eye(4)[1]])
    np.testing.assert_allclose(status[12:].reshape(5, 3), episode.actions[:5], atol=1e-6)
    # Frame 3 has three motions behind it: the oldest stands for the two before the log.
    early = episode.state[3 - 1][12:].reshape(5, 3)
    np.testing.assert_array_equal(early[0], early[2])
    # The eight motions of a moment lead to the poses that NAVSIM asks for.
    reached = compose_motions(episode.actions[step : step + 8])[-1]
    far = np.array([2.0 * 8, 0.1 * (14**2 - 6**2)])
    cos, sin = np.cos(yaw(6)), np.sin(yaw(6))
    wanted = [cos * far[0] + sin * far[1], -sin * far[0] + cos * far[1], 0.4]
    np.testing.assert_allclose(reached, wanted, atol=1e-5)


def test_token_lists_are_splits(tmp_path):
    write(tmp_path, tokens=[f"{i:016x}" for i in (5, 6, 9)])
    read = source(tmp_path, "navlist")
    assert [sum(map(bool, read[i].texts["token"])) for i in range(len(read))] == [2, 1]
    assert len(source(tmp_path, "navlist[1:]")) == 1


def test_future_images_may_be_absent_and_are_never_named(tmp_path):
    write(tmp_path, tokens=[f"{5:016x}"])
    folder = tmp_path / "sensor_blobs" / "mini" / LOG / "CAM_F0"
    for i in range(6, FRAMES):
        (folder / f"{i:016x}.jpg").unlink()
    (episode,) = source(tmp_path, "navlist")
    assert [bool(name) for name in episode.texts["image"]] == [True] * 3 + [False] * 7
    assert not episode.frames["image"][3:].any()
    (folder / f"{4:016x}.jpg").unlink()
    with pytest.raises(UserError, match=f"frame {4:016x}: no image .*{4:016x}.jpg; restore"):
        source(tmp_path, "navlist")[0]


def test_bad_datasets(tmp_path):
    with pytest.raises(UserError, match="is no NAVSIM dataset: no navsim_logs"):
        source(tmp_path)
    write(tmp_path, tokens=[f"{5:016x}", "f" * 16])
    with pytest.raises(UserError, match="has no split 'test'; it has mini, navlist"):
        source(tmp_path, "test")
    with pytest.raises(UserError, match="lists 1 tokens that are no scene of its logs, such as ff"):
        source(tmp_path, "navlist")


def test_a_truncated_log(tmp_path):
    write(tmp_path)
    path = tmp_path / "navsim_logs" / "mini" / f"{LOG}.pkl"
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(UserError, match=rf"{LOG}.pkl cannot be read as a log: .*; restore"):
        source(tmp_path)


def test_too_few_frames(tmp_path):
    write(tmp_path, [frame(i) for i in range(13)])
    with pytest.raises(UserError, match="its longest log has 13 frames, of which a scene needs 14"):
        source(tmp_path)


def test_poses_that_are_not_finite(tmp_path):
    frames = [frame(i) for i in range(FRAMES)]
    frames[7]["ego2global_translation"][0] = np.nan
    write(tmp_path, frames)
    with pytest.raises(UserError, match=f"the pose of frame {7:016x} is not finite"):
        source(tmp_path)[0]


def test_missing_fields(tmp_path):
    frames = [frame(i) for i in range(FRAMES)]
    del frames[2]["driving_command"]
    write(tmp_path, frames)
    with pytest.raises(UserError, match=r"frame 2 has no 'driving_command'"):
        source(tmp_path)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused(tmp_path):
    frames = [frame(i) for i in range(FRAMES)]
    frames[3]["anns"] = Malicious(tmp_path / "owned")
    write(tmp_path, frames)
    with pytest.raises(UserError, match=r"holds (posix|os|nt).mkdir, which could run code"):
        source(tmp_path)
    assert not (tmp_path / "owned").exists()
