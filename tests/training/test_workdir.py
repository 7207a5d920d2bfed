"""A workdir refuses another config, and says why."""

from __future__ import annotations

import dataclasses

import pytest

from univla_jax import run_dir
from univla_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Inner:
    sizes: tuple[int, ...] = (1, 2)
    threads: int = 1


@dataclasses.dataclass(frozen=True)
class _Config:
    steps: int = 10
    rate: float = 0.1
    data: _Inner = _Inner()


FREE = ("steps", "data.threads")


def test_the_same_config_may_come_back(tmp_path):
    run_dir.check_config(tmp_path / "run", _Config())
    run_dir.write_config(tmp_path / "run", _Config())
    changed = _Config(steps=20, data=_Inner(threads=4))
    run_dir.check_config(tmp_path / "run", changed, free=FREE)
    run_dir.write_config(tmp_path / "run", changed)
    assert run_dir.read_config(tmp_path / "run", _Config) == changed


def test_another_config_is_refused_key_by_key(tmp_path):
    run_dir.write_config(tmp_path, _Config())
    other = _Config(rate=0.2, data=_Inner(sizes=(1, 3)))
    with pytest.raises(UserError) as error:
        run_dir.check_config(tmp_path, other, free=FREE)
    assert "rate was 0.1, is 0.2" in str(error.value)
    assert "data.sizes was [1, 2], is [1, 3]" in str(error.value)
    assert run_dir.read_config(tmp_path, _Config) == _Config()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        run_dir.write_config(tmp_path / "file" / "run", _Config())


def test_a_damaged_config_file(tmp_path):
    (tmp_path / run_dir.CONFIG_FILE).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        run_dir.check_config(tmp_path, _Config())
