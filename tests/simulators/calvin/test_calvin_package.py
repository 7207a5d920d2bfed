"""CALVIN's official list, the hash that seeds its blocks, and what a missing package says."""

from __future__ import annotations

import sys

import pytest

from univla_jax.errors import UserError
from univla_jax.simulators.calvin import calvin_package


def test_the_official_list():
    chains = calvin_package.official_chains()
    assert len(chains) == 1000 and len({str(first) for first, _ in chains}) == 192
    first, tasks = chains[0]
    assert first == {
        "led": 1,
        "lightbulb": 1,
        "slider": "left",
        "drawer": "open",
        "red_block": "slider_left",
        "blue_block": "table",
        "pink_block": "slider_right",
        "grasped": 0,
    }
    # The order of the conditions is hashed, too.
    assert list(first)[:3] == ["led", "lightbulb", "slider"]
    assert tasks == [
        "rotate_blue_block_right",
        "move_slider_right",
        "lift_red_block_slider",
        "place_in_slider",
        "turn_off_lightbulb",
    ]
    assert all(len(tasks) == 5 for _, tasks in chains)
    assert len({task for _, tasks in chains for task in tasks}) == 34


def test_the_hash_is_fnv_1_from_zero_over_utf_16():
    assert calvin_package.fnv1_32("") == 0
    assert calvin_package.fnv1_32("a") == (ord("a") * 0x01000193) % 2**32


def test_a_missing_package_names_the_script(monkeypatch):
    kept = dict(sys.modules)
    try:
        with pytest.raises(UserError, match=r"package calvin_agent; launch/simulators/calvin.sh"):
            calvin_package.open_calvin(None, "tiny")
    finally:
        for name in set(sys.modules) - set(kept):
            del sys.modules[name]
