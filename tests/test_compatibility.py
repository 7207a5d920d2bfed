"""Folders of the quickstart written before the names changed: they load, act, and are continued.

``tests/fixtures/before/README.md`` says what lies there and how it was made.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
import shutil

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from univla_jax import run_dir
from univla_jax.assets import Assets
from univla_jax.config import build_config
from univla_jax.data.token_store import TokenStore
from univla_jax.data.tokenizer_fitting import ActionFitConfig, TextFitConfig
from univla_jax.episode import Observation
from univla_jax.evaluation import closed_loop
from univla_jax.inference.imagination import WorldModel
from univla_jax.inference.policy import Policy
from univla_jax.pipeline.dataset import training_batches
from univla_jax.simulators.tabletop.tabletop_expert import (
    DemonstrationsConfig,
    write_demonstrations,
)
from univla_jax.tokenizers.fast import FastTokenizer
from univla_jax.tokenizers.text import load_text_tokenizer
from univla_jax.training.train_config import FREE, TrainConfig
from univla_jax.training.train_loop import train
from univla_jax.training.vision_training import VisionFitConfig, fit_vision

BEFORE = REPOSITORY / "tests" / "fixtures" / "before"
EXPECTED = json.loads((BEFORE / "expected.json").read_text())
INSTRUCTIONS = ("push the red block to the left", "lift the blue block")
RUNS = ("world_model", "policy")


def recipe(cls, stage):
    """Today's config of a stage."""
    recipes = runpy.run_path(str(BEFORE / "recipes.py"))
    return build_config(cls, recipes["get_config"](stage).to_dict())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the folders as the working directory: their configs name each other relatively."""
    shutil.copytree(BEFORE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _observation(seed):
    rng = np.random.default_rng(seed)
    frames = {
        view: rng.integers(0, 256, (side, side, 3), np.uint8)
        for view, side in (("image", 32), ("wrist_image", 16))
    }
    return Observation(INSTRUCTIONS[seed % 2], frames)


def test_a_policy_gives_the_same_actions():
    policy = Policy.load(BEFORE / "policy")
    sessions = [policy.start(), policy.start()]
    for call, expected in enumerate(EXPECTED["actions"]):
        chunks = policy.act([_observation(2 * call), _observation(2 * call + 1)], sessions)
        assert all(chunk.valid for chunk in chunks)
        np.testing.assert_allclose([c.actions for c in chunks], expected, atol=1e-6)


def test_a_world_model_imagines_the_same_frames():
    model = WorldModel.load(BEFORE / "world_model")
    context = np.random.default_rng(0).integers(0, 16, (2, 1, 4, 4)).astype(np.uint16)
    assert model.imagine(INSTRUCTIONS, context, 2).tolist() == EXPECTED["codes"]


def test_a_token_store_opens():
    store, expected = TokenStore(BEFORE / "tokens/train"), EXPECTED["store"]
    store.verify()
    assert len(store) == expected["episodes"]
    episode = store[1]
    assert episode.instruction == expected["instruction"]
    np.testing.assert_array_equal(episode.actions, np.asarray(expected["actions"], np.float32))
    for view, codes in expected["codes"].items():
        np.testing.assert_array_equal(episode.codes[view], codes)


def test_fitted_tokenizers_load_and_count_as_finished():
    text, action = BEFORE / "tokenizers/text", BEFORE / "tokenizers/action"
    assert load_text_tokenizer(text).encode(INSTRUCTIONS[0]) == EXPECTED["text"]
    chunk = np.linspace(-1, 1, 35).reshape(1, 5, 7)
    assert list(FastTokenizer.load(action).encode_batch(chunk)[0]) == EXPECTED["action"]
    assert run_dir.read_fit_report(text, recipe(TextFitConfig, "text"))["instructions"] == 6
    assert run_dir.read_fit_report(action, recipe(ActionFitConfig, "action"))["chunks"] == 71


@pytest.mark.parametrize("run", RUNS)
def test_todays_recipe_is_the_config_of_the_run(run):
    config = recipe(TrainConfig, run)
    run_dir.check_config(BEFORE / run, config, free=FREE)
    assert run_dir.read_config(BEFORE / run, TrainConfig) == config


@pytest.mark.parametrize("run", RUNS)
def test_the_next_batch_is_the_same(run, folder):
    checkpoint = folder / run / "checkpoints/6"
    assets = Assets.load(checkpoint / "assets")
    batches = training_batches(recipe(TrainConfig, run).data, assets, host=0, hosts=1)
    try:
        batches.set_state((checkpoint / "iterator/process_0_of_1.bin").read_bytes())
        batch = next(batches)
    finally:
        batches.close()
    np.testing.assert_array_equal(batch.tokens, EXPECTED["batches"][run]["tokens"])
    np.testing.assert_array_equal(batch.positions, EXPECTED["batches"][run]["positions"])


@pytest.mark.parametrize("run", RUNS)
def test_a_run_goes_on_with_the_same_losses(run, folder):
    config = dataclasses.replace(recipe(TrainConfig, run), total_steps=8)
    train(config, folder / run, progress=False)
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "loss" in line}
    assert set(steps) == set(range(8))
    for expected in EXPECTED["metrics"][run]:
        got = {name: steps[expected["step"]][name] for name in expected}
        assert got == pytest.approx(expected, rel=1e-4)


def test_an_evaluation_goes_on_with_the_same_episodes(folder):
    config = recipe(closed_loop.EvaluateConfig, "evaluate")
    closed_loop.evaluate(config, folder / "policy", folder / "evaluation", progress=False)
    lines = (folder / "evaluation/episodes.jsonl").read_text().splitlines()
    got = [json.loads(line) for line in lines]
    assert len(got) == len(EXPECTED["episodes"])
    key = lambda episode: (episode["condition"], episode["seed"])  # noqa: E731
    for episode, expected in zip(sorted(got, key=key), sorted(EXPECTED["episodes"], key=key)):
        shared = episode.keys() & expected.keys()
        assert {"success", "steps", "instruction", "seed"} <= shared
        assert {name: episode[name] for name in shared} == {n: expected[n] for n in shared}


@pytest.mark.slow
def test_the_fit_of_a_vision_tokenizer_goes_on(folder):
    write_demonstrations(recipe(DemonstrationsConfig, "demonstrations"), folder / "demonstrations")
    config = dataclasses.replace(recipe(VisionFitConfig, "vision_run"), total_steps=3)
    fit_vision(config, folder / "demonstrations", folder / "vision", progress=False)
    lines = (folder / "vision/run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
