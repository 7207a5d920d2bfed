"""Gripper and movement conventions: golden group 11."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.data import conventions


@pytest.fixture(scope="module")
def gripper(golden_dir):
    return dict(np.load(golden_dir / "gripper.npz"))


def cases_of(arrays, kind):
    return [name.split("|")[1] for name in arrays if name.startswith(f"{kind}|") and "|in" in name]


def test_gripper_transforms_match_the_reference(gripper):
    for case in cases_of(gripper, "binarize"):
        raw = gripper[f"binarize|{case}|in"]
        np.testing.assert_array_equal(
            conventions.binarize_gripper(raw), gripper[f"binarize|{case}|out"], err_msg=case
        )
        np.testing.assert_allclose(
            conventions.invert_gripper(raw), gripper[f"invert|{case}|out"], atol=1e-6
        )
    for case in cases_of(gripper, "rel2abs"):
        np.testing.assert_array_equal(
            conventions.relative_to_absolute_gripper(gripper[f"rel2abs|{case}|in"]),
            gripper[f"rel2abs|{case}|out"],
            err_msg=case,
        )


def test_corpus_transforms_match_the_reference(gripper):
    np.testing.assert_array_equal(conventions.rt1_actions(gripper["rt1|in"]), gripper["rt1|out"])
    np.testing.assert_array_equal(
        conventions.droid_actions(gripper["droid|in"]), gripper["droid|out"]
    )
    moved, states = conventions.relabel_bridge(gripper["bridge|state"], gripper["bridge|action"])
    np.testing.assert_allclose(moved, gripper["bridge|out_action"], atol=1e-6)
    np.testing.assert_array_equal(states, gripper["bridge|out_state"])
