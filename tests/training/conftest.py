"""A miniature world to train in, and a compilation cache so that equal runs compile once."""

from __future__ import annotations

import pathlib

import jax
import pytest

from tests.training import tiny_run


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Tokenizers and a token store."""
    return tiny_run.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def compilation_cache(tmp_path_factory: pytest.TempPathFactory):
    """Keeps compiled programs on disk for the tests of one module."""
    from jax.experimental.compilation_cache import compilation_cache as cache

    before = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    cache.reset_cache()
