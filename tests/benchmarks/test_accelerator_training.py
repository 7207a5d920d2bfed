"""Which way to train is tried first, and what happens to those that fail."""

from __future__ import annotations

import types

import jax
import pytest

from univla_jax.benchmarks import accelerator_training
from univla_jax.benchmarks.accelerator_device import Sizes
from univla_jax.benchmarks.accelerator_training import (
    Attempt,
    full_attempts,
    lora_attempts,
    measure_training,
)


def test_attempts_begin_with_the_largest():
    full = list(full_attempts(Sizes()))
    assert [(a.preset, a.moments, a.storage) for a in full[::6]] == [
        (name, *kind)
        for name in ("emu3_8b", "base", "small")
        for kind in (("float32", "float32"), ("int8", "bfloat16"))
    ]
    assert [a.batch for a in full[:6:2]] == [4, 2, 1]
    assert [a.base for a in list(lora_attempts(Sizes()))[::6]] == ["bfloat16", "int8", "int4"]


def _measure(monkeypatch, outcomes, limit=0):
    """Figures of attempts whose steps end as ``outcomes`` say; each counts as 10 bytes."""
    counted = types.SimpleNamespace(total=10)
    results = iter(outcomes)

    def step(sizes, attempt):
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(accelerator_training, "gc", types.SimpleNamespace(collect=lambda: None))
    monkeypatch.setattr(accelerator_training, "_step_figures", step)
    monkeypatch.setattr(accelerator_training, "count_memory", lambda setup: counted)
    monkeypatch.setattr(accelerator_training, "memory_limit", lambda: limit)
    monkeypatch.setattr(Attempt, "setup", lambda self, length: None)
    found = []
    measure_training(Sizes(), found.append, lora_attempts)
    return found


def test_the_first_that_fits_is_timed(monkeypatch):
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 17 GiB")
    found = _measure(monkeypatch, [full, {"step_s": 1.0}])
    assert "RESOURCE_EXHAUSTED" in found[0]["error"] and found[1]["step_s"] == 1.0
    assert (found[0]["remat"], found[1]["remat"]) == ("attention_block_up", "full")
    assert {f["attention"] for f in found} == {"auto"} and len(found) == 2


def test_another_error_is_tried_once_more_without_the_kernel(monkeypatch):
    found = _measure(monkeypatch, [ValueError("no engine"), {"step_s": 1.0}])
    assert [f["attention"] for f in found] == ["auto", "blocked"] and found[1]["step_s"] == 1.0
    found = _measure(monkeypatch, [ValueError("no engine"), ValueError("no engine")])
    assert [f["error"] for f in found] == ["ValueError: no engine"] * 2


def test_what_cannot_fit_is_not_tried(monkeypatch):
    found = _measure(monkeypatch, [], limit=9)
    assert len(found) == 18 and not any(f["fits"] for f in found)


@pytest.mark.slow
def test_a_step_with_adapters():
    sizes = Sizes(preset="tiny", length=32, micro_batches=(1,), repeats=1)
    found = []
    measure_training(sizes, found.append, lora_attempts)
    (figures,) = found
    assert figures["step_s"] > 0 and figures["base"] == "bfloat16" and figures["fits"]
