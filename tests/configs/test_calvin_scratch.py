"""The recipe that learns eight of CALVIN's tasks from nothing."""

from __future__ import annotations

import runpy

import pytest

from tests.conftest import REPOSITORY
from univla_jax.config import build_config
from univla_jax.data.datasets import find_dataset_config
from univla_jax.errors import UserError
from univla_jax.simulators import make_benchmark
from univla_jax.simulators.calvin.calvin_demonstrations import CORPUS, DemonstrationsConfig
from univla_jax.simulators.calvin.calvin_scripts import SCRIPTS
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.training.train_config import TrainConfig
from univla_jax.training.vision_training import VisionFitConfig

RECIPE = runpy.run_path(str(REPOSITORY / "configs" / "calvin_scratch.py"))
STAGES = ("demonstrations", "text", "action", "vision", "tokens", "policy")


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_config(stage):
    assert RECIPE["get_config"](stage)


def test_an_unknown_stage_is_named_beside_the_known_ones():
    with pytest.raises(UserError, match=r"'polcy'.*tokens, policy"):
        RECIPE["get_config"]("polcy")


def test_stages_fit_together():
    """Same cameras and chunks, and pictures where chunks begin, of the renderer that is scored."""
    values = {stage: RECIPE["get_config"](stage).to_dict() for stage in STAGES}
    shown = build_config(DemonstrationsConfig, values["demonstrations"])
    policy = build_config(TrainConfig, values["policy"])
    vision = build_config(VisionFitConfig, values["vision"])
    assert {values[stage]["corpus"] for stage in ("text", "action", "vision", "tokens")} == {CORPUS}
    dataset = find_dataset_config(CORPUS)
    assert values["action"]["chunk_size"] == policy.data.chunk_size == shown.draw_every
    assert set(policy.data.views) == set(dataset.views) == set(vision.image_specs)
    assert policy.data.aligned_windows == 1 and len(dataset.normalization) == 7
    assert len(shown.tasks) == len(SCRIPTS) == 8
    assert f"--renderer={shown.renderer}" in RECIPE["__doc__"]
    assert make_benchmark("calvin", suite="scripted", renderer=shown.renderer).name in (
        "calvin scripted"
    )


def test_frame_headers_are_those_of_the_grids():
    """Each grid has one text id of its own, whatever size the cameras draw."""
    specs = {view: ImageSpec.from_dict(spec) for view, spec in RECIPE["IMAGE_SPECS"].items()}
    grids = {specs["image"].grid_size(200, 200), specs["wrist_image"].grid_size(84, 84)}
    assert {f"1*{rows}*{columns}" for rows, columns in grids} == set(RECIPE["FRAME_HEADERS"])
