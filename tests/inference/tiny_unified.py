"""A checkpoint with random parameters that was trained on every direction, as its assets say."""

from __future__ import annotations

import dataclasses

from tests.inference import tiny_checkpoint
from univla_jax.tasks import TaskRecord, records_to_json


def unified_assets(*names: str, **changes):
    """Assets of a mixture of the named tasks, all of them by default."""
    base = TaskRecord.from_json(tiny_checkpoint.make_assets().task)
    records = {
        "policy": base,
        "dynamics": dataclasses.replace(base, frames=3, labels="vision"),
        "world_model": dataclasses.replace(base, task="world_model", frames=3),
        "together": dataclasses.replace(
            base, task="world_model", frames=2, views_together=True, views=("image", "wrist_image")
        ),
        "value": dataclasses.replace(base, task="value", frames=3),
    }
    chosen = [dataclasses.replace(records[name], **changes) for name in names or records]
    assets = tiny_checkpoint.make_assets()
    return dataclasses.replace(assets, task=records_to_json(chosen))


def save(folder, *names: str, **changes):
    """Writes the checkpoint; returns its workdir."""
    return tiny_checkpoint.save(folder, unified_assets(*names, **changes), scale=20)
