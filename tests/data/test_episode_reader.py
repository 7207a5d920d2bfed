"""The boundary of the readers: whatever an episode raises is one error that names it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.data.episodes import DATASET, make_episode
from univla_jax.data.episode_reader import (
    BrokenEpisodeError,
    DatasetMismatchError,
    EpisodeReader,
    FilteredEpisodeError,
    LazySteps,
    MissingFieldError,
    check_filters,
    describe_error,
)
from univla_jax.errors import UserError


class Reader(EpisodeReader):
    """Three episodes, the second of which raises."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 3

    def episode_id(self, index):
        return f"train/{index}"

    def _read(self, index):
        if index == 1:
            raise self.error
        return make_episode(index)


ERRORS = {
    "train/1 cannot be read: no such file": OSError("no such file"),
    "train/1 cannot be read: KeyError: 'action'": KeyError("action"),
    "train/1 cannot be read: ZeroDivisionError: division by zero": ZeroDivisionError(
        "division by zero"
    ),
    "train/1 cannot be read: MemoryError": MemoryError(),
    "train/1 cannot be read: AssertionError": AssertionError(),
    "train/1 cannot be read: first line": ValueError("first line\nsecond line"),
    "train/1 cannot be read: RuntimeError: C++": RuntimeError("C++\n  at file.cc:3"),
    "train/1 cannot be read: shard a is missing": UserError("shard a is missing"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_any_exception_names_its_episode(message):
    reader = Reader(ERRORS[message])
    with pytest.raises(BrokenEpisodeError) as caught:
        reader[1]
    assert str(caught.value) == message and caught.value.__cause__ is ERRORS[message]
    assert reader[0].episode_id == "blocks-0" and reader[-1].episode_id == "blocks-2"
    for index in (3, -4):
        with pytest.raises(IndexError):
            reader[index]


@pytest.mark.parametrize(
    "error",
    [
        FilteredEpisodeError("episode_filters", "success is False"),
        DatasetMismatchError("no camera"),
        MissingFieldError(DATASET, "a", ["b"], "somewhere"),
        KeyboardInterrupt(),
    ],
)
def test_what_says_more_than_broken_is_left_alone(error):
    with pytest.raises(type(error)) as caught:
        Reader(error)[1]
    assert caught.value is error


def test_long_messages_are_cut():
    assert len(describe_error(ValueError("x" * 10_000))) == 300


def test_steps_are_loaded_once_and_when_asked_for():
    loaded = []
    steps = LazySteps(DATASET, ["a", "b"], lambda path: loaded.append(path) or path, "somewhere")
    assert "b" in steps and "c" not in steps and sorted(steps) == ["a", "b"] and not loaded
    assert steps["a"] == steps.get("a") == "a" and loaded == ["a"]
    assert steps.get("c", 7) == 7
    with pytest.raises(KeyError, match=r"no field 'c' in somewhere; it has a, b"):
        steps["c"]


@pytest.mark.parametrize(
    ("value", "wanted", "kept"),
    [
        (True, True, True),
        (np.bool_(False), True, False),
        (np.array([1]), True, True),
        (b"good", "good", True),
        (np.array([b"bad"], object), "good", False),
        (np.float32([0.5, 1]), [0.5, 1.0], True),
        (None, True, False),
    ],
)
def test_filters_compare_values_of_every_kind(value, wanted, kept):
    dataset = dataclasses.replace(DATASET, episode_filters={"flag": wanted})
    for steps, episode in (({"flag": [0, value]}, None), ({}, {"flag": value})):
        if kept:
            check_filters(dataset, steps, episode)
        else:
            with pytest.raises(FilteredEpisodeError, match="flag is"):
                check_filters(dataset, steps, episode)
