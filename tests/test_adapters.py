"""Adapter checkpoints: the base is found by its identity, and another one is refused."""

from __future__ import annotations

import pytest

from tests.training import toy
from univla_jax import adapters
from univla_jax.checkpoints import CheckpointConfig, Checkpointer, find_checkpoint
from univla_jax.errors import UserError
from univla_jax.models.lora import LoraConfig


def save(folder, step=1):
    with Checkpointer(folder, CheckpointConfig(asynchronous=False)) as saver:
        saver.save(step, toy.create())
    return find_checkpoint(folder)


def test_the_base_is_found_where_it_is(tmp_path, monkeypatch):
    base = save(tmp_path / "base")
    record = adapters.adapter_record(base, LoraConfig(rank=2))
    assert adapters.find_base(record) == base
    (tmp_path / "base").rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    assert adapters.find_base(record, moved) == find_checkpoint(moved)
    with pytest.raises(UserError, match=r"base of this adapter .* is not there: .* no checkpoint"):
        adapters.find_base(record)
    monkeypatch.setenv(adapters.BASE_VARIABLE, str(moved))
    assert adapters.find_base(record) == find_checkpoint(moved)
    save(tmp_path / "base")
    assert adapters.find_base(record) == find_checkpoint(moved)
    monkeypatch.delenv(adapters.BASE_VARIABLE)
    with pytest.raises(UserError, match="is another checkpoint"):
        adapters.find_base(record)
