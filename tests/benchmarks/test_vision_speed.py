"""The comparison of vision encoders runs both on the same frames."""

from __future__ import annotations

import pytest

from univla_jax.benchmarks import vision_speed

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.mark.slow
def test_both_encoders_make_as_many_codes():
    row = vision_speed.compare("quickstart", size=32, batch=2, repeats=1)
    assert row["preset"] == "quickstart"
    assert row["univla_jax frames/s"] > 0 and row["transformers frames/s"] > 0
