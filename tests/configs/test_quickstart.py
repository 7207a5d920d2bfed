"""The quickstart's recipes."""

from __future__ import annotations

import runpy

import pytest

from tests.conftest import REPOSITORY
from univla_jax.errors import UserError

STAGES = (
    "demonstrations",
    "text",
    "action",
    "vision",
    "tokens",
    "world_model",
    "attempts",
    "attempts_held_out",
    "joint",
    "unified",
    "policy",
    "realtime",
    "evaluate",
    "imagine",
    "obey",
    "counterfactuals",
    "improve",
)


def recipe(name: str):
    return runpy.run_path(str(REPOSITORY / "configs" / f"{name}.py"))["get_config"]


@pytest.mark.parametrize("name", ["quickstart", "quickstart_free", "quickstart_tiny"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_config(name, stage):
    assert recipe(name)(stage)


@pytest.mark.parametrize(
    "stage",
    [
        "demonstrations",
        "demonstrations_plain",
        "text",
        "action",
        "vision",
        "tokens",
        "policy_plain",
        "policy",
        "evaluate",
    ],
)
def test_every_stage_of_the_randomized_tabletop_has_a_config(stage):
    config = recipe("quickstart_robust")(stage)
    if stage == "evaluate":
        assert config.benchmark == "tabletop_plus" and config.episodes_per_task == 100
    if stage.startswith("demonstrations"):
        assert bool(config.randomized) == (stage == "demonstrations") and config.anywhere
    if stage.startswith("policy"):
        fitted = recipe("quickstart_robust")("action")
        assert config.data.state and config.data.state_steps == fitted.state_steps


@pytest.mark.parametrize("name", ["quickstart", "quickstart_tiny"])
@pytest.mark.parametrize("stage", ["", "polcy"])
def test_an_unknown_stage_is_named_beside_the_known_ones(name, stage):
    with pytest.raises(UserError, match=f"'{stage}'.*world_model, attempts"):
        recipe(name)(stage)


def test_the_last_part_leaves_out_the_words_where_frames_follow_from_actions_alone():
    before, last = (recipe("quickstart")(stage).data.mixture for stage in ("joint", "unified"))
    assert [bool(entry["wordless"]) for entry in last] == [False, True, False, False]
    assert [entry["task"] for entry in last] == [entry["task"] for entry in before]


def test_fields_left_out_are_there_to_be_set():
    config = recipe("quickstart")("policy")
    assert config.optimizer.b2 == 0.95 and config.mesh and config.seed == 42
