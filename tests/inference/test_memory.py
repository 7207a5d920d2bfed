"""Caches are limited by their bytes; arrays are counted by what a device holds of them."""

from __future__ import annotations

import dataclasses
import gc

import jax
import jax.numpy as jnp
import pytest

from univla_jax.inference.action_decoders import Session
from univla_jax.inference.memory import SessionLru, device_bytes, is_out_of_memory
from univla_jax.tasks.history import EpisodeLog


@dataclasses.dataclass
class _Cached:
    num_bytes: int


def _sessions(*sizes):
    sessions = [Session(EpisodeLog(2, 3)) for _ in sizes]
    for session, size in zip(sessions, sizes):
        session.cached_prefix = _Cached(size)
    return sessions


def _kept(sessions):
    return [session.cached_prefix is not None for session in sessions]


def test_the_oldest_lose_their_caches_once_the_bytes_are_spent():
    lru, sessions = SessionLru(250), _sessions(100, 100, 100)
    lru.touch(sessions[:2])
    lru.touch([sessions[0]])
    lru.touch([sessions[2]])
    assert _kept(sessions) == [True, False, True]


def test_one_long_prompt_takes_the_room_of_several():
    lru, sessions = SessionLru(300), _sessions(100, 100, 250)
    lru.touch(sessions)
    assert _kept(sessions) == [False, False, True]
    (huge,) = _sessions(301)
    lru.touch([huge])
    assert _kept([*sessions, huge]) == [False] * 4


def test_dropping_frees_all():
    lru, sessions = SessionLru(300), _sessions(100, 100)
    lru.touch(sessions)
    lru.drop()
    assert _kept(sessions) == [False, False] and lru.take_pending(9) == []


def test_each_is_taken_once_until_it_is_called_again():
    lru, sessions = SessionLru(400), _sessions(1, 1, 1)
    lru.touch(sessions)
    assert lru.take_pending(2) == sessions[:2] and lru.take_pending(2) == sessions[2:]
    assert lru.take_pending(2) == []
    lru.touch([sessions[1]])
    assert lru.take_pending(2) == [sessions[1]]


def test_ended_sessions_are_forgotten():
    lru, sessions = SessionLru(400), _sessions(1, 1)
    lru.touch(sessions)
    del sessions[0]
    gc.collect()
    assert lru.take_pending(9) == sessions


def test_bytes_of_arrays_and_of_shapes():
    assert device_bytes({"a": jnp.zeros((3, 4), jnp.bfloat16), "b": None}) == 24
    assert device_bytes(jax.ShapeDtypeStruct((5,), jnp.float32)) == 20


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"), True),
        (jax.errors.JaxRuntimeError("INTERNAL: something else"), False),
        (MemoryError(), True),
        (ValueError("RESOURCE_EXHAUSTED"), False),
    ],
)
def test_what_is_out_of_memory(error, expected):
    assert is_out_of_memory(error) == expected
