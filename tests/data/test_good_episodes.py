"""Broken episodes are left out and named; too many of them are an error."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.episodes import CORPUS, make_episode
from univla_jax.data import datasets
from univla_jax.data.rlds_writer import write_rlds
from univla_jax.data.validation import EpisodesConfig, ValidEpisodes
from univla_jax.errors import UserError

BROKEN = make_episode(2, actions=np.full((5, 7), np.nan, np.float32))
EPISODES = [make_episode(0), make_episode(1), BROKEN, make_episode(3), make_episode(4, steps=2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rlds")
    return write_rlds(path, "blocks", "1.0.0", {"train": EPISODES}, progress=False)


@pytest.fixture(autouse=True)
def row(monkeypatch):
    monkeypatch.setitem(datasets.DATASETS, "blocks", CORPUS)


def ids(folder, **fields):
    episodes = ValidEpisodes(EpisodesConfig("blocks", **fields), folder, ["image"])
    return [episode.episode_id for episode in episodes]


def test_broken_ones_are_left_out_and_named(folder, capsys):
    assert ids(folder, max_invalid_fraction=0.5) == ["blocks-0", "blocks-1", "blocks-3"]
    said = capsys.readouterr().err
    assert "2 broken: blocks-2: action of step 0 is not finite" in said
    assert "blocks-4: 2 frames, at least 3 are needed" in said
    assert len(ids(folder, max_invalid_fraction=0.5, min_frames=2)) == 4


def test_too_many_are_an_error(folder):
    with pytest.raises(
        UserError, match=r"2 of 5 episodes are broken \(over max_invalid_fraction=0\.05\)"
    ):
        ids(folder)


def test_a_part_of_the_episodes_is_spread_over_the_split(folder):
    assert ids(folder, max_episodes=2, max_invalid_fraction=0.5) == ["blocks-0", "blocks-3"]


def test_only_the_views_asked_for_are_decoded(folder):
    config = EpisodesConfig("blocks", max_invalid_fraction=0.5)
    assert [list(e.frames) for e in ValidEpisodes(config, folder)] == [[], [], []]
    with pytest.raises(UserError, match="no view 'side'; it has image, wrist_image"):
        ValidEpisodes(config, folder, ["side"])
