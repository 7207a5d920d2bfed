"""The bytes of a tokenised episode."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.data.episodes import assert_same
from univla_jax.data.token_record import TokenizedEpisode, from_bytes, to_bytes
from univla_jax.errors import UserError


def make_tokens(index=0, steps=5, grid=(2, 3), **changes):
    rng = np.random.default_rng(index)
    episode = TokenizedEpisode(
        instruction=f"schiebe Würfel {index}",
        codes={
            "image": rng.integers(0, 256, (steps, *grid), np.uint16),
            "wrist_image": rng.integers(0, 256, (steps, 1, 1), np.uint16),
        },
        actions=rng.normal(size=(steps, 7)).astype(np.float32),
        control_hz=5.0,
        corpus="blocks",
        episode_id=f"blocks-{index}",
        state=rng.normal(size=(steps, 3)).astype(np.float32),
    )
    return dataclasses.replace(episode, **changes)


@pytest.mark.parametrize("changes", [{}, {"state": None}, {"actions": np.zeros((5, 0), "f4")}])
def test_round_trip(changes):
    episode = make_tokens(**changes)
    record = to_bytes(episode)
    again = from_bytes(record)
    assert_same(again, episode)
    assert to_bytes(again) == record
    assert len(again) == 5


def test_reading_copies_nothing_and_is_aligned():
    episode = from_bytes(to_bytes(make_tokens()))
    for array in (*episode.codes.values(), episode.actions, episode.state):
        assert not array.flags.owndata and not array.flags.writeable and array.flags.aligned


def test_damaged_records_are_errors():
    record = to_bytes(make_tokens())
    with pytest.raises(UserError, match="not a token record"):
        from_bytes(b"PK" + record)
    for end in (20, len(record) - 30):
        with pytest.raises(UserError, match="damaged token record"):
            from_bytes(record[:end])


def test_arrays_must_fit():
    with pytest.raises(UserError, match="different lengths"):
        to_bytes(make_tokens(actions=np.zeros((4, 7), np.float32)))
    with pytest.raises(UserError, match=r"int64\[5, 2, 2\], expected uint16"):
        to_bytes(make_tokens(codes={"image": np.zeros((5, 2, 2), np.int64)}))
