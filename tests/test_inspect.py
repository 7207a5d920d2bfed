"""The page and table to look at before training."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.data.episodes import DATASET, make_episode
from tests.training import tiny_run
from univla_jax.data import datasets
from univla_jax.data.data_report import make_report, render_report
from univla_jax.data.rlds_writer import write_rlds
from univla_jax.data.validation import EpisodesConfig
from univla_jax.errors import UserError
from univla_jax.inspect import inspect_source, inspect_store
from univla_jax.normalization import ActionStatistics
from univla_jax.tokenizers.vision import VisionTokenizer


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "store"
    tiny_run.make_store(folder, vision="another")
    return folder


def test_a_store_is_described(store):
    report, strips = inspect_store(str(store))
    assert (report.episodes, report.total, report.corpus) == (12, 12, "tabletop")
    assert sum(report.instructions.values()) == 12 and len(report.instructions) == 3
    assert report.lengths[0] == 8 and report.lengths[100] == 10
    assert len(report.dimensions) == 7 and not report.duplicates and not strips
    assert all(0 <= d.clipped < 0.05 and not d.near_constant for d in report.dimensions)
    page = render_report(report)
    assert page.count("<svg") == 8 and "push the red block" in page and "http" not in page
    few, _ = inspect_store(str(store), episodes=4)
    assert few.episodes == 4 and few.total == 12


@pytest.mark.slow
def test_the_frames_of_a_store_are_shown(store, tmp_path):
    world = tiny_run.make_world(tmp_path)
    vision = VisionTokenizer.load(world / "vision")
    report, strips = inspect_store(str(world / "store"), vision, strips=2)
    assert {s.view for s in strips} == {"image", "wrist_image"} and len(strips) == 4
    assert strips[0].picture.shape == (24, 6 * 24, 3)
    assert render_report(report, strips).count("data:image/png") == 4
    with pytest.raises(UserError, match="another vision tokenizer"):
        inspect_store(str(store), vision)


def test_what_a_careful_person_would_see_is_said():
    rng = np.random.default_rng(0)
    episodes = []
    for number in range(20):
        episode = make_episode(number, steps=50)
        actions = np.array(episode.actions)
        actions[:, 6] = 0
        actions[0, 6] = number == 3
        actions[:, 5] = rng.standard_cauchy(50)
        episodes.append(dataclasses.replace(episode, actions=actions))
    episodes.append(dataclasses.replace(episodes[2], episode_id="again"))
    low = (-9.0,) * 5 + (-0.1, 0.0)
    high = (9.0,) * 5 + (0.1, 0.0)
    statistics = ActionStatistics(low, high, q01=low, q99=high)
    settings = {"name": "blocks", "total": 21, "chunk_size": 5}
    report = make_report(episodes, statistics=statistics, **settings)
    warnings = "; ".join(report.warnings)
    assert "action dimension 6 is in one place in 99." in warnings
    assert "action dimension 6 is normalized to one value" in warnings
    assert "action dimension 5 is clipped in 9" in warnings
    assert report.duplicates == (("blocks-2", "again"),)
    own = make_report(episodes, **settings)
    assert own.dimensions[6].kind == "min_max" and own.dimensions[6].clipped == 0
    assert "normalized to one value" not in "; ".join(own.warnings)
    assert ["look at", own.warnings[0]] in own.rows()
    with pytest.raises(UserError, match="holds no episodes"):
        make_report([], **settings)


def test_a_dataset_is_described_with_what_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DATASETS", {**datasets.DATASETS, "blocks": DATASET})
    episodes = [make_episode(n, steps=8) for n in range(4)] + [make_episode(9, steps=2)]
    write_rlds(tmp_path / "rlds", "blocks", "1.0.0", {"train": episodes}, progress=False)
    config = EpisodesConfig("blocks", max_invalid_fraction=1.0)
    report, strips = inspect_source(str(tmp_path / "rlds"), config, strips=2)
    assert (report.episodes, report.total, len(report.invalid)) == (4, 5, 1)
    assert len(strips) == 4 and "2 frames" in render_report(report, strips)


@pytest.mark.slow
def test_the_command(store, tmp_path):
    command = [sys.executable, "-m", "univla_jax.inspect", f"--store={store}"]
    done = subprocess.run(
        [*command, f"--out={tmp_path / 'page.html'}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "12, " in done.stdout and "action 6" in done.stdout
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
