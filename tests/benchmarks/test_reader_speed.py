"""The benchmark of the readers measures what it says, at small sizes."""

from __future__ import annotations

import pytest

from univla_jax.benchmarks import reader_speed


def test_a_packed_file_is_read_whole_and_once(tmp_path):
    pytest.importorskip("pyarrow")
    cases = reader_speed.measure_lerobot(tmp_path, episodes=20, compared=2)
    assert [case["episodes"] for case in cases] == [2, 2, 20]
    assert all(case["ms of processor each"] > 0 for case in cases)


def test_fields_in_use_are_compared_with_all_of_them(tmp_path):
    cases = reader_speed.measure_rlds(tmp_path, episodes=1, steps=3, side=16)
    assert len(cases) == 4 and cases[1]["times faster"] and not cases[0]["times faster"]


def test_segments_are_compared_with_the_whole_video(tmp_path):
    pytest.importorskip("av")
    cases = reader_speed.measure_videos(tmp_path, seconds=12, segments=2, side=32)
    assert [case["episodes"] for case in cases] == [2, 2]
