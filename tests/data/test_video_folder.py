"""Folders of videos: lists of every form, names, segments, and damage."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest

from tests.data.episodes import read_all
from tests.data.test_video import levels, write_video
from univla_jax.data.datasets import DATASETS
from univla_jax.data.readers import open_reader
from univla_jax.errors import UserError

pytest.importorskip("av")

CLIPS = dataclasses.replace(DATASETS["something_something"], control_hz=4.0, min_frames=3)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Six seconds at 4 Hz that tell the frame by its level."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    write_video(path, range(0, 240, 10))
    return path


@pytest.fixture
def folder(clip, tmp_path):
    """Three videos, two of them with one name."""
    for name in ("12.mp4", "7.MP4", "walks/day.mp4", "runs/day.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(clip, tmp_path / name)
    return tmp_path


def write_list(folder, name, value):
    path = folder / name
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(value[0]))
            writer.writeheader()
            writer.writerows(value)
    else:
        path.write_text(json.dumps(value))


LISTS = {
    "train.json": {"12": "push", "7": "fold"},
    "labels-train.json": [{"id": "12", "label": "push"}, {"id": 7, "label": "fold"}],
    "something-something-v2-train.json": [
        {"id": "12", "label": "push", "template": "[something]"},
        {"id": "7", "label": "fold", "template": "[something]"},
    ],
    "train.csv": [{"video": "12.mp4", "text": "push"}, {"video": "7.MP4", "text": "fold"}],
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_every_form_are_read(folder, name):
    write_list(folder, name, LISTS[name])
    valid, invalid = read_all(folder, CLIPS)
    assert not invalid and sorted(e.instruction for e in valid.values()) == ["fold", "push"]
    assert {levels(e.frames["image"])[-1] for e in valid.values()} == {23}
    full = name.rpartition(".")[0]
    assert len(open_reader(folder, CLIPS, f"{full}[:50%]")) == 1


def test_other_lists_do_not_matter(folder):
    write_list(folder, "something-something-v2-train.json", [{"id": "12", "label": "push"}])
    write_list(folder, "something-something-v2-test.json", [{"id": "7"}])
    (folder / "notes.json").write_text("{not JSON")
    assert len(read_all(folder, CLIPS)[0]) == 1
    _, invalid = read_all(folder, CLIPS, "something-something-v2-test")
    assert invalid == {"something-something-v2-test/7": ("the instruction is empty", "instruction")}
    with pytest.raises(UserError, match=r"notes.json is no list of instructions"):
        open_reader(folder, CLIPS, "notes")
    with pytest.raises(UserError, match="no split 'validation'; it has notes, test, train, somet"):
        open_reader(folder, CLIPS, "validation")


SEGMENTS = {
    "train.json": {"12": [[0, 1.5, "reach"], [1.5, 4, "lift"]], "7": "fold"},
    "a-train.json": [
        {"video": "12", "start": 0, "end": 1.5, "text": "reach"},
        {"video": "12", "start": 1.5, "end": 4, "text": "lift"},
        {"video": "7", "text": "fold"},
    ],
    "train.csv": [
        {"video": "12", "start": "0", "end": "1.5", "text": "reach"},
        {"video": "12", "start": "1.5", "end": "4", "text": "lift"},
        {"video": "7", "start": "", "end": "", "text": "fold"},
    ],
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_segments_are_episodes(folder, name):
    write_list(folder, name, SEGMENTS[name])
    valid, invalid = read_all(folder, CLIPS)
    assert not invalid
    shown = {e.instruction: levels(e.frames["image"]) for e in valid.values()}
    assert shown == {
        "reach": list(range(6)),
        "lift": list(range(6, 16)),
        "fold": list(range(24)),
    }
    assert {"train/12@0-1.5", "train/7"} <= set(valid)


def test_long_videos_are_cut(folder):
    write_list(folder, "train.json", {"12": "walk", "7": [[0.5, 2.0, "stand"]]})
    config = dataclasses.replace(CLIPS, segment_seconds=2.5)
    valid, invalid = read_all(folder, config)
    assert [levels(e.frames["image"]) for e in valid.values()] == [
        list(range(10)),
        list(range(10, 20)),
        list(range(20, 24)),
        list(range(2, 8)),
    ]
    assert not invalid and len(open_reader(folder, config, "train[:50%]")) == 2


def test_videos_of_one_name_are_told_apart(folder):
    valid, _ = read_all(folder, dataclasses.replace(CLIPS, default_instruction="walk"))
    assert sorted(valid) == ["train/12", "train/7", "train/runs/day", "train/walks/day"]
    write_list(folder, "train.json", {"day": "walk", "runs/day": "run", "12": "push"})
    valid, invalid = read_all(folder, CLIPS)
    assert sorted(valid) == ["train/12", "train/runs/day"]
    assert "is 2 videos (runs/day.mp4, walks/day.mp4)" in invalid["train/day"][0]


def test_a_clip_that_is_listed_twice_is_two_episodes(folder):
    write_list(folder, "train.json", [{"id": "12", "label": "a"}, {"id": "12", "label": "b"}])
    assert sorted(read_all(folder, CLIPS)[0]) == ["train/12", "train/12#2"]


ENTRIES = {
    "no such video": ("99", "push", "no video '99'"),
    "no text": ("12", 5, "int 5 instead of a text"),
    "printed text": ("12", "['push']", "printed Python object"),
    "segment backwards": ("12", [[3, 1, "push"]], "begins at 3.0 s and ends at 1.0 s"),
    "segment of words": ("12", [["now", 3, "push"]], "could not convert string to float"),
    "segment after the end": ("12", [[50, 60, "push"]], "has no frames between 50 and 60"),
    "segment before the beginning": ("12", [[-1, 2, "push"]], "begins at -1.0 s"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_a_bad_entry_breaks_its_episode_alone(folder, case):
    name, entry, reason = ENTRIES[case]
    write_list(folder, "train.json", {"7": "fold", name: entry})
    valid, invalid = read_all(folder, CLIPS)
    assert list(valid) == ["train/7"]
    ((found, kind),) = invalid.values()
    assert reason in found and kind == ""


DAMAGES = {
    "cut short": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "a page": lambda data: b"<!DOCTYPE html>",
    "zeros": lambda data: data[:300] + bytes(len(data) - 300),
    "no video": lambda data: b"RIFF" + b"x" * 500,
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_video_breaks_its_episode_alone(folder, case):
    path = folder / "12.mp4"
    path.write_bytes(DAMAGES[case](path.read_bytes()))
    write_list(folder, "train.json", {"7": "fold", "12": "push"})
    valid, invalid = read_all(folder, CLIPS)
    assert list(valid) == ["train/7"] and "damaged or no video" in invalid["train/12"][0]


def test_clips_of_many_sizes_are_read(tmp_path):
    for number, size in enumerate(((16, 32), (32, 32), (48, 16))):
        write_video(tmp_path / f"{number}.mp4", range(0, 240, 10), size=size)
    valid, invalid = read_all(tmp_path, dataclasses.replace(CLIPS, default_instruction="x"))
    assert not invalid
    assert {e.frames["image"].shape[1:3] for e in valid.values()} == {(16, 32), (32, 32), (48, 16)}


def test_the_fields_of_an_entry_can_filter(folder):
    write_list(
        folder, "train.json", [{"id": i, "label": "x", "good": i == "7"} for i in ("7", "12")]
    )
    config = dataclasses.replace(CLIPS, episode_filters={"good": True})
    valid, invalid = read_all(folder, config)
    assert list(valid) == ["train/7"] and invalid["train/12"][1] == "episode_filters"


def test_actions_are_empty(folder):
    (folder / "train.json").write_text('{"12": "push"}')
    assert read_all(folder, CLIPS)[0]["train/12"].actions.shape == (24, 0)
    assert np.isclose(open_reader(folder, CLIPS, "train").control_hz, 4)
