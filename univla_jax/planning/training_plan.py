"""Memory, operations and lower bound on the time of a training step; search for the best plan."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tqdm

from univla_jax.cli import format_table
from univla_jax.errors import UserError
from univla_jax.models.decoder import Decoder
from univla_jax.models.decoder_config import GATE, REMAT_PRESETS, DecoderConfig
from univla_jax.pipeline.batch import Batch
from univla_jax.planning.topologies import (
    GIB,
    CompiledProgram,
    Topology,
    compile_ahead,
    format_gib,
    shard_bytes,
)
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training import hardware
from univla_jax.training.losses import LabelWeights, LossFn
from univla_jax.training.metrics import host_gigabytes
from univla_jax.training.model_setup import TrainSetup, decoder_config, label_weights
from univla_jax.training.sharding import MeshConfig, make_mesh
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
      optimizer: bytes of both moments.
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
      compile_seconds: of the TPU compiler, by the clock.
      compile_processor_seconds: the same in processor time of all threads.
      host_gigabytes: largest resident memory of this process so far.
      full_logits_total: bytes at the worst moment with a loss that holds all logits, or None.
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
    compile_seconds: float
    compile_processor_seconds: float
    host_gigabytes: float
    full_logits_total: int | None = None

    @property
    def seconds_per_token(self) -> float:
        """Lower bound of the time per useful token."""
        return self.time.lower_bound / self.useful_tokens

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self) | {"lower_bound_seconds": self.time.lower_bound}

    def describe(self) -> str:
        """A dozen lines of text."""
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items()) or "one chip"
        fits = "fits" if self.fits else "DOES NOT FIT"
        useful = self.useful_tokens / self.tokens
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
            "operations": f"{self.flops:.3g} per step by our count, {self.recomputed_flops:.3g} "
            "recomputed",
            "tokens": f"{self.tokens:,} per step, {self.useful_tokens:,} useful ({useful:.0%})",
            "step time": f"at least {self.time.lower_bound:.3f} s (arithmetic "
            f"{self.time.compute_seconds:.3f}, memory {self.time.memory_seconds:.3f})",
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
    setup = TrainSetup.build(config, Vocabulary.emu3(), make_mesh(config.mesh, topology.devices))
    compiled = _compile(setup)
    decoder, chip = setup.model.config, topology.chip
    length = config.data.sequence_length
    tokens = config.data.batch_size * length
    flops = tokens * setup.flops_per_token
    recomputed = tokens * hardware.recomputed_flops(decoder, length)
    parameters = shard_bytes(setup.abstract.params)
    optimizer = shard_bytes(setup.abstract.opt_state)
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
        compile_seconds=compiled.seconds,
        compile_processor_seconds=compiled.processor_seconds,
        host_gigabytes=host_gigabytes(),
        full_logits_total=full,
    )


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


# ----------------------------------------------------------------------------
# Plan search: compiles the most promising meshes, batch sizes and remat presets and ranks them.


_TENSOR, _CONTEXT, _BATCH_FACTORS = (1, 2, 4, 8), (1, 2, 4), (1, 2, 4)


def search_plans(config: TrainConfig, topology: Topology, *, limit: int) -> list[TrainingPlan]:
    """Compiles the ``limit`` most promising candidates; best plan first.

    Args:
      config: the recipe.
      topology: the slice.
      limit: how many to compile.

    Raises:
      UserError: no mesh divides the recipe's batch and the slice.
    """
    found = sorted(candidates(config, len(topology.devices)), key=_expected_cost)
    if not found:
        raise UserError(
            f"no mesh of {len(topology.devices)} chips divides a batch of {config.data.batch_size} "
            f"x {config.data.sequence_length} tokens; change config.data.batch_size"
        )
    # What fits into memory is known only after compiling, and remat decides it most. So the presets
    # take turns: the best candidate of each is compiled before the second best of any.
    by_preset: dict[str, list[TrainConfig]] = {}
    for candidate in found:
        by_preset.setdefault(candidate.model.overrides["remat"], []).append(candidate)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_preset.values()))
    chosen = [candidate for candidate in turns if candidate is not None][:limit]
    bar = tqdm.tqdm(chosen, unit="candidate", file=sys.stderr)
    plans = [plan_training(candidate, topology) for candidate in bar]
    return sorted(plans, key=lambda plan: (not plan.fits, plan.seconds_per_token))


def candidates(config: TrainConfig, chips: int) -> Iterator[TrainConfig]:
    """Every variation of the recipe that divides evenly over ``chips``.

    The batch size is the recipe's or a multiple of it.
    """
    kv_heads = decoder_config(config.model, Vocabulary.emu3()).num_kv_heads
    choices = itertools.product(_TENSOR, _CONTEXT, _BATCH_FACTORS, REMAT_PRESETS)
    # ``fsdp`` takes the chips that are left, so that every candidate uses the whole slice.
    for tensor, context, factor, preset in choices:
        batch_size = config.data.batch_size * factor
        fsdp, rest = divmod(chips, tensor * context)
        micro_batch, uneven = divmod(batch_size, config.accumulation)
        uneven = uneven or rest or kv_heads % tensor or config.data.sequence_length % context
        if uneven or not fsdp or micro_batch % fsdp:
            continue
        yield dataclasses.replace(
            config,
            mesh=MeshConfig(fsdp=fsdp, tensor=tensor, context=context),
            data=dataclasses.replace(config.data, batch_size=batch_size),
            model=dataclasses.replace(
                config.model, overrides={**config.model.overrides, "remat": preset}
            ),
        )


def _expected_cost(config: TrainConfig) -> tuple[float, int, int]:
    """Order of candidates: recomputed operations per token, then communication inside layers."""
    decoder = decoder_config(config.model, Vocabulary.emu3())
    recomputed = hardware.recomputed_flops(decoder, config.data.sequence_length)
    return recomputed, config.mesh.tensor * config.mesh.context, config.data.batch_size


def search_table(plans: list[TrainingPlan]) -> str:
    """One line per plan."""
    header = ["mesh", "batch", "remat", "total per chip", "step at least", "us per useful token"]
    lines = [
        [
            " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items()),
            str(plan.batch_size),
            plan.remat,
            format_gib(plan.total) + ("" if plan.fits else " (does not fit)"),
            f"{plan.time.lower_bound:.3f} s",
            f"{1e6 * plan.seconds_per_token:.3f}",
        ]
        for plan in plans
    ]
    return format_table([header, *lines], left=len(header))
