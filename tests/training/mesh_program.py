"""Trains three steps on meshes of eight virtual CPU devices and prints what came out, as JSON.

Run by ``test_mesh.py`` in a process of its own, because the number of devices is fixed when JAX
starts: ``python -m tests.training.mesh_program NAME...`` with names of ``CASES``, or ``move``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["PJRT_NPROC"] = "64"  # threads: with few, devices that wait for each other starve
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from univla_jax.checkpoints import CheckpointConfig, Checkpointer
from univla_jax.models.lora import LoraConfig
from univla_jax.pipeline.batch import Batch
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.sequences.tokens import Role
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training.model_setup import TrainSetup
from univla_jax.training.optimizer import OptimizerConfig
from univla_jax.training.sharding import MeshConfig, make_mesh, to_global
from univla_jax.training.train_config import LossConfig, ModelConfig, TrainConfig

ROWS, LENGTH, STEPS = 16, 32, 3
VOCABULARY = Vocabulary.from_scratch(40, 30, 20)
CASES: dict[str, tuple[dict[str, int], int]] = {
    "one": ({"fsdp": 1}, 1),
    "one accumulated": ({"fsdp": 1}, 2),
    "one in sixteen": ({"fsdp": 1}, 16),
    "data 8": ({"data": 8}, 1),
    "data 8 accumulated": ({"data": 8}, 2),
    "fsdp 8": ({"fsdp": 8}, 1),
    "fsdp 8 accumulated": ({"fsdp": 8}, 2),
    "data 2 fsdp 2 tensor 2": ({"data": 2, "fsdp": 2, "tensor": 2}, 1),
    "data 2 fsdp 2 tensor 2 accumulated": ({"data": 2, "fsdp": 2, "tensor": 2}, 4),
    "fsdp 2 tensor 2 context 2": ({"fsdp": 2, "tensor": 2, "context": 2}, 1),
    "fsdp 2 tensor 2 context 2 accumulated": ({"fsdp": 2, "tensor": 2, "context": 2}, 2),
    "fsdp 2 tensor 4": ({"fsdp": 2, "tensor": 4}, 1),
    "adapters, one accumulated": ({"fsdp": 1}, 2),
    "adapters, fsdp 2 tensor 2 context 2 accumulated": ({"fsdp": 2, "tensor": 2, "context": 2}, 2),
}
ADAPTERS = LoraConfig(rank=4, rows="action")


def packed_batch(seed: int) -> Batch:
    """Rows of packed random segments of unequal length, some tokens labeled, some padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY.size, (ROWS, LENGTH)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, (ROWS, LENGTH)), axis=1).astype(np.int32)
    segments[:, LENGTH - 4 :] = 0
    starts = np.diff(segments, axis=1, prepend=0) != 0
    begun = np.maximum.accumulate(np.where(starts, np.arange(LENGTH), 0), axis=1)
    labeled = (rng.random((ROWS, LENGTH)) < 0.4) & ~starts & (segments > 0)
    role = rng.choice([Role.VISION, Role.ACTION], (ROWS, LENGTH))
    roles = np.where(labeled, role, Role.TEXT).astype(np.uint8)
    positions = np.where(segments > 0, np.arange(LENGTH) - begun, 0).astype(np.int32)
    return Batch(tokens, roles, np.zeros_like(roles), positions, segments)


def build(sizes: dict[str, int], accumulation: int, lora: LoraConfig | None = None) -> TrainSetup:
    """The tiny decoder on a mesh of the first devices; the moments of adapters wait on the host.

    With accumulation without dropout, because which rows share a micro-batch, and so a mask,
    depends on the mesh.
    """
    overrides = {"qkv_bias": True, "dropout": 0.0 if accumulation > 1 else 0.1}
    config = TrainConfig(
        total_steps=STEPS,
        model=ModelConfig("tiny", overrides, lora=lora or LoraConfig()),
        data=DataConfig(
            stores=(),
            task="policy_video",
            sequence_length=LENGTH,
            batch_size=ROWS,
            loss_on="both",
            vision_weight=(0.5, 0.25, 2),
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            min_learning_rate=1e-4,
            warmup_steps=1,
            offload=lora is not None and len(sizes) > 1,
        ),
        loss=LossConfig(max_labeled=24),
        mesh=MeshConfig(**{"fsdp": 1, **sizes}),
        accumulation=accumulation,
    )
    count = int(np.prod(list(sizes.values())))
    return TrainSetup.build(config, VOCABULARY, make_mesh(config.mesh, jax.devices()[:count]))


def run(sizes: dict[str, int], accumulation: int, lora: LoraConfig | None = None) -> dict[str, Any]:
    """Losses and gradient norms of the steps, first moments after the first, last parameters."""
    model = build(sizes, accumulation, lora)
    state, step = model.new_state(), model.train_step()
    result: dict[str, Any] = {"loss": [], "grad_norm": []}
    for number in range(STEPS):
        batch = to_global(packed_batch(number), model.batch_sharding, model.host_slice.count)
        state, metrics = step(state, batch)
        for name in ("loss", "grad_norm"):
            result[name].append(float(metrics[name]))
        if number == 0:
            result["gradient"] = _flat(state.opt_state[1].mu)
    result["params"] = _flat(state.params)
    result["split"] = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
    return result


def move() -> bool:
    """Saves a state split over eight devices, restores it on other meshes; whether it is equal."""
    saved = build({"fsdp": 8}, 1).new_state()
    wanted, equal = _flat(saved), True
    with tempfile.TemporaryDirectory() as folder:
        with Checkpointer(folder, CheckpointConfig()) as checkpointer:
            checkpointer.save(0, saved)
        for sizes in ({"fsdp": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
            template = build(sizes, 1).abstract
            with Checkpointer(folder, CheckpointConfig()) as checkpointer:
                restored = checkpointer.restore(template)
            placed = jax.tree.map(lambda x, t: x.sharding == t.sharding, restored, template)
            equal &= all(jax.tree.leaves(placed)) and _flat(restored) == wanted
    return equal


def _flat(tree: Any) -> list[float]:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(tree))]).tolist()


if __name__ == "__main__":
    results = {
        name: run(*CASES[name], ADAPTERS if "adapters" in name else None)
        if name in CASES
        else move()
        for name in sys.argv[1:]
    }
    json.dump(results, sys.stdout)
