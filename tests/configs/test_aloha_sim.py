"""The recipe that learns ALOHA's simulated cube transfer from nothing."""

from __future__ import annotations

import runpy

import pytest

from tests.conftest import REPOSITORY
from univla_jax.config import build_config
from univla_jax.data.datasets import find_dataset_config
from univla_jax.errors import UserError
from univla_jax.simulators.aloha.aloha_benchmark import CAMERAS, EPISODES, AlohaProtocol
from univla_jax.simulators.aloha.aloha_demonstrations import FIRST_SEEDS, DemonstrationsConfig
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.training.train_config import TrainConfig
from univla_jax.training.vision_training import VisionFitConfig

RECIPE = runpy.run_path(str(REPOSITORY / "configs" / "aloha_sim.py"))
STAGES = ("demonstrations", "text", "action", "vision", "tokens", "policy")


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_config(stage):
    assert RECIPE["get_config"](stage)


@pytest.mark.parametrize("stage", ["", "polcy"])
def test_an_unknown_stage_is_named_beside_the_known_ones(stage):
    with pytest.raises(UserError, match=f"'{stage}'.*tokens, policy"):
        RECIPE["get_config"](stage)


def test_stages_fit_together():
    """Same cameras and chunks; no demonstration begins where the scored episodes do."""
    values = {stage: RECIPE["get_config"](stage).to_dict() for stage in STAGES}
    shown = build_config(DemonstrationsConfig, values["demonstrations"])
    policy = build_config(TrainConfig, values["policy"])
    vision = build_config(VisionFitConfig, values["vision"])
    (corpus,) = {values[stage]["corpus"] for stage in ("text", "action", "vision", "tokens")}
    dataset = find_dataset_config(corpus)
    assert values["action"]["chunk_size"] == policy.data.chunk_size == shown.draw_every
    assert set(policy.data.views) == set(dataset.views) == set(CAMERAS) == set(vision.image_specs)
    assert dataset.chunk_deltas is not None and len(dataset.normalization) == 14
    # Only there a picture is as new as its step, and a chunk begins at the measured pose.
    assert policy.data.aligned_windows == 1
    protocol, splits = AlohaProtocol(), sorted(FIRST_SEEDS.values())
    assert protocol.control_hz == dataset.control_hz
    assert splits[0] >= EPISODES and splits[0] + 3 * shown.train_episodes <= splits[1]


def test_frame_headers_are_those_of_the_grids():
    """Each grid has one text id of its own, whatever size the cameras draw."""
    specs = {view: ImageSpec.from_dict(spec) for view, spec in RECIPE["IMAGE_SPECS"].items()}
    grids = {spec.grid_size(*AlohaProtocol().render_size) for spec in specs.values()}
    assert {f"1*{rows}*{columns}" for rows, columns in grids} == set(RECIPE["FRAME_HEADERS"])
