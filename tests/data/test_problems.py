"""Broken episodes are recognized and counted."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.episodes import make_episode
from univla_jax.data.validation import (
    InvalidEpisode,
    check_invalid_fraction,
    describe,
    validate_episode,
)
from univla_jax.errors import UserError

SIZES = {"image": (16, 24), "wrist_image": (8, 8)}


def with_nan(name):
    rows = getattr(make_episode(0), name).copy()
    rows[1, 2] = np.nan
    return {name: rows}


def without_a_frame():
    frames = dict(make_episode(0).frames)
    return {"frames": {**frames, "image": frames["image"][1:]}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"state": None}, None),
        ({"steps": 2}, "2 frames, at least 3"),
        ({"instruction": "  "}, "instruction is empty"),
        ({"instruction": "go " * 4000}, "12000 characters"),
        ({"size": (16, 16)}, "expected uint8[3, 16, 24, 3]"),
        (without_a_frame(), "is uint8[2, 16, 24, 3]"),
        ({"frames": {"image": make_episode(0).frames["image"]}}, "'wrist_image' is missing"),
        (with_nan("actions"), "action of step 1 is not finite"),
        (with_nan("state"), "state of step 1 is not finite"),
        ({"actions": np.zeros((3, 6), np.float32)}, "expected [T, 7]"),
        ({"state": np.zeros((2, 4), np.float32)}, "2 states for 3 actions"),
    ],
)
def test_a_broken_episode_has_a_reason(changes, reason):
    episode = make_episode(0, **changes)
    found = validate_episode(episode, min_frames=3, sizes=SIZES, action_dim=7)
    assert (found is None) if reason is None else (reason in found)


def test_too_many_are_an_error():
    problems = [InvalidEpisode(f"e{i}", "is blue") for i in range(5)]
    check_invalid_fraction(problems, 100, 0.05, "set")
    check_invalid_fraction([], 1, 0.0, "set")
    with pytest.raises(UserError, match=r"5 of 50 .*over max_invalid_fraction=0.05.*e0: is blue"):
        check_invalid_fraction(problems, 50, 0.05, "set")
    with pytest.raises(UserError, match="all of them"):
        check_invalid_fraction(problems, 5, 1.0, "set")
    with pytest.raises(UserError, match="no episodes"):
        check_invalid_fraction([], 0, 1.0, "set")
    assert describe(problems) == "e0: is blue; e1: is blue; e2: is blue; and 2 more"
