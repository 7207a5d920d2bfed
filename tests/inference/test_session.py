"""Which sessions keep their caches, and which are read ahead."""

from __future__ import annotations

import gc

from univla_jax.sequences.history import History

from univla_jax.inference.action_decoders import Session, SessionLru


def _sessions(count):
    sessions = [Session(History()) for _ in range(count)]
    for session in sessions:
        session.cached_prefix = object()
    return sessions


def test_the_oldest_lose_their_memory():
    holders, sessions = SessionLru(2), _sessions(3)
    holders.called(sessions[:2])
    holders.called([sessions[0]])
    holders.called([sessions[2]])
    assert [s.cached_prefix is not None for s in sessions] == [True, False, True]


def test_each_is_taken_once_until_it_is_called_again():
    holders, sessions = SessionLru(4), _sessions(3)
    holders.called(sessions)
    assert holders.take(2) == sessions[:2] and holders.take(2) == sessions[2:]
    assert holders.take(2) == []
    holders.called([sessions[1]])
    assert holders.take(2) == [sessions[1]]


def test_ended_sessions_are_forgotten():
    holders, sessions = SessionLru(4), _sessions(2)
    holders.called(sessions)
    del sessions[0]
    gc.collect()
    assert holders.take(9) == sessions
