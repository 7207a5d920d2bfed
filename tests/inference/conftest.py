"""Completions by plain decoding, computed once."""

from __future__ import annotations

import pytest

from tests.inference import exactness


@pytest.fixture(scope="session")
def expected():
    """A thousand prompts with their completions by plain decoding."""
    return exactness.expect()
