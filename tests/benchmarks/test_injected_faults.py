"""Counting of named faults and false alarms, and going on after a run that was ended."""

from __future__ import annotations

import types

import pytest
from absl import flags
from absl.testing import flagsaver

from univla_jax.benchmarks import injected_faults
from univla_jax.simulators.tabletop.tabletop_expert import demonstrate

FAULT = "shouted words in the data"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the benchmark with a stand-in for the doctor; its figures, and all that was asked."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # other commands' flags may be required and missing
    record = types.SimpleNamespace(chunk_size=6)
    loaded = types.SimpleNamespace(folder="checkpoints/7", record=record)
    policy = types.SimpleNamespace(loaded=loaded, corpus="tabletop")
    monkeypatch.setattr(injected_faults.Policy, "load", lambda folder: policy)
    monkeypatch.setattr(injected_faults, "PolicyVariants", lambda policy, **options: policy)
    monkeypatch.setattr(injected_faults, "open_reader", lambda *where: [demonstrate(0)])
    saved, asked = [], []
    monkeypatch.setattr(injected_faults, "save", saved.append)

    def run(answer, **settings):
        def diagnosed(setup):
            asked.append(setup)
            return answer(setup, len(asked))

        monkeypatch.setattr(injected_faults, "_diagnosed", diagnosed)
        values = {"policy": "W", "source": "S", "clean": 3, "faults": [FAULT]} | settings
        with flagsaver.flagsaver(journal=str(tmp_path / "journal.jsonl"), **values):
            injected_faults.main([])
        return saved[-1], asked

    return run


def _says(said):
    return {"said": said, "sure": 1.0, "saw": "it"}


def test_what_is_named_and_what_is_an_alarm_is_counted(run):
    def answer(setup, number):
        shouted = setup.episodes[0].instruction.startswith("Instruction:")
        found = ["prompt", "data and checkpoint"] if shouted else ["nothing", ""]
        return _says(["resize", "simulator"] if number == 3 else found)

    figures, asked = run(answer)
    assert {setup.benchmark.execute for setup in asked} <= {0, 3}  # a half makes up a chunk of six
    assert [figures[k] for k in ("faults", "named", "clean", "false alarms")] == [1, 1, 3, 1]
    assert [name for name, f in figures["set-ups"].items() if not f["right"]] == ["clean 1"]


def test_a_run_that_was_ended_goes_on_behind_its_journal(run):
    def ended(setup, number):
        if number == 3:
            raise KeyboardInterrupt
        return _says(["nothing", ""])

    with pytest.raises(KeyboardInterrupt):
        run(ended)
    figures, asked = run(lambda setup, number: _says(["nothing", ""]))
    assert len(asked) == 3 + 2  # two were finished, and are not asked again
    assert [figures[k] for k in ("named", "false alarms")] == [0, 0]
    _, asked = run(lambda setup, number: _says(["nothing", ""]), source="another")
    assert len(asked) == 3 + 2 + 4
