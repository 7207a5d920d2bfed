"""Episodes continued by given actions: the command's work, and files that do not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.inference import tiny_unified
from univla_jax.errors import UserError
from univla_jax.evaluation import obeyed_episodes
from univla_jax.evaluation.imagined_episodes import ImagineConfig

CONFIG = ImagineConfig(episodes=2, frames=2, shown=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unified")
    return tiny_unified.save(folder, "policy", "dynamics", "world_model")


@pytest.mark.slow
def test_recorded_and_own_actions_are_done(checkpoint, demonstrations, tmp_path):
    arguments = CONFIG, checkpoint, demonstrations
    report = obeyed_episodes.obey(*arguments, "recorded", tmp_path / "recorded")
    assert report["episodes"] == 2 and report["chunks"] == 2
    assert set(report["views"]) == {"image", "wrist_image"}
    shares = report["views"]["image"]["repeated frame"]
    assert 0 < shares["psnr"] < 99 and (tmp_path / "recorded" / "obeyed.png").exists()
    assert "given actions" in obeyed_episodes.table(tmp_path / "recorded")
    np.save(tmp_path / "own.npy", np.zeros((6, 7)))
    own = obeyed_episodes.obey(*arguments, str(tmp_path / "own.npy"), tmp_path / "own")
    assert own["chunks"] == 2 and "views" not in own
    assert json.loads((tmp_path / "own" / "obey.json").read_text())["episodes"] == 2


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((7, 7)), "7 steps; give a whole number of chunks of 3 steps"),
        (np.zeros((0, 7)), "0 steps"),
        (np.zeros(7), r"expected an array \[steps, A\]"),
        (np.zeros((3, 3, 7)), "of 3 episodes, but 2 are continued"),
        (np.zeros((3, 6)), "chunks of 3 steps and 6 dimensions; the model was trained on 3 and 7"),
        (np.full((3, 7), np.inf), "not finite"),
        (None, "is no array file"),
    ],
)
def test_a_file_that_does_not_fit_is_named(checkpoint, demonstrations, tmp_path, array, message):
    path = tmp_path / "actions.npy"
    path.write_text("no array") if array is None else np.save(path, array)
    with pytest.raises(UserError, match=message):
        obeyed_episodes.obey(CONFIG, checkpoint, demonstrations, str(path), tmp_path / "out")
