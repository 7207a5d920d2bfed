"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def pytest_collection_finish(session: pytest.Session) -> None:
    """Load TensorFlow before the first test where tests that write published corpora were chosen.

    TFDS imports it at the first picture, which crashed beside all that the other tests of a process
    had loaded by then. Elsewhere it must stay out: Mesa's renderer crashes beside it.
    """
    if any(hasattr(getattr(item, "module", None), "corpora") for item in session.items):
        importlib.import_module("tensorflow")


@pytest.fixture(scope="session")
def shared_dir() -> pathlib.Path:
    """The folder of fixtures computed by the reference, beside the checkout."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"reference fixtures absent: no folder {folder.name}/ beside the checkout")
    return folder


@pytest.fixture(scope="session")
def golden_dir(shared_dir: pathlib.Path) -> pathlib.Path:
    """The golden inputs and outputs of the reference."""
    return shared_dir / "golden"


@pytest.fixture(scope="session")
def policy_checkpoint(tmp_path_factory):
    """The workdir of a video policy with random parameters."""
    from tests.inference import tiny_checkpoint  # not at the top: it imports JAX

    folder = tmp_path_factory.mktemp("policy")
    return tiny_checkpoint.save(folder, tiny_checkpoint.make_assets(), scale=20)


@pytest.fixture(scope="session")
def world_model_checkpoint(tmp_path_factory):
    """The workdir of a world model with random parameters."""
    from tests.inference import tiny_checkpoint

    assets = tiny_checkpoint.make_assets(layout="world_model", frames=3)
    return tiny_checkpoint.save(tmp_path_factory.mktemp("world_model"), assets, scale=20)


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory):
    """One training and four held-out episodes of the tabletop, as RLDS."""
    from univla_jax.simulators.tabletop.tabletop_expert import (
        DemonstrationsConfig,
        write_demonstrations,
    )

    folder = tmp_path_factory.mktemp("demonstrations")
    config = DemonstrationsConfig(train_episodes=1, val_episodes=4, families=("place",))
    write_demonstrations(config, folder)
    return folder


@pytest.fixture(scope="module")
def compilation_cache(tmp_path_factory: pytest.TempPathFactory):
    """Keeps compiled programs on disk for the tests of one module: equal ones compile once."""
    import jax  # not at the top: most tests of launchers need none
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
