"""Tiny checkpoints, made once."""

from __future__ import annotations

import pytest

from tests.inference import exactness, tiny_checkpoint


@pytest.fixture(scope="session")
def policy_checkpoint(tmp_path_factory):
    """The workdir of a video policy with random parameters."""
    folder = tmp_path_factory.mktemp("policy")
    return tiny_checkpoint.save(folder, tiny_checkpoint.make_assets(), scale=20)


@pytest.fixture(scope="session")
def world_model_checkpoint(tmp_path_factory):
    """The workdir of a world model with random parameters."""
    assets = tiny_checkpoint.make_assets(layout="world_model", frames=3)
    return tiny_checkpoint.save(tmp_path_factory.mktemp("world_model"), assets, scale=20)


@pytest.fixture(scope="session")
def expected():
    """A thousand prompts with their completions by plain decoding."""
    return exactness.expect()
