"""Hostile robots beside good ones, at a real policy in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.inference import tiny_checkpoint
from univla_jax.benchmarks.serving_attack import _LIMIT, ATTACKS
from univla_jax.client import wire
from univla_jax.episode import Observation


def test_attacks_stay_what_they_are_called():
    example = Observation("go", {"image": np.zeros((8, 8, 3), np.uint8)})
    rng = np.random.default_rng(0)
    frames = {
        name: list(make(example, 100, rng)) for name, make in ATTACKS.items() if name != "storm"
    }
    assert {name: len(sent) for name, sent in frames.items()} == {
        **{"random": 100, "nested": 1, "too_long": 1},
        **{"sizes": 10, "words": 10, "replan": 10},
    }
    assert 0.98 * _LIMIT < len(frames["nested"][0]) <= _LIMIT < len(frames["too_long"][0])
    with pytest.raises(wire.WireError, match="more than 256 maps and lists"):
        wire.unpack(frames["nested"][0])
    sizes = [len(frame) for frame in frames["random"]]
    assert min(sizes) < 100 and max(sizes) > _LIMIT / 8


@pytest.mark.slow
def test_robots_get_their_answers_under_every_attack(tmp_path):
    folder = tiny_checkpoint.save(tmp_path / "policy", tiny_checkpoint.make_assets(), scale=20)
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "univla_jax.benchmarks.serving_attack"]
    options = [f"--checkpoint={folder}", "--clients=2", "--requests=10", "--attack_frames=200"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    subprocess.run([*command, *options, f"--json={result}"], env=environment, check=True)
    found = json.loads(result.read_text())
    for name in ATTACKS:
        assert found[f"{name}_wrong"] == 0 and found[f"{name}_answers"] >= 20, name
        assert found[f"{name}_resident_mb"] < 50, name
        assert found[f"{name}_failed"] == 0, name
        counts = [found[f"{name}_{kind}"] for kind in ("refused", "answered", "ended")]
        assert sum(counts) >= found[f"{name}_sent"] > 0, name
    assert found["nested_ended"] == found["nested_sent"] == 2
    assert found["too_long_ended"] == found["too_long_sent"] == 2
    assert found["sizes_refused"] == found["sizes_sent"] == 20
    assert found["words_refused"] == found["words_sent"] == 20
