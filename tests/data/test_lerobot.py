"""LeRobot datasets of both formats, as an ALOHA writes them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.data.test_video import levels, write_video
from univla_jax.data.datasets import DATASETS
from univla_jax.data.readers import open_reader
from univla_jax.errors import UserError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

CORPUS = DATASETS["aloha"]
CAMERAS = tuple(CORPUS.views.values())
LENGTHS = (5, 7)
TASKS = ("fold the towel", "pour the water")


def info(version, **paths):
    features = {
        camera: {"dtype": "video", "shape": [16, 32, 3], "names": ["height", "width", "channels"]}
        for camera in CAMERAS
    }
    features |= {k: {"dtype": "float32", "shape": [14]} for k in ("action", "observation.state")}
    return {
        "codebase_version": version,
        "fps": 4,
        "chunks_size": 1000,
        "total_episodes": 2,
        "features": features,
        "splits": {"train": "0:2"},
        **paths,
    }


def table(number):
    steps = LENGTHS[number]
    values = np.full((steps, 14), number, np.float32) + np.arange(steps, dtype=np.float32)[:, None]
    return {
        "action": list(values),
        "observation.state": list(values + 100),
        "episode_index": [number] * steps,
        "task_index": [number] * steps,
    }


def save(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(rows), path)


def shades(number):
    return [10 * (t + 8 * number) for t in range(LENGTHS[number])]


def write_v21(folder):
    data = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    video = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    meta = folder / "meta"
    meta.mkdir(parents=True)
    described = info("v2.1", data_path=data, video_path=video)
    (meta / "info.json").write_text(json.dumps(described))
    for number in range(2):
        place = {"episode_chunk": 0, "episode_index": number}
        save(folder / data.format(**place), table(number))
        for camera in CAMERAS:
            write_video(folder / video.format(video_key=camera, **place), shades(number))
    lines = [{"episode_index": n, "length": LENGTHS[n], "tasks": [TASKS[n]]} for n in range(2)]
    (meta / "episodes.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    lines = [{"task_index": n, "task": TASKS[n]} for n in range(2)]
    (meta / "tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))


def write_v3(folder):
    data = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    video = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    meta = folder / "meta"
    meta.mkdir(parents=True)
    described = info("v3.0", data_path=data, video_path=video)
    (meta / "info.json").write_text(json.dumps(described))
    both = [table(number) for number in range(2)]
    first = {"chunk_index": 0, "file_index": 0}
    save(folder / data.format(**first), {k: both[0][k] + both[1][k] for k in both[0]})
    rows = {
        "episode_index": [0, 1],
        "length": list(LENGTHS),
        "data/chunk_index": [0, 0],
        "data/file_index": [0, 0],
    }
    for camera in CAMERAS:
        write_video(folder / video.format(video_key=camera, **first), shades(0) + shades(1))
        rows |= {f"videos/{camera}/{key}": [0, 0] for key in ("chunk_index", "file_index")}
        rows[f"videos/{camera}/from_timestamp"] = [0.0, LENGTHS[0] / 4]
    save(meta / "episodes" / "chunk-000" / "file-000.parquet", rows)
    save(meta / "tasks.parquet", {"task_index": [0, 1], "__index_level_0__": list(TASKS)})


@pytest.fixture(params=[write_v21, write_v3], ids=["v2.1", "v3.0"])
def folder(request, tmp_path):
    request.param(tmp_path / "aloha")
    return tmp_path / "aloha"


def test_both_formats_hold_the_same_episodes(folder):
    read = open_reader(folder, CORPUS, "train")
    assert len(read) == 2 and set(read.image_sizes.values()) == {(16, 32)}
    for number, episode in enumerate(read):
        assert episode.instruction == TASKS[number]
        expected = number + np.arange(LENGTHS[number])
        np.testing.assert_array_equal(episode.actions[:, 3], expected)
        np.testing.assert_array_equal(episode.state[:, 13], expected + 100)
        for frames in episode.frames.values():
            assert levels(frames) == [level // 10 for level in shades(number)]
        assert episode.episode_id == f"episode_{number:06d}"


def test_splits_and_mistakes(folder):
    assert len(open_reader(folder, CORPUS, "train[1:]")) == 1
    with pytest.raises(UserError, match="no split 'test'"):
        open_reader(folder, CORPUS, "test")
    (next((folder / "data").rglob("*.parquet"))).write_bytes(b"PAR1 and no more")
    read = open_reader(folder, CORPUS, "train")
    with pytest.raises(UserError, match=r"parquet is damaged"):
        list(read)
    described = json.loads((folder / "meta" / "info.json").read_text())
    del described["features"]["observation.state"]
    (folder / "meta" / "info.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"no field 'observation.state'"):
        open_reader(folder, CORPUS, "train")
    (folder / "meta" / "info.json").write_text('{"codebase_version": "v1.6"}')
    with pytest.raises(UserError, match=r"LeRobot 'v1.6', expected v2.0, v2.1, v3.0"):
        open_reader(folder, CORPUS, "train")
