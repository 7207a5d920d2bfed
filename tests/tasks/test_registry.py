"""What a checkpoint says about its task, in the file keys that older checkpoints have."""

from __future__ import annotations

import json

import pytest

from univla_jax.errors import UserError
from univla_jax.tasks import CorpusRecord, TaskRecord
from univla_jax.tasks.base import TaskSettings

SAVED = {
    "layout": "policy_video",
    "frames": 2,
    "action_frames": 3,
    "frame_spacing": 0,
    "sequence_length": 512,
    "views": ["image", "wrist_image"],
    "corpora": {
        "tabletop": {"control_hz": 5.0, "frame_spacing": 5, "grids": {"image": [3, 3]}},
    },
}


def test_the_file_keeps_its_keys():
    record = TaskRecord.from_json(json.loads(json.dumps(SAVED)))
    assert record.task == "policy_video" and record.chunk_size == 3 and not record.state
    assert json.loads(json.dumps(record.to_json())) == SAVED
    assert TaskRecord.from_json(record.to_json()) == record


def test_states_are_recorded_only_where_they_are_shown():
    record = TaskRecord.from_json({**SAVED, "state": True})
    assert record.state and record.to_json()["state"] is True
    assert "state" not in TaskRecord.from_json(SAVED).to_json()
    finer = TaskRecord.from_json({**SAVED, "state": True, "state_steps": 4})
    assert finer.settings.state_steps == finer.to_json()["state_steps"] == 4
    assert "state_steps" not in record.to_json()


def test_settings_are_those_of_training():
    assert TaskRecord.from_json(SAVED).settings == TaskSettings(
        frames=2, chunk_size=3, frame_spacing=0, views=("image", "wrist_image"), state=False
    )


def test_unknown_keys_and_missing_ones_are_named():
    with pytest.raises(UserError, match=r"assets\.layout\.colour: unknown key"):
        TaskRecord.from_json({**SAVED, "colour": 1})
    with pytest.raises(UserError, match=r"assets\.layout: missing key"):
        TaskRecord.from_json({})
    with pytest.raises(UserError, match=r"assets\.layout\.corpora\.mars\.gravity: unknown key"):
        corpora = {"mars": {**SAVED["corpora"]["tabletop"], "gravity": 3.7}}
        TaskRecord.from_json({**SAVED, "corpora": corpora})


def test_a_corpus_is_named_where_there_are_several():
    one = TaskRecord.from_json(SAVED)
    assert one.find_corpus() == one.find_corpus("tabletop") == "tabletop"
    assert isinstance(one.corpora["tabletop"], CorpusRecord)
    with pytest.raises(UserError, match="corpora tabletop; 'mars' is not among them"):
        one.find_corpus("mars")
    both = {name: SAVED["corpora"]["tabletop"] for name in ("tabletop", "bridge")}
    with pytest.raises(UserError, match="corpora bridge, tabletop; name one"):
        TaskRecord.from_json({**SAVED, "corpora": both}).find_corpus()
