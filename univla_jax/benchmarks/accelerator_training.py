"""Training parts of ``benchmarks.accelerator``: the first of several ways to train that fits."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any

import jax

from univla_jax.benchmarks.accelerator_device import (
    Emit,
    Sizes,
    describe_error,
    draw_params,
    is_out_of_memory,
    memory_limit,
    peak_memory,
)
from univla_jax.benchmarks.harness import timed
from univla_jax.benchmarks.training_speed import random_batch
from univla_jax.models.lora import LoraConfig
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.planning.memory_count import count_memory
from univla_jax.planning.topologies import GIB
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training import hardware
from univla_jax.training.model_setup import TrainSetup, nn_shapes
from univla_jax.training.optimizer import OptimizerConfig
from univla_jax.training.sharding import MeshConfig, make_mesh, to_global
from univla_jax.training.train_config import LossConfig, ModelConfig, TrainConfig

_LABELED = 0.05  # of the tokens of a policy's sample
_RANK = 16


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One way to train; the first of several that fits is timed.

    Attributes:
      preset: of the decoder.
      batch: sequences of a step.
      remat: preset.
      base: of LoRA's frozen matrices, ``"bfloat16"`` or a kind of few bits; empty trains in full.
      moments: ``OptimizerConfig.moments_dtype``.
      storage: type of the parameters where all are trained.
      attention: implementation.
    """

    preset: str
    batch: int
    remat: str
    base: str = ""
    moments: str = "float32"
    storage: str = "float32"
    attention: str = "auto"

    def config(self, length: int) -> TrainConfig:
        """The run of a policy, every twentieth token labeled."""
        overrides = {"remat": self.remat, "attention": self.attention, "attention_dropout": 0.0}
        overrides |= {"dtype": "bfloat16"} | ({} if self.base else {"param_dtype": self.storage})
        lora = LoraConfig()
        if self.base:
            lora = LoraConfig(rank=_RANK, base="" if self.base == "bfloat16" else self.base)
        rounding = "stochastic" if self.storage == "bfloat16" else "nearest"
        return TrainConfig(
            total_steps=1000,
            model=ModelConfig(self.preset, overrides, lora=lora),
            data=DataConfig(
                stores=(), task="policy_video", sequence_length=length, batch_size=self.batch
            ),
            optimizer=OptimizerConfig(
                warmup_steps=0, moments_dtype=self.moments, rounding=rounding
            ),
            loss=LossConfig(max_labeled=round(_LABELED * length) + 1),
            mesh=MeshConfig(fsdp=1),
        )

    def setup(self, length: int) -> TrainSetup:
        """The train step as the train command builds it, on one device."""
        config = self.config(length)
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        return TrainSetup.build(config, Vocabulary.emu3(), mesh)


def full_attempts(sizes: Sizes) -> Iterator[Attempt]:
    """Everything trained: float32 AdamW, then small states, then smaller presets."""
    for name in (sizes.preset, *sizes.smaller):
        for moments, storage in (("float32", "float32"), ("int8", "bfloat16")):
            for batch in sizes.micro_batches:
                for remat in ("attention_block_up", "full"):
                    yield Attempt(name, batch, remat, moments=moments, storage=storage)


def lora_attempts(sizes: Sizes) -> Iterator[Attempt]:
    """Adapters of rank 16 beside a base in bfloat16, or in fewer bits where that is too much."""
    for base in ("bfloat16", "int8", "int4"):
        for batch in sizes.micro_batches:
            for remat in ("attention_block_up", "full"):
                yield Attempt(sizes.preset, batch, remat, base=base)


def measure_training(
    sizes: Sizes, emit: Emit, attempts: Callable[[Sizes], Iterator[Attempt]]
) -> None:
    """A train step of the first attempt that fits; those passed over are emitted too."""
    limit, attention = memory_limit(), "auto"
    for attempt in attempts(sizes):
        attempt = dataclasses.replace(attempt, attention=attention)
        names = dataclasses.asdict(attempt)
        count = count_memory(attempt.setup(sizes.length)).total
        if limit and count > limit:
            emit(names | {"counted_gib": count / GIB, "fits": False})
            continue
        while True:
            try:
                emit(names | {"counted_gib": count / GIB} | _step_figures(sizes, attempt))
                return
            except Exception as error:  # a card never seen
                emit(names | {"counted_gib": count / GIB, "error": describe_error(error)})
                full = is_out_of_memory(error)
            gc.collect()
            if full:
                break
            if attention == "blocked":
                return
            # Perhaps the kernel: from here on with attention that any backend has.
            attention = "blocked"
            attempt = dataclasses.replace(attempt, attention=attention)
            names = dataclasses.asdict(attempt)


def _step_figures(sizes: Sizes, attempt: Attempt) -> dict[str, Any]:
    setup = attempt.setup(sizes.length)
    shapes = nn_shapes(setup.model, None, setup.mesh)
    kind = setup.model.config.lora.base if setup.model.config.lora is not None else ""
    state, step = setup.new_state(draw_params(shapes, kind)), setup.train_step()
    arrays = to_global(
        random_batch(_LABELED, sizes.length, batch_size=attempt.batch), setup.batch_sharding
    )

    def run() -> float:
        nonlocal state
        state, metrics = step(state, arrays)
        return float(metrics["loss"])

    loss, compiled = timed(run)
    seconds = min(timed(run)[1].wall for _ in sizes.turns())
    tokens = attempt.batch * sizes.length
    figures = {
        "fits": True,
        "step_s": seconds,
        "first_step_s": compiled.wall,
        "tokens_per_second": tokens / seconds,
        "flops": tokens * setup.flops_per_token,
        "first_loss": loss,
        "peak_bytes": peak_memory(),
    }
    chip = hardware.find_chip(jax.devices()[0])
    if chip is not None:
        figures["mfu"] = figures["flops"] / seconds / chip.teraflops / 1e12
    return figures
