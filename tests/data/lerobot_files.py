"""Writes small LeRobot datasets of both formats, with anything in them changed."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
from PIL import Image

from tests.data.test_video import write_video
from univla_jax.data.datasets import DatasetConfig

CAMERA = "observation.images.top"
TASKS = ("fold the towel", "pour the water")
LENGTHS = (12, 15, 9, 14)
FPS = 10
CONFIG = DatasetConfig(
    "mine",
    views={"image": CAMERA},
    image_sizes={"image": (16, 16)},
    control_hz=FPS,
    frame_spacing=5,
    instruction=("task",),
    state="observation.state",
    min_frames=3,
    reader="lerobot",
)
"""A camera, a state and actions as the files here have them."""
NO_VIEWS = dataclasses.replace(CONFIG, views={}, image_sizes={})


def png(level, mode="RGB", size=(32, 16)):
    """An encoded picture of one level."""
    buffer = io.BytesIO()
    Image.new(mode, size, level).save(buffer, "png")
    return buffer.getvalue()


def columns(number, length, images):
    """One episode's columns; actions say how many steps came before, over all episodes."""
    before = sum(LENGTHS[:number])
    steps = np.arange(before, before + length, dtype=np.float32)
    made = {
        "action": np.repeat(steps[:, None], 7, 1).tolist(),
        "observation.state": np.zeros((length, 7), np.float32).tolist(),
        "episode_index": [number] * length,
        "task_index": [number % 2] * length,
        "next.success": [False] * (length - 1) + [number != 1],
    }
    if images:
        made[CAMERA] = [{"bytes": png((int(4 * s), 0, 0)), "path": None} for s in steps]
    return made


def info(version, images, **changes):
    """Content of ``info.json``."""
    video = {"dtype": "image" if images else "video", "shape": [16, 32, 3]}
    numbers = {"dtype": "float32", "shape": [7], "names": {"motors": list("xyzrpyg")}}
    features = {CAMERA: {**video, "names": ["height", "width", "channel"]}}
    features |= {name: numbers for name in ("action", "observation.state")}
    features["next.success"] = {"dtype": "bool", "shape": [1], "names": None}
    v3 = version == "v3.0"
    place = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    episode = "episode_{episode_index:06d}"
    return {
        "codebase_version": version,
        "fps": FPS,
        "chunks_size": 1000,
        "features": features,
        "splits": {"train": f"0:{len(LENGTHS)}"},
        "data_path": f"data/{place}.parquet"
        if v3
        else f"data/chunk-{{episode_chunk:03d}}/{episode}.parquet",
        "video_path": f"videos/{{video_key}}/{place}.mp4"
        if v3
        else f"videos/chunk-{{episode_chunk:03d}}/{{video_key}}/{episode}.mp4",
        **changes,
    }


def write_shades(path, first, count, **options):
    """A video of frames that tell their number, from ``first`` on."""
    levels = [4 * number for number in range(first, first + count)]
    write_video(path, levels, rate=FPS, codec="libx264", crf="0", preset="ultrafast", **options)


def save(path, rows):
    """A table as Parquet."""
    import pyarrow as pa
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(rows), path, write_page_checksum=True)


def write(folder, version="v2.1", *, images=True, change=None, episodes=None, tasks=None, **fields):
    """Writes ``len(LENGTHS)`` episodes.

    Args:
      folder: of the dataset.
      version: ``"v2.1"`` or ``"v3.0"``.
      images: pictures in the tables instead of videos.
      change: called with (number, columns) before an episode is written.
      episodes: called with the rows of the episode table before they are written.
      tasks: instructions; None where the file of tasks is left out.
      fields: of ``info.json``.
    """
    tasks, meta = TASKS if tasks is None else tasks, folder / "meta"
    meta.mkdir(parents=True)
    described = info(version, images, **fields)
    (meta / "info.json").write_text(json.dumps(described))
    made = [columns(n, length, images) for n, length in enumerate(LENGTHS)]
    for number, table in enumerate(made):
        if change is not None:
            change(number, table)
    rows = [
        {"episode_index": n, "length": length, "tasks": [TASKS[n % 2]]}
        for n, length in enumerate(LENGTHS)
    ]
    begins = np.cumsum([0, *LENGTHS[:-1]]) / FPS
    place = {"chunk_index": 0, "file_index": 0}
    if version == "v3.0":
        for row, begin in zip(rows, begins):
            row |= {f"data/{key}": 0 for key in place}
            row |= {f"videos/{CAMERA}/{key}": 0 for key in place}
            row[f"videos/{CAMERA}/from_timestamp"] = float(begin)
    if episodes is not None:
        episodes(rows)
    if version == "v3.0":
        joined = {key: [x for table in made for x in table[key]] for key in made[0]}
        save(folder / described["data_path"].format(**place), joined)
        if not images:
            path = described["video_path"].format(video_key=CAMERA, **place)
            write_shades(folder / path, 0, sum(LENGTHS))
        names = dict.fromkeys(key for row in rows for key in row)
        table = {key: [row.get(key) for row in rows] for key in names}
        save(meta / "episodes" / "chunk-000" / "file-000.parquet", table)
        save(
            meta / "tasks.parquet",
            {"task_index": list(range(len(tasks))), "__index_level_0__": list(tasks)},
        )
        return folder
    for number, table in enumerate(made):
        keys = {"episode_chunk": 0, "episode_index": number}
        save(folder / described["data_path"].format(**keys), table)
        if not images:
            begin = sum(LENGTHS[:number])
            path = described["video_path"].format(video_key=CAMERA, **keys)
            write_shades(folder / path, begin, LENGTHS[number])
    (meta / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [{"task_index": n, "task": task} for n, task in enumerate(tasks)]
    (meta / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
