"""Memory, operations, traffic and predicted time of a training step on a slice."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from univla_jax.errors import UserError
from univla_jax.models.decoder import Decoder
from univla_jax.models.decoder_config import GATE, REMAT_PRESETS, DecoderConfig
from univla_jax.pipeline.batch import Batch
from univla_jax.planning.calibration import published_efficiency
from univla_jax.planning.collectives import Traffic, analyze
from univla_jax.planning.hlo import Program
from univla_jax.planning.topologies import (
    GIB,
    CompiledProgram,
    Topology,
    compile_ahead,
    format_gib,
)
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training import hardware
from univla_jax.training.losses import LabelWeights, LossFn
from univla_jax.training.metrics import host_gigabytes
from univla_jax.training.model_setup import TrainSetup, label_weights
from univla_jax.training.sharding import shard_bytes, split_memory
from univla_jax.training.train_config import TrainConfig


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Lower bounds on the time of a step.

    Attributes:
      compute_seconds: all operations, the recomputed ones included, at the chips' bf16 peak.
      memory_seconds: ``least_traffic`` at the chips' HBM bandwidth.
    """

    compute_seconds: float
    memory_seconds: float

    @property
    def lower_bound(self) -> float:
        """Seconds; communication between chips comes on top where it does not overlap."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def published(self) -> float:
        """Seconds if arithmetic comes as near to the peak as in published steps of such a model.

        No bound, and not computed from the program: those steps hid what their chips exchanged.
        """
        return self.compute_seconds / published_efficiency()


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """What a train step needs on a slice; sizes are bytes per chip.

    Attributes:
      topology: name of the slice.
      chips: number of chips in it.
      mesh: devices along each mesh axis that is not 1.
      batch_size: sequences of a step.
      sequence_length: tokens of a sequence.
      accumulation: micro-batches of a step.
      remat: preset of what the backward pass keeps.
      parameters: bytes.
      optimizer: bytes of both moments on the chip.
      activations: bytes of everything that lives only during a step: activations, gradients,
        gathered parameters, the compiler's own buffers and the program.
      total: bytes at the worst moment.
      usable: bytes that a program may use on this chip.
      fits: whether the compiler placed it.
      flops: operations of a step by our own count (``training/hardware.py``), nothing recomputed.
      recomputed_flops: operations that the remat preset adds.
      tokens: per step, padding included.
      useful_tokens: per step, by the recipe's ``sample_tokens``.
      time: lower bounds.
      traffic: what the chips exchange, and the predicted time; None for a program that does not
        fit, or of a compiler that is not a TPU's.
      peak_flops: operations per second of all chips together at their bf16 peak.
      compile_seconds: of the TPU compiler, by the clock.
      compile_processor_seconds: the same in processor time of all threads.
      host_gigabytes: largest resident memory of this process so far.
      full_logits_total: bytes at the worst moment with a loss that holds all logits, or None.
      host: bytes that wait in the host's memory.
      changes: flags of ``train`` for what a search changed in the recipe beside what is said above.
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    batch_size: int
    sequence_length: int
    accumulation: int
    remat: str
    parameters: int
    optimizer: int
    activations: int
    total: int
    usable: int
    fits: bool
    flops: float
    recomputed_flops: float
    tokens: int
    useful_tokens: int
    time: StepTime
    traffic: Traffic | None
    peak_flops: float
    compile_seconds: float
    compile_processor_seconds: float
    host_gigabytes: float
    full_logits_total: int | None = None
    host: int = 0
    changes: str = ""

    @property
    def step_seconds(self) -> float:
        """Predicted time of a step; the lower bound where nothing can be predicted."""
        return self.traffic.step_seconds if self.traffic else self.time.lower_bound

    @property
    def seconds_per_token(self) -> float:
        """Time per useful token."""
        return self.step_seconds / self.useful_tokens

    @property
    def mfu(self) -> float:
        """Predicted model FLOP/s utilization: operations by our own count over the peak."""
        return self.flops / self.step_seconds / self.peak_flops

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = dataclasses.asdict(dataclasses.replace(self, traffic=None))
        return values | {
            "lower_bound_seconds": self.time.lower_bound,
            "published_seconds": self.time.published,
            "step_seconds": self.step_seconds,
            "mfu": self.mfu,
            "traffic": self.traffic and self.traffic.to_dict(),
        }

    def describe(self) -> str:
        """Some lines of text."""
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items()) or "one chip"
        fits = "fits" if self.fits else "DOES NOT FIT"
        useful = self.useful_tokens / self.tokens
        published_mfu = self.flops / self.time.published / self.peak_flops
        lines = {
            "slice": f"{self.topology}, {self.chips} chips, mesh {mesh}",
            "step": f"{self.batch_size} sequences x {self.sequence_length} tokens in "
            f"{self.accumulation} micro-batch(es), remat {self.remat!r}",
            "parameters": format_gib(self.parameters),
            "optimizer": format_gib(self.optimizer),
            "activations": f"{format_gib(self.activations)} with gradients, gathered weights and "
            "program",
            "total per chip": f"{format_gib(self.total)} of {format_gib(self.usable)} usable: "
            f"{fits}",
            **({"host": format_gib(self.host)} if self.host else {}),
            "operations": f"{self.flops:.3g} per step by our count, {self.recomputed_flops:.3g} "
            "recomputed",
            "tokens": f"{self.tokens:,} per step, {self.useful_tokens:,} useful ({useful:.0%})",
            "step time": f"at least {self.time.lower_bound:.3f} s (arithmetic "
            f"{self.time.compute_seconds:.3f}, memory {self.time.memory_seconds:.3f})",
            **(self.traffic.describe() if self.traffic else {}),
            "predicted": f"{self.step_seconds:.3f} s a step, {self.mfu:.1%} MFU, "
            f"{self.useful_tokens / self.step_seconds / self.chips:,.0f} useful tokens/s per device"
            if self.traffic
            else "nothing: no program of a TPU compiler",
            "as published": f"{self.time.published:.3f} s a step, {published_mfu:.1%} MFU, if "
            f"arithmetic reaches {published_efficiency():.1%} of the peak as Llama 3.1 8B does on "
            "v6e",
            "compilation": f"{self.compile_seconds:.0f} s ({self.compile_processor_seconds:.0f} s "
            f"of processor time), {self.host_gigabytes:.1f} GB of this machine",
        }
        if self.full_logits_total is not None:
            more = "" if self.full_logits_total <= self.usable else ", more than the chip has"
            lines["full-logit loss"] = f"{format_gib(self.full_logits_total)} in total{more}"
        return "\n".join(f"{name:<16}{value}" for name, value in lines.items())


def plan_training(
    config: TrainConfig, topology: Topology, *, full_logits: bool = False
) -> TrainingPlan:
    """Compiles the train step of a recipe for a slice.

    Args:
      config: the recipe; its token stores and tokenizers are not opened.
      topology: the slice.
      full_logits: also compile it with the loss that holds all logits, for comparison.

    Raises:
      UserError: mesh, batch and slice do not fit together.
    """
    setup = TrainSetup.on_devices(config, Vocabulary.emu3(), topology.devices)
    compiled = _compile(setup)
    decoder, chip = setup.model.config, topology.chip
    length = config.data.sequence_length
    tokens = config.data.batch_size * length
    flops = tokens * setup.flops_per_token
    recomputed = tokens * hardware.recomputed_flops(decoder, length)
    parameters = shard_bytes(setup.abstract.params)
    optimizer = shard_bytes(split_memory(setup.abstract.opt_state)[0])
    traffic = least_traffic(config, decoder, parameters, optimizer, dict(setup.mesh.shape))
    full = _compile(_with_full_logits(setup)).peak if full_logits else None
    # Parameters and moments live through the step at sizes that follow from their shardings;
    # whatever else is there at the worst moment is counted as activations.
    return TrainingPlan(
        topology=topology.name,
        chips=setup.mesh.size,
        mesh={axis: size for axis, size in setup.mesh.shape.items() if size > 1},
        batch_size=config.data.batch_size,
        sequence_length=length,
        accumulation=config.accumulation,
        remat=decoder.remat,
        parameters=parameters,
        optimizer=optimizer,
        activations=compiled.peak - parameters - optimizer,
        total=compiled.peak,
        usable=int(chip.hbm_gib * GIB),
        fits=compiled.fits,
        flops=flops,
        recomputed_flops=recomputed,
        tokens=tokens,
        useful_tokens=useful_tokens(config),
        time=StepTime(
            (flops + recomputed) / setup.mesh.size / (chip.teraflops * 1e12),
            traffic / (chip.gigabytes_per_second * 1e9),
        ),
        traffic=_traffic(compiled, topology),
        peak_flops=setup.mesh.size * chip.teraflops * 1e12,
        compile_seconds=compiled.seconds,
        compile_processor_seconds=compiled.processor_seconds,
        host_gigabytes=host_gigabytes(),
        full_logits_total=full,
        host=compiled.host,
    )


def _traffic(compiled: CompiledProgram, topology: Topology) -> Traffic | None:
    if topology.devices[0].platform != "tpu" or not compiled.text:
        return None
    return analyze(Program.parse(compiled.text), topology.chip, topology.shape)


def useful_tokens(config: TrainConfig) -> int:
    """Tokens per step that are no padding, as many usual samples per sequence as fit."""
    length, sample = config.data.sequence_length, config.sample_tokens
    if not sample:
        return config.data.batch_size * length
    samples = max(1, length // sample) if config.data.packing else 1
    return config.data.batch_size * min(length, samples * sample)


def least_traffic(
    config: TrainConfig,
    decoder: DecoderConfig,
    parameters: int,
    optimizer: int,
    mesh: dict[str, int],
) -> float:
    """Bytes that each chip moves to or from its memory in any schedule.

    Args:
      config: the recipe.
      decoder: its decoder.
      parameters: bytes per chip.
      optimizer: bytes per chip of both moments.
      mesh: devices along each axis.
    """
    # The chip's shards of parameters, moments and gradients are read and written once. The weights
    # of its tensor part, gathered over fsdp and context in the compute dtype, are read by the
    # forward and the backward pass of every micro-batch, and once more where layers are recomputed.
    # The inputs of all layers are written by the forward and read by the backward pass.
    gradients = parameters
    gathered = parameters * mesh["fsdp"] * mesh["context"]
    gathered *= decoder.compute_dtype.itemsize / decoder.storage_dtype.itemsize
    passes = 2 if GATE in REMAT_PRESETS[decoder.remat] else 3
    batch_parts = math.prod(mesh[axis] for axis in ("replica", "data", "fsdp", "context"))
    tokens = config.data.batch_size * config.data.sequence_length / batch_parts
    inputs = tokens * decoder.num_layers * decoder.hidden_size * decoder.compute_dtype.itemsize
    states = parameters + optimizer + gradients
    return 2 * states + config.accumulation * passes * gathered + 2 * inputs


def _compile(setup: TrainSetup) -> CompiledProgram:
    data = setup.config.data
    abstract = functools.partial(jax.ShapeDtypeStruct, sharding=setup.batch_sharding)
    shape = (data.batch_size, data.sequence_length)
    ids, small = abstract(shape, jnp.int32), abstract(shape, jnp.uint8)
    actions = None
    if setup.expert is not None:
        chunk = (data.batch_size, data.chunk_size, setup.expert.config.action_dim)
        actions = abstract(chunk, jnp.float32)
    batch = Batch(ids, small, small, positions=ids, segment_ids=ids, actions=actions)
    return compile_ahead(setup.train_step().lower(setup.abstract, batch))


# ----------------------------------------------------------------------------
# The textbook loss, with the logits of all positions at once: for comparison.


def _with_full_logits(setup: TrainSetup) -> TrainSetup:
    """The same setup with ``full_logit_loss``.

    Raises:
      UserError: there is an action expert.
    """
    if setup.expert is not None:
        raise UserError("--full_logits: not for a run with an action expert")
    return dataclasses.replace(
        setup, loss=full_logit_loss(setup.model, label_weights(setup.config.data))
    )


def full_logit_loss(model: Decoder, label_weights: LabelWeights) -> LossFn:
    """Equals ``training/losses.py`` in value; holds float32 logits [B, S, V] and their gradient."""

    def loss(params: Any, batch: Batch, step: jax.Array, rng: jax.Array | None) -> Any:
        hidden_BSD, _ = model.apply(
            {"params": params},
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            train=rng is not None,
            rngs=None if rng is None else {"dropout": rng},
        )
        logits_BSV = model.apply({"params": params}, hidden_BSD[:, :-1], method="unembed")
        weights = label_weights(batch, step)[:, 1:]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits_BSV, batch.tokens[:, 1:])
        return jnp.sum(weights * nll), jnp.sum(weights), {}

    return loss
