"""Metadata of LeRobot datasets with gaps: the episode that they belong to is named."""

from __future__ import annotations

import json

import pytest

from tests.data import lerobot_files
from tests.data.episodes import read_all
from univla_jax.data.lerobot_metadata import LeRobotMetadata
from univla_jax.data.readers import open_reader
from univla_jax.errors import UserError

pytest.importorskip("pyarrow")
pytest.importorskip("av")
VIDEO = f"videos/{lerobot_files.CAMERA}"


def with_value(key, value, number=2):
    def change(rows):
        rows[number][key] = value

    return change


def without_row(rows):
    del rows[2]


def twice(rows):
    rows.append({**rows[2], "length": 3})


ROWS = {
    "null length": (with_value("length", None), "length None, expected a number of steps"),
    "another length": (with_value("length", 8), "9 steps of episode 2, the metadata say 8"),
    "negative length": (with_value("length", -9), "length -9"),
    "no row": (without_row, "the metadata do not list it"),
    "two rows": (twice, "listed twice and differ"),
    "null index": (with_value("episode_index", None), "row 2, are damaged"),
}
V3_ROWS = {
    "null file": (with_value("data/file_index", None), "unsupported format string"),
    "no such file": (with_value("data/file_index", 9), "no file .*file-009.parquet"),
    "null video": (with_value(f"{VIDEO}/file_index", None), "no place in a video of"),
    "null time": (with_value(f"{VIDEO}/from_timestamp", None), "no place in a video of"),
    "negative time": (with_value(f"{VIDEO}/from_timestamp", -2.0), "no place in a video of"),
    "no such video": (with_value(f"{VIDEO}/file_index", 9), "no video .*file-009.mp4"),
}


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("case", ROWS)
def test_a_gap_breaks_its_episode_alone(tmp_path, version, case):
    change, reason = ROWS[case]
    lerobot_files.write(tmp_path / "set", version, episodes=change)
    valid, invalid = read_all(tmp_path / "set", lerobot_files.NO_VIEWS)
    assert sorted(valid) == [f"episode_{n:06d}" for n in (0, 1, 3)]
    assert list(invalid) == ["episode_000002"] and reason in invalid["episode_000002"][0]


@pytest.mark.parametrize("case", V3_ROWS)
def test_a_gap_in_the_places_of_packed_files_breaks_its_episode_alone(tmp_path, case):
    change, reason = V3_ROWS[case]
    lerobot_files.write(tmp_path / "set", "v3.0", images=False, episodes=change)
    valid, invalid = read_all(tmp_path / "set", lerobot_files.CONFIG)
    assert sorted(valid) == [f"episode_{n:06d}" for n in (0, 1, 3)]
    assert list(invalid) == ["episode_000002"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(invalid["episode_000002"][0])
    # Frames are numbered by the episodes before, of which one is unknown: the times must do.
    for episode in valid.values():
        shown = episode.frames["image"].mean((1, 2, 3)) / 4
        assert abs(shown - episode.actions[:, 0]).max() < 0.5


@pytest.mark.parametrize("line", ["{", "null", "[1]", '{"episode_index": "two"}', "\xff"])
def test_a_damaged_line_breaks_its_episode_alone(tmp_path, line):
    path = lerobot_files.write(tmp_path / "set") / "meta" / "episodes.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = line
    path.write_text("\n".join(lines), encoding="latin-1")
    valid, invalid = read_all(tmp_path / "set", lerobot_files.NO_VIEWS)
    assert len(valid) == 3 and "row 2, are damaged" in invalid["episode_000002"][0]


SPLITS = {
    "train": ({"train": "0:4"}, [0, 1, 2, 3]),
    "val": ({"train": "0:3", "val": "3:4"}, [3]),
    "val[:50%]": ({"val": "2:4"}, [2]),
    "my-split.v2": ({"my-split.v2": "1:3"}, [1, 2]),
    "train[1:]": ({"train": ":2"}, [1]),
    "train[2:]": (None, [2, 3]),
}


@pytest.mark.parametrize("split", SPLITS)
def test_splits_are_ranges_of_episodes(tmp_path, split):
    splits, expected = SPLITS[split]
    lerobot_files.write(tmp_path / "set", splits=splits)
    valid, invalid = read_all(tmp_path / "set", lerobot_files.NO_VIEWS, split)
    assert list(valid) == [f"episode_{n:06d}" for n in expected] and not invalid


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ("all", "split 'train' is 'all', expected a range of episodes"),
        ("0-4", "expected a range"),
        (None, "expected a range"),
        ("0:400", "the metadata list 4 episodes, split 'train' is '0:400'"),
        ("4:4", "holds no episodes"),
    ],
)
def test_a_split_that_is_no_range_is_named(tmp_path, limits, message):
    lerobot_files.write(tmp_path / "set", splits={"train": limits})
    with pytest.raises(UserError, match=message):
        open_reader(tmp_path / "set", lerobot_files.NO_VIEWS, "train")


@pytest.mark.parametrize(
    ("feature", "size"),
    [
        ({"shape": [16, 32, 3], "names": ["height", "width", "channel"]}, (16, 32)),
        ({"shape": [3, 16, 32], "names": ["channels", "height", "width"]}, (16, 32)),
        ({"shape": [3, 16, 32], "names": None}, (16, 32)),
        ({"shape": [16, 32, 3], "names": {"axes": ["h", "w", "c"]}}, (16, 32)),
        ({"shape": [16, 32, 3]}, (16, 32)),
        ({"shape": [None, None, 3], "names": None}, None),
        ({"shape": None}, None),
        ({}, None),
    ],
)
def test_image_sizes_are_found_whatever_the_names(tmp_path, feature, size):
    folder = lerobot_files.write(tmp_path / "set")
    path = folder / "meta" / "info.json"
    info = json.loads(path.read_text())
    info["features"]["odd/{name}"] = {"dtype": "video", **feature}
    path.write_text(json.dumps(info))
    assert LeRobotMetadata(folder, ["odd/{name}"]).image_size("odd/{name}") == size


@pytest.mark.parametrize(
    "change",
    [
        lambda info: info.pop("features"),
        lambda info: info.update(features=None),
        lambda info: info.update(features=[1]),
        lambda info: info.pop("fps"),
        lambda info: info.update(fps="fast"),
        lambda info: info.update(data_path=None),
        lambda info: info.update(data_path="{nothing}"),
        lambda info: info.update(chunks_size=0),
    ],
)
def test_damaged_info_is_told_in_one_line(tmp_path, change):
    folder = lerobot_files.write(tmp_path / "set")
    path = folder / "meta" / "info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))
    try:
        valid, invalid = read_all(folder, lerobot_files.NO_VIEWS)
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
    else:
        assert not valid and len(invalid) == 4
