"""The data benchmark measures what it says."""

from __future__ import annotations

from univla_jax.benchmarks import data_speed
from univla_jax.benchmarks.synthetic import Lengths, SyntheticEpisodes
from univla_jax.data.datasets import DATASETS


def test_the_libero_case_runs_from_disk(tmp_path, capsys):
    rows = data_speed.libero(tmp_path, seconds=0.05, workers=0, episodes=4)
    assert [row["rows"] for row in rows] == ["padded 3200", "packed 3200", "packed 8000"]
    assert all(row["samples/s"] > 0 for row in rows)
    assert rows[2]["useful tokens %"] > rows[0]["useful tokens %"]
    assert "useful tokens %" in capsys.readouterr().out


def test_the_mixture_holds_every_corpus_of_the_world_model():
    assert {"tabletop", "aloha", "libero_10"}.isdisjoint(data_speed.MIXTURE)
    assert set(data_speed.MIXTURE) <= set(DATASETS)
    source = SyntheticEpisodes("droid", data_speed.mixture_lengths("droid", 0.001))
    assert len(source) == 76
    assert min(len(source[i]) for i in range(76)) >= 6 * DATASETS["droid"].frame_spacing


def test_synthetic_episodes_take_no_memory():
    source = SyntheticEpisodes("libero", Lengths(2, 100), views=("image",))
    codes = source[1].codes["image"]
    assert codes.shape[1:] == (25, 25) and codes.base.size == 1
