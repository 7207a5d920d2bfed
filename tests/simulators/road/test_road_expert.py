"""Demonstrations of the road: NAVSIM's reader and scorer find what was driven."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from univla_jax.data.datasets import DATASETS
from univla_jax.data.ego_motion import compose_motions
from univla_jax.data.readers import open_reader
from univla_jax.errors import UserError
from univla_jax.evaluation.closed_loop import EvaluateConfig, evaluate, read_episodes
from univla_jax.simulators.navsim.navsim_benchmark import export_predictions
from univla_jax.simulators.navsim.pdm_score import score_trajectory
from univla_jax.simulators.navsim.scene_file import load_scene, scene_paths
from univla_jax.simulators.road.road_benchmark import make_benchmark
from univla_jax.simulators.road.road_expert import (
    DemonstrationsConfig,
    changed_motions,
    write_demonstrations,
)
from univla_jax.simulators.road.road_world import KINDS

CONFIG = DemonstrationsConfig(train_episodes=1, val_episodes=1, frames=16)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("road") / "demonstrations"
    return write_demonstrations(CONFIG, folder)


@pytest.mark.slow
def test_logs_are_read_as_navsims(demonstrations):
    for split in ("train", "val"):
        (episode,) = open_reader(demonstrations, DATASETS["road"], split)
        assert len(episode) == 2 + 3 + 7 and episode.frames["image"].shape == (12, 48, 96, 3)
        assert all(episode.texts["image"])  # the future is on disk, too
        np.testing.assert_array_equal(
            episode.frames["previous_image"][2:], episode.frames["image"][:-2]
        )
        speed = np.linalg.norm(episode.actions[:, :2], axis=1) / 0.5
        np.testing.assert_allclose(speed[3:], episode.state[3:, 0], atol=1.5)


@pytest.mark.slow
def test_pushed_and_swerving_logs(tmp_path):
    config = DemonstrationsConfig(
        train_episodes=4, val_episodes=1, pushed=1.0, swerving_episodes=1, frames=20
    )
    folder = write_demonstrations(config, tmp_path / "road")
    listed = yaml.safe_load((folder / "train.yaml").read_text())["tokens"]
    episodes = list(open_reader(folder, DATASETS["road"], "train"))
    shown = [token for episode in episodes for token in episode.texts["token"] if token]
    # Moments whose eight motions are the expert's; some of every log are.
    assert set(shown) == set(listed) and 4 <= len(listed) < 4 * (20 - 13)
    assert {episode.episode_id.split("/")[1] for episode in episodes} == {
        f"road-{seed:07d}" for seed in config.seeds()["train"]
    }
    (swerving,) = open_reader(folder, DATASETS["road"], "swerves")
    (seed,) = config.seeds()["swerves"]
    assert KINDS[seed % len(KINDS)] == "straight"  # where an expert hardly turns at all
    assert swerving.actions[:, 2].max() - swerving.actions[:, 2].min() > 0.1


def test_a_changed_plan_turns_as_far_as_a_car_can():
    ego = np.zeros(11)
    plan = np.zeros((41, 3))
    plan[:, 0] = 0.8 * np.arange(41)
    motions = changed_motions(ego, plan, 0.2, speed=0.5)
    np.testing.assert_allclose(motions, np.tile([2.0, 0.2, 0.2], (8, 1)), atol=1e-9)
    np.testing.assert_array_equal(changed_motions(ego, np.zeros((41, 3)), 0.2), np.zeros((8, 3)))


@pytest.mark.slow
def test_scene_files_score_the_human_at_the_top(demonstrations):
    (episode,) = open_reader(demonstrations, DATASETS["road"], "val")
    tokens = [token for token in episode.texts["token"] if token]
    paths = scene_paths(demonstrations / "scenes")
    assert set(tokens) == set(paths)
    for number, token in enumerate(tokens):
        scene = load_scene(paths[token])
        step = episode.texts["token"].index(token)
        poses = compose_motions(episode.actions[step : step + 8])
        np.testing.assert_allclose(poses, scene.human_future, atol=1e-4)
        assert score_trajectory(scene, poses).of(0)["PDMS"] > 0.8
        assert scene.previous_token == (tokens[number - 1] if number else "")


@pytest.mark.slow
def test_the_navsim_benchmark_scores_the_scenes(demonstrations, tmp_path):
    config = EvaluateConfig(
        benchmark="navsim",
        assets=str(demonstrations),
        conditions=("human", "constant_velocity", "ego_only", "expert"),
        video_episodes=0,
    )
    report = evaluate(config, None, tmp_path / "out", progress=False)
    human = report["conditions"]["human"]
    assert human["success"]["episodes"] == 3
    assert human["scores"]["PDMS v1.1"]["mean"] > 0.8
    assert human["figures"]["ADE in meters"] < 1e-6
    assert {"EPDMS v2", "EC v2", "LK v2", "TTC v1.1"} <= set(human["scores"])
    assert human["figures"]["L2 3 s (ST-P3)"] == human["figures"]["collision % 3 s (UniAD)"] == 0
    records = read_episodes(tmp_path / "out", "constant_velocity")
    assert export_predictions(records, tmp_path / "predictions") == 3
    written = json.loads((tmp_path / "predictions" / f"{records[0]['token']}.json").read_text())
    assert np.shape(written["action"]) == np.shape(written["poses"]) == (8, 3)
    np.testing.assert_allclose(compose_motions(written["action"]), written["poses"], atol=1e-5)
    assert report["published"]["UniVLA, front camera: PDMS, v1.1 navtest"] == 81.7


def test_written_demonstrations_are_left_alone(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "demonstrations.json").write_text("{}")
    with pytest.raises(UserError, match="holds other demonstrations"):
        write_demonstrations(CONFIG, tmp_path / "x")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"frames": 13}, "a scene needs 14"),
        ({"train_episodes": 0}, "must be at least 1"),
        ({"pushed": 1.5}, "pushed 1.5 must be in 0...1"),
        ({"swerving_episodes": -1}, "swerving_episodes -1 at least 0"),
    ],
)
def test_impossible_demonstrations(values, message):
    with pytest.raises(UserError, match=message):
        DemonstrationsConfig(**{"train_episodes": 1, "val_episodes": 1, **values})


def test_impossible_benchmarks():
    with pytest.raises(UserError, match="road: episodes 0"):
        make_benchmark(episodes=0)
    with pytest.raises(UserError, match="'ego_only' needs --assets"):
        make_benchmark().variants["ego_only"]()
