"""Invalid episodes are recognized, skipped and counted; too many of them are an error."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.episodes import DATASET, make_episode
from univla_jax.data import datasets
from univla_jax.data.episode_reader import BrokenEpisodeError
from univla_jax.data.rlds_writer import write_rlds
from univla_jax.data.validation import (
    EpisodesConfig,
    InvalidEpisode,
    ValidEpisodes,
    check_invalid_fraction,
    describe_invalid,
    find_first_valid,
    validate_episode,
)
from univla_jax.errors import UserError

SIZES = {"image": (16, 24), "wrist_image": (8, 8)}


def with_nan(name):
    rows = getattr(make_episode(0), name).copy()
    rows[1, 2] = np.nan
    return {name: rows}


def without_a_frame():
    frames = dict(make_episode(0).frames)
    return {"frames": {**frames, "image": frames["image"][1:]}}


FILTERS = {"2 frames, at least 3": "min_frames", "instruction is empty": "instruction"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"state": None}, None),
        ({"steps": 2}, "2 frames, at least 3"),
        ({"instruction": "  "}, "instruction is empty"),
        ({"instruction": "go " * 4000}, "12000 characters"),
        ({"size": (16, 16)}, "expected uint8[3, 16, 24, 3]"),
        (without_a_frame(), "is uint8[2, 16, 24, 3]"),
        ({"frames": {"image": make_episode(0).frames["image"]}}, "'wrist_image' is missing"),
        (with_nan("actions"), "action of step 1 is not finite"),
        (with_nan("state"), "state of step 1 is not finite"),
        ({"actions": np.zeros((3, 6), np.float32)}, "expected [T, 7]"),
        ({"state": np.zeros((2, 4), np.float32)}, "2 states for 3 actions"),
    ],
)
def test_an_invalid_episode_has_a_reason(changes, reason):
    episode = make_episode(0, **changes)
    found = validate_episode(episode, min_frames=3, image_sizes=SIZES, action_dim=7)
    assert (found is None) if reason is None else (reason in found.reason)
    assert found is None or found.filter == FILTERS.get(reason, "")


def test_too_many_invalid_episodes_are_an_error():
    invalid = [InvalidEpisode(f"e{i}", "is blue") for i in range(5)]
    check_invalid_fraction(invalid, 100, 0.05, "set")
    check_invalid_fraction([], 1, 0.0, "set")
    with pytest.raises(
        UserError,
        match=r"5 of 50 episodes are broken .*over max_invalid_fraction=0.05.*e0: is blue",
    ):
        check_invalid_fraction(invalid, 50, 0.05, "set")
    with pytest.raises(UserError, match=r"none of 5 episodes is left: 5 broken \(e0: is blue"):
        check_invalid_fraction(invalid, 5, 1.0, "set")
    with pytest.raises(UserError, match="no episodes"):
        check_invalid_fraction([], 0, 1.0, "set")
    listed = "5 broken (e0: is blue; e1: is blue; e2: is blue; and 2 more)"
    assert describe_invalid(invalid) == listed
    filtered = [InvalidEpisode(f"f{i}", "short", "min_frames") for i in range(90)]
    assert describe_invalid([*filtered, *invalid], 1) == (
        "5 broken (e0: is blue; and 4 more); 90 filtered by min_frames (f0: short; and 89 more)"
    )
    check_invalid_fraction([*filtered, *invalid], 190, 0.05, "set")
    with pytest.raises(UserError, match="5 of 99 episodes are broken"):
        check_invalid_fraction([*filtered, *invalid], 189, 0.05, "set")


NOT_FINITE = make_episode(2, actions=np.full((5, 7), np.nan, np.float32))
EPISODES = [make_episode(0), make_episode(1), NOT_FINITE, make_episode(3), make_episode(4, steps=2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rlds")
    return write_rlds(path, "blocks", "1.0.0", {"train": EPISODES}, progress=False)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(datasets.DATASETS, "blocks", DATASET)


def ids(folder, **fields):
    episodes = ValidEpisodes(EpisodesConfig("blocks", **fields), folder, ["image"])
    return [episode.episode_id for episode in episodes]


def test_invalid_episodes_are_skipped_and_named(folder, capsys):
    assert ids(folder, max_invalid_fraction=0.5) == ["blocks-0", "blocks-1", "blocks-3"]
    errors = capsys.readouterr().err
    assert "2 episodes skipped: 1 broken (blocks-2: action of step 0 is not finite" in errors
    assert "1 filtered by min_frames (blocks-4: 2 frames, at least 3 are needed)" in errors
    assert len(ids(folder, max_invalid_fraction=0.5, min_frames=2)) == 4


def test_a_split_with_too_many_invalid_episodes_is_an_error(folder):
    with pytest.raises(
        UserError, match=r"1 of 4 episodes are broken \(over max_invalid_fraction=0\.05\)"
    ):
        ids(folder)


def test_a_part_of_the_episodes_is_spread_over_the_split(folder):
    assert ids(folder, max_episodes=2, max_invalid_fraction=0.5) == ["blocks-0", "blocks-3"]


def test_only_the_views_asked_for_are_decoded(folder):
    config = EpisodesConfig("blocks", max_invalid_fraction=0.5)
    assert [list(e.frames) for e in ValidEpisodes(config, folder)] == [[], [], []]
    with pytest.raises(UserError, match="no view 'side'; it has image, wrist_image"):
        ValidEpisodes(config, folder, ["side"])


class CountingReader:
    """Episodes that are broken but for some; counts those read."""

    folder = "set"

    def __init__(self, total, valid=(), short=()):
        self.total, self.valid, self.short, self.read = total, valid, short, []

    def __len__(self):
        return self.total

    def __getitem__(self, index):
        self.read.append(index)
        if index in self.valid:
            return make_episode(index, steps=5)
        if index in self.short:
            return make_episode(index, steps=1)
        raise BrokenEpisodeError(self.episode_id(index), "is blue")

    def episode_id(self, index):
        return f"e{index}"


def first_valid(reader):
    return find_first_valid(reader, min_frames=3, image_sizes={}).episode_id


def test_a_pass_over_broken_episodes_alone_ends_early():
    reader = CountingReader(100_000)
    with pytest.raises(UserError, match=r"no valid episode among .* of 100000: .* broken \(e0: is"):
        first_valid(reader)
    assert len(reader.read) <= 101 and max(reader.read) > 90_000


@pytest.mark.parametrize(
    ("reader", "expected", "most"),
    [
        (CountingReader(1000, valid=[0]), 0, 1),
        (CountingReader(1000, valid=[7, 9]), 7, 8),
        (CountingReader(1000, valid=range(100, 1000)), 100, 60),
        (CountingReader(1000, short=range(990), valid=[993]), 993, 1000),
    ],
)
def test_the_first_valid_episode_is_found(reader, expected, most):
    assert first_valid(reader) == f"blocks-{expected}" and len(reader.read) <= most
