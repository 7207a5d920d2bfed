"""Synthetic data has real sizes and takes no memory."""

from __future__ import annotations

from univla_jax.benchmarks.synthetic import EpisodeLengths, SyntheticEpisodes


def test_synthetic_episodes_take_no_memory():
    source = SyntheticEpisodes("libero", EpisodeLengths(2, 100))
    codes = source[1].codes["image"]
    assert codes.shape[1:] == (25, 25) and codes.base.size == 1
