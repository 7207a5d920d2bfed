"""The command: time shared out, processes watched, figures kept as they come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from tests.conftest import REPOSITORY
from univla_jax.benchmarks import accelerator
from univla_jax.benchmarks.accelerator_device import Sizes

TINY = (
    *("--preset=tiny", "--smaller=", "--vision=quickstart", "--prompt=40", "--count=4"),
    *("--length=64", "--frames=4", "--side=32", "--repeats=1", "--batches=1"),
)


def test_what_a_part_said_before_its_time_was_over_is_kept(monkeypatch):
    over = threading.Event()

    class Timer:  # its time is over when the first figure has come
        def __init__(self, seconds, kill):
            self._kill = lambda: (over.wait(), kill())

        def start(self):
            threading.Thread(target=self._kill, daemon=True).start()

        def is_alive(self):
            return not over.is_set()

        def cancel(self):
            over.set()

    monkeypatch.setattr(accelerator.threading, "Timer", Timer)
    code = "import time; print('noise'); print('FIGURES {\"a\": 1}', flush=True); time.sleep(600)"
    found = []

    def emit(figures):
        found.append(figures)
        over.set()

    accelerator.run_part([sys.executable, "-S", "-c", code], 3, emit, os.environ)
    assert found == [{"a": 1}, {"error": "stopped after its 3 s"}]


def test_a_crash_is_a_figure():
    code, found = "import sys; print('FIGURES {\"a\": 1}'); sys.exit('no such kernel')", []
    accelerator.run_part([sys.executable, "-S", "-c", code], 600, found.append, os.environ)
    assert found == [{"a": 1}, {"error": "exit status 1: no such kernel"}]


def test_parts_share_the_time_that_is_left(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(accelerator.time, "monotonic", lambda: clock[0])
    weights = {"first": 1.0, "second": 3.0, "third": 4.0}
    monkeypatch.setattr(accelerator, "PARTS", {n: (None, w) for n, w in weights.items()})
    given, saved = {}, []

    def run(part, seconds, emit):
        given[part] = seconds
        clock[0] += 4 if part == "first" else 74
        emit({"done": part})

    save = lambda figures: saved.append(json.loads(json.dumps(figures)))  # noqa: E731
    figures = accelerator.run_parts(list(weights), 80, run, save)
    assert given == {"first": 10.0, "second": pytest.approx(76 * 3 / 7)}
    assert figures["third"] == [{"skipped": "2 s left for it"}]
    assert saved[0] == {"first": [{"done": "first"}]} and saved[-1] == figures


def test_an_error_of_a_part_is_a_figure(monkeypatch):
    def fail(sizes, emit):
        emit({"a": 1})
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    monkeypatch.setitem(accelerator.PARTS, "decode", (fail, 1.0))
    found = []
    accelerator.measure("decode", Sizes(), found.append)
    assert found == [{"a": 1}, {"error": "RuntimeError: RESOURCE_EXHAUSTED: out of memory"}]


def test_the_peer_is_compared_where_both_were_measured():
    figures = {
        "decode": [
            {"batch": 1, "ms_per_token": 5.0, "call_ms": 300.0},
            {"batch": 8, "error": "out of memory"},
        ],
        "peer_decode": [{"torch": "2"}, {"batch": 1, "ms_per_token": 20.0, "call_ms": 1200.0}],
        "vision": [{"dtype": "float32", "frames_per_second": 30.0}],
        "peer_vision": [{"frames": 8, "frames_per_second": 10.0}],
    }
    assert accelerator.compare_with_peer(figures) == [
        {"batch": 1, "ms_per_token_times_less": 4.0, "call_ms_times_less": 4.0},
        {"frames_per_second_times_more": 3.0},
    ]
    assert accelerator.compare_with_peer({"decode": [{"skipped": ""}]}) == []


def test_pytorch_has_the_card_for_itself():
    assert accelerator.child_environment("peer_decode", {})["JAX_PLATFORMS"] == "cpu"
    kept = accelerator.child_environment("decode", {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"})
    assert kept == {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}


@pytest.mark.slow
def test_the_command_measures_a_small_model(tmp_path):
    out = tmp_path / "folder" / "figures.json"
    began = time.monotonic()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "univla_jax.benchmarks.accelerator", *TINY, f"--out={out}"),
            *("--parts=device,decode", "--minutes=10"),
        ],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert figures["device"][0]["backend"] == "cpu"
    (decode, seconds) = figures["decode"]
    assert decode["ms_per_token"] > 0 and decode["weights"] == "bfloat16"
    assert seconds["seconds"] < time.monotonic() - began
