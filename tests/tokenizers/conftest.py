"""Action tokenizers that several test files use."""

from __future__ import annotations

import pytest

from tests.tokenizers.chunks import smooth_chunks
from univla_jax.tokenizers.action import load_action_tokenizer
from univla_jax.tokenizers.fast import FastTokenizer


@pytest.fixture(scope="session")
def shipped(shared_dir):
    return {
        folder.name: load_action_tokenizer(folder)
        for folder in (shared_dir / "fast_tokenizers").iterdir()
        if folder.is_dir()
    }


@pytest.fixture(scope="session")
def fitted():
    return FastTokenizer.fit(smooth_chunks(400, 5, 7), 10, 400)
