"""The bytes of a tokenized episode."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.data.episodes import assert_same
from univla_jax.data.token_record import (
    TokenizedEpisode,
    block_steps,
    count_records,
    from_records,
    to_records,
)
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


def read(records):
    return from_records(records[0], lambda number: records[1 + number])


@pytest.mark.parametrize("block", [1, 2, 5, 8])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"state": None},
        {"actions": np.zeros((5, 0), "f4")},
        {"paraphrases": ("hebe ihn", "auf"), "metadata": {"file": "a/b", "success": True}},
        {"texts": {"answer": ("yes",), "reasoning": ("a", "a", "b", "b", "a")}},
    ],
)
def test_round_trip(changes, block):
    episode = make_tokens(**changes)
    records = to_records(episode, block)
    assert len(records) == count_records(5, block)
    again = read(records)
    assert_same(again, episode)
    assert to_records(again, block) == records
    assert len(again) == 5


def test_a_window_reads_its_blocks_alone():
    episode = make_tokens(steps=9)
    head, *blocks = to_records(episode, 2)
    asked = []

    def block(number):
        asked.append(number)
        return blocks[number]

    stored = from_records(head, block)
    assert not asked
    for view in ("image", "wrist_image"):
        np.testing.assert_array_equal(
            stored.codes[view][np.array([2, 8])], episode.codes[view][[2, 8]]
        )
    assert asked == [1, 4]
    np.testing.assert_array_equal(stored.codes["image"][3:8], episode.codes["image"][3:8])
    np.testing.assert_array_equal(stored.codes["image"][-1], episode.codes["image"][-1])
    assert stored.codes["image"].shape == (9, 2, 3) and not len(stored.codes["image"][:0])


def test_blocks_hold_about_16_kilobytes():
    assert block_steps({"image": (25, 25), "wrist_image": (25, 25)}) == 6
    assert block_steps({"image": (100, 100)}) == 1


def test_reading_copies_nothing_and_is_aligned():
    episode = read(to_records(make_tokens(), 2))
    for array in (episode.actions, episode.state):
        assert not array.flags.owndata and not array.flags.writeable and array.flags.aligned


def test_damaged_records_are_errors():
    head, *blocks = to_records(make_tokens(), 2)
    with pytest.raises(UserError, match="not a token record"):
        read([b"PK" + head])
    for end in (20, len(head) - 30):
        with pytest.raises(UserError, match="damaged token record"):
            read([head[:end]])
    with pytest.raises(UserError, match="damaged block of codes: 27 bytes, expected 28"):
        read([head, blocks[0][:-1]]).codes["image"][0]


def test_arrays_must_fit():
    with pytest.raises(UserError, match="different lengths"):
        to_records(make_tokens(actions=np.zeros((4, 7), np.float32)), 2)
    with pytest.raises(UserError, match=r"int64\[5, 2, 2\], expected uint16"):
        to_records(make_tokens(codes={"image": np.zeros((5, 2, 2), np.int64)}), 2)
