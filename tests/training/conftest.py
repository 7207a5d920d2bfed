"""A miniature world to train in."""

from __future__ import annotations

import pathlib

import pytest

from tests.training import tiny_run


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Tokenizers and a token store."""
    return tiny_run.make_world(tmp_path_factory.mktemp("world"))
