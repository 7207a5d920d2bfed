"""The recipe that learns eight LIBERO tasks from nothing."""

from __future__ import annotations

import runpy

import pytest

from tests.conftest import REPOSITORY
from univla_jax.config import build_config
from univla_jax.data.datasets import find_dataset_config
from univla_jax.errors import UserError
from univla_jax.simulators.libero.libero_benchmark import LiberoProtocol
from univla_jax.simulators.libero.libero_demonstrations import FIRST_STATE, DemonstrationsConfig
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.training.train_config import TrainConfig

RECIPE = runpy.run_path(str(REPOSITORY / "configs" / "libero_scratch.py"))
STAGES = (
    "demonstrations_goal",
    "demonstrations_object",
    "corrections_goal",
    "corrections_object",
    "text",
    "action",
    "vision",
    "tokens",
    "world_model",
    "policy",
)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_config(stage):
    assert RECIPE["get_config"](stage)


@pytest.mark.parametrize("stage", ["", "polcy"])
def test_an_unknown_stage_is_named_beside_the_known_ones(stage):
    with pytest.raises(UserError, match=f"'{stage}'.*world_model, policy"):
        RECIPE["get_config"](stage)


def test_stages_fit_together():
    """Same cameras and chunks; no demonstration begins where the 20 scored episodes do."""
    values = {stage: RECIPE["get_config"](stage).to_dict() for stage in STAGES}
    suites = [build_config(DemonstrationsConfig, values[stage]) for stage in STAGES[:4]]
    policy, imagines = (build_config(TrainConfig, values[s]) for s in ("policy", "world_model"))
    assert FIRST_STATE >= 20
    assert sum(len(suite.tasks) for suite in suites[:2]) == 8
    assert [suite.tasks for suite in suites[2:]] == [suite.tasks for suite in suites[:2]]
    assert [bool(suite.policy) for suite in suites] == [False, False, True, True]
    (corpus,) = {values[stage]["corpus"] for stage in ("text", "action", "vision", "tokens")}
    assert values["action"]["chunk_size"] == policy.data.chunk_size
    assert set(policy.data.views) == set(values["tokens"]["image_specs"])
    assert set(policy.data.views) == set(find_dataset_config(corpus).views)
    assert all(set(policy.data.views) == set(find_dataset_config(s.suite).views) for s in suites)
    # No sample shows a picture that is older than its step.
    pauses = {suite.draw_every for suite in suites}
    assert pauses == {policy.data.chunk_size} and policy.data.aligned_windows == 1
    assert imagines.data.frame_spacing % policy.data.chunk_size == 0


def test_frame_headers_are_those_of_the_grids():
    """Each grid has one text id of its own, whatever size the cameras draw."""
    specs = {view: ImageSpec.from_dict(spec) for view, spec in RECIPE["IMAGE_SPECS"].items()}
    side = LiberoProtocol("libero_goal").render_size
    grids = {spec.grid_size(side, side) for spec in specs.values()}
    assert {f"1*{rows}*{columns}" for rows, columns in grids} == set(RECIPE["FRAME_HEADERS"])
