"""LeRobot datasets of both formats, as an ALOHA writes them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from tests.data import lerobot_files
from tests.data.episodes import read_all
from tests.data.test_video import levels, write_video
from univla_jax.data.action_conventions import action_field
from univla_jax.data.datasets import DATASETS
from univla_jax.data.episode_reader import DatasetMismatchError
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


# ----------------------------------------------------------------------------
# Files as people have them: one bad episode is named and the others are read.


def with_null(key, step=3, part=None):
    """A null in a column of episode 2: the whole cell, or one number of its vector."""

    def change(number, table):
        if number == 2 and part is None:
            table[key][step] = None
        elif number == 2:
            table[key][step][part] = None

    return change


def with_cell(key, value, step=3):
    def change(number, table):
        if number == 2:
            table[key][step] = value

    return change


def lengthened(number, table):
    if number == 2:
        table["action"][4] = table["action"][4] + [1.0]


def without(key):
    def change(number, table):
        if number == 2:
            del table[key]

    return change


CELLS = {
    "null vector": (with_null("action"), "action: a value of step 3 is null"),
    "null number": (with_null("action", part=5), "action: a value of step 3 is null"),
    "null state": (with_null("observation.state", step=0), "a value of step 0 is null"),
    "NaN": (with_null("action", part=0), "null"),
    "vector of another length": (lengthened, "vectors of 7 to 8 numbers"),
    "infinite number": (with_cell("action", [float("inf")] * 7), "step 3 is not finite"),
    "no task of that number": (with_cell("task_index", 9, step=0), "task_index 9 is not in"),
    "null picture": (with_null(lerobot_files.CAMERA), "the image of step 3 is NoneType"),
    "broken picture": (
        with_cell(lerobot_files.CAMERA, {"bytes": b"\x89PNG\r\n\x1a\n broken", "path": None}),
        "image of step 3 is damaged: it is cut short",
    ),
    "no picture": (
        with_cell(lerobot_files.CAMERA, {"bytes": b"GIF8 no more", "path": None}),
        "image of step 3 is damaged: cannot identify",
    ),
    "depth": (
        with_cell(lerobot_files.CAMERA, {"bytes": lerobot_files.png(900, "I;16"), "path": None}),
        "of mode I;16, such as depth",
    ),
    "picture of another size": (
        with_cell(lerobot_files.CAMERA, {"bytes": lerobot_files.png(0, size=(8, 8)), "path": None}),
        "different sizes: (16, 32) at step 0, (8, 8) at step 3",
    ),
    "empty cell": (
        with_cell(lerobot_files.CAMERA, {"bytes": None, "path": None}),
        "the image of step 3 is dict",
    ),
    "picture that is nowhere": (
        with_cell(lerobot_files.CAMERA, {"bytes": None, "path": "images/a.png"}),
        "images/a.png, the image of step 3",
    ),
}


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("case", CELLS)
def test_a_damaged_cell_breaks_its_episode_alone(tmp_path, version, case):
    change, reason = CELLS[case]
    lerobot_files.write(tmp_path / "set", version, change=change)
    valid, invalid = read_all(tmp_path / "set", lerobot_files.CONFIG)
    assert sorted(valid) == [f"episode_{n:06d}" for n in (0, 1, 3)]
    assert list(invalid) == ["episode_000002"]
    assert reason in invalid["episode_000002"][0] and invalid["episode_000002"][1] == ""


def test_pictures_in_files_of_their_own_are_read(tmp_path):
    def change(number, table):
        for step in range(len(table[lerobot_files.CAMERA])):
            path = tmp_path / "set" / f"images/{number}-{step}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(lerobot_files.png((step, number, 0)))
            relative = str(path.relative_to(tmp_path / "set"))
            table[lerobot_files.CAMERA][step] = {"bytes": None, "path": relative}

    lerobot_files.write(tmp_path / "set", change=change)
    valid, invalid = read_all(tmp_path / "set", lerobot_files.CONFIG)
    assert not invalid
    np.testing.assert_array_equal(valid["episode_000003"].frames["image"][5, 2, 3], (5, 3, 0))


COLUMNS = {
    "action": "no column 'action', which info.json lists",
    "observation.state": "no column 'observation.state'",
    lerobot_files.CAMERA: "no column 'observation.images.top'",
}


@pytest.mark.parametrize("key", COLUMNS)
def test_a_file_without_a_column_breaks_its_episode_alone(tmp_path, key):
    lerobot_files.write(tmp_path / "set", change=without(key))
    valid, invalid = read_all(tmp_path / "set", lerobot_files.CONFIG)
    assert len(valid) == 3 and COLUMNS[key] in invalid["episode_000002"][0]


@pytest.mark.parametrize("key", ["task_index", "episode_index"])
def test_columns_that_the_metadata_can_stand_in_for_may_be_absent(tmp_path, key):
    lerobot_files.write(tmp_path / "set", change=without(key))
    valid, invalid = read_all(tmp_path / "set", lerobot_files.CONFIG)
    assert not invalid and valid["episode_000002"].instruction == lerobot_files.TASKS[0]


TASKS_OF_A_FILE = {
    "printed bytes": (["[b'stack the cubes']", "pour"], "printed Python object", ""),
    "printed text": (["b'stack'", "pour"], "printed Python object", ""),
    "printed list": (["['stack', 'pour']", "pour"], "printed Python object", ""),
    "None": (["None", "pour"], "instruction is empty", "instruction"),
    "NaN": (["nan", "pour"], "instruction is empty", "instruction"),
    "nothing": (["  ", "pour"], "instruction is empty", "instruction"),
}


@pytest.mark.parametrize("case", TASKS_OF_A_FILE)
def test_texts_that_are_no_instructions_are_noticed(tmp_path, case):
    tasks, reason, kind = TASKS_OF_A_FILE[case]
    lerobot_files.write(tmp_path / "set", tasks=tasks)
    valid, invalid = read_all(tmp_path / "set", lerobot_files.NO_VIEWS)
    assert {e.instruction for e in valid.values()} == {"pour"}
    assert [(reason in r, f) for r, f in invalid.values()] == [(True, kind)] * 2


# ----------------------------------------------------------------------------
# Frames of packed videos: those of the episode, or a complaint.


def shifted_times(times):
    def episodes(rows):
        for row, time in zip(rows, times):
            row[f"videos/{lerobot_files.CAMERA}/from_timestamp"] = time

    return episodes


EXACT = np.cumsum([0, 12, 15, 9]) / lerobot_files.FPS
TIMES = {
    "exact": EXACT,
    "rounded up by half a frame": EXACT + [0, 0.02, 0.04, 0.051],
    "too late, more and more": EXACT + [0, 0.1, 0.2, 0.3],
    "too early": EXACT - [0, 0.12, 0.15, 0.21],
}


def frame_shifts(episode):
    """Where its frames are and where its actions say that they belong, in steps."""
    shown = np.rint(episode.frames["image"].mean((1, 2, 3)) / 4)
    return set((shown - episode.actions[:, 0]).astype(int).tolist())


@pytest.mark.parametrize("case", TIMES)
def test_frames_of_packed_videos_are_those_of_the_episode(tmp_path, case):
    lerobot_files.write(
        tmp_path / "set", "v3.0", images=False, episodes=shifted_times(TIMES[case].tolist())
    )
    valid, invalid = read_all(tmp_path / "set", lerobot_files.CONFIG)
    assert not invalid and len(valid) == 4
    assert {shift for e in valid.values() for shift in frame_shifts(e)} == {0}


@pytest.mark.parametrize(
    ("frames", "begin", "broken"),
    [
        (48, 0.0, [3]),  # two lost at the end
        (30, 0.0, [2, 3]),
        (55, 0.0, []),  # more than the episodes have
        (55, 0.3, [1, 2, 3]),  # and it does not begin at 0: no telling which
    ],
)
def test_videos_with_other_frames_than_the_table_are_told(tmp_path, frames, begin, broken):
    lerobot_files.write(tmp_path / "set", "v3.0", images=False)
    path = next((tmp_path / "set").rglob("*.mp4"))
    path.unlink()
    lerobot_files.write_shades(path, 0, frames, begin=begin)
    valid, invalid = read_all(tmp_path / "set", lerobot_files.CONFIG)
    assert sorted(invalid) == [f"episode_{n:06d}" for n in broken]
    assert all(f"has {frames} frames" in reason for reason, _ in invalid.values())
    assert {shift for e in valid.values() for shift in frame_shifts(e)} <= {0}


def test_a_video_that_begins_late_is_read_from_its_first_frame(tmp_path):
    lerobot_files.write(tmp_path / "set", "v3.0", images=False)
    path = next((tmp_path / "set").rglob("*.mp4"))
    path.unlink()
    lerobot_files.write_shades(path, 0, 50, begin=0.2)
    valid, _ = read_all(tmp_path / "set", lerobot_files.CONFIG)
    assert {shift for e in valid.values() for shift in frame_shifts(e)} == {0}


# ----------------------------------------------------------------------------
# The dataset as a whole.


def test_the_rate_is_that_of_the_dataset(tmp_path, capsys):
    lerobot_files.write(tmp_path / "set", fps=50)
    reader = open_reader(tmp_path / "set", lerobot_files.CONFIG, "train")
    assert reader.control_hz == reader[0].control_hz == 50
    assert "50 steps per second" in capsys.readouterr().err


MISMATCHES = {
    "no camera": ({"views": {"image": "observation.images.side"}}, "no field 'observation.images"),
    "a camera of numbers": ({"views": {"image": "action"}}, "'action' .* is float32 .*video or"),
    "a state of pictures": ({"state": lerobot_files.CAMERA}, "is image .*, expected float32"),
    "an instruction of numbers": ({"instruction": ("action",)}, "'action' .* is no text"),
    "no actions": ({"actions": action_field("actions.delta")}, "no field 'actions.delta'"),
    "no filter": ({"episode_filters": {"success": True}}, "no field 'success'"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_config_that_does_not_fit_ends_before_the_pass(tmp_path, case):
    changes, message = MISMATCHES[case]
    lerobot_files.write(tmp_path / "set")
    with pytest.raises(DatasetMismatchError, match=message):
        open_reader(
            tmp_path / "set", dataclasses.replace(lerobot_files.CONFIG, **changes), "train"
        )[0]


def test_episodes_without_success_are_filtered(tmp_path):
    lerobot_files.write(tmp_path / "set")
    config = dataclasses.replace(lerobot_files.CONFIG, episode_filters={"next.success": True})
    valid, invalid = read_all(tmp_path / "set", config)
    assert len(valid) == 3
    assert invalid == {"episode_000001": ("next.success is False, not True", "episode_filters")}
