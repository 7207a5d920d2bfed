"""The plan of one training step: memory per chip, work, and the time it takes at least."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from univla_jax.errors import UserError
from univla_jax.models import decoder_config
from univla_jax.models.decoder import Decoder
from univla_jax.models.decoder_config import DecoderConfig
from univla_jax.pipeline.batch import Batch
from univla_jax.planning.topologies import GIB, Compiled, Topology, compile_for, shard_bytes
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training import hardware
from univla_jax.training.losses import LabelWeights, LossFn
from univla_jax.training.metrics import host_gigabytes
from univla_jax.training.model_setup import TrainSetup, label_weights
from univla_jax.training.sharding import make_mesh
from univla_jax.training.train_config import TrainConfig

# ----------------------------------------------------------------------------
# The loss as it is usually written, with the logits of all positions at once: for comparison.


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
# Plans as text.


def describe_plan(plan: TrainingPlan) -> str:
    """A plan in a dozen lines."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items()) or "one chip"
    fits = "fits" if plan.fits else "DOES NOT FIT"
    share = plan.useful_tokens / plan.tokens
    lines = [
        ("slice", f"{plan.topology}, {plan.chips} chips, mesh {mesh}"),
        (
            "step",
            f"{plan.batch_size} rows x {plan.sequence_length} tokens in {plan.accumulation} "
            f"micro-batch(es), remat {plan.remat!r}",
        ),
        ("parameters", gib(plan.parameters)),
        ("optimizer", gib(plan.optimizer)),
        ("activations", f"{gib(plan.activations)} with gradients, gathered weights and program"),
        ("total per chip", f"{gib(plan.total)} of {gib(plan.usable)} usable: {fits}"),
        (
            "operations",
            f"{plan.flops:.3g} per step by our count, {plan.recomputed_flops:.3g} recomputed",
        ),
        ("tokens", f"{plan.tokens:,} per step, {plan.useful_tokens:,} useful ({share:.0%})"),
        (
            "step time",
            f"at least {plan.time.lower_bound:.3f} s (arithmetic {plan.time.compute_seconds:.3f}, "
            f"memory {plan.time.memory_seconds:.3f})",
        ),
        (
            "compilation",
            f"{plan.compile_seconds:.0f} s ({plan.compile_processor_seconds:.0f} s of processor "
            f"time), {plan.host_gigabytes:.1f} GB of this machine",
        ),
    ]
    if plan.full_logits_total is not None:
        usable = "" if plan.full_logits_total <= plan.usable else ", more than the chip has"
        lines.append(("full-logit loss", f"{gib(plan.full_logits_total)} in total{usable}"))
    return "\n".join(f"{name:<16}{value}" for name, value in lines)


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f} GiB"


# ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StepTime:
    """The shortest time of a step if only one thing took time.

    Attributes:
      compute_seconds: all operations, the recomputed ones included, at the chips' bf16 peak.
      memory_seconds: the traffic which no schedule avoids, at the chips' HBM bandwidth: see
        ``least_traffic``.
    """

    compute_seconds: float
    memory_seconds: float

    @property
    def lower_bound(self) -> float:
        """Seconds; what exchanging data between chips costs comes on top where it is not hidden."""
        return max(self.compute_seconds, self.memory_seconds)


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """What the real train step needs on a slice; sizes are bytes per chip.

    Attributes:
      topology: name of the slice.
      chips: in it.
      mesh: devices along each mesh axis that is not 1.
      batch_size: rows of a step.
      sequence_length: tokens of a row.
      accumulation: micro-batches of a step.
      remat: preset of what the backward pass keeps.
      parameters: bytes.
      optimizer: bytes of both moments.
      activations: bytes of everything that lives only during a step: activations, gradients,
        gathered parameters, the compiler's own buffers and the program.
      total: bytes at the worst moment.
      usable: bytes which a program may use on this chip.
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
    decoder_config: str
    parameters: int
    optimizer: int
    activations: int
    total: int
    usable: int
    fits: bool
    hardware: float
    recomputed_flops: float
    tokens: int
    useful_tokens: int
    time: StepTime
    compile_seconds: float
    compile_processor_seconds: float
    host_gigabytes: float
    full_logits_total: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self) | {"lower_bound_seconds": self.time.lower_bound}


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
    run = TrainSetup.build(config, Vocabulary.emu3(), make_mesh(config.mesh, topology.devices))
    compiled = _compile(run)
    decoder, chip = run.model.config, topology.chip
    tokens = config.data.batch_size * config.data.sequence_length
    length = config.data.sequence_length
    work = tokens * run.flops_per_token
    again = tokens * hardware.recomputed_flops(decoder, length)
    parameters = shard_bytes(run.abstract.params)
    optimizer = shard_bytes(run.abstract.opt_state)
    traffic = least_traffic(config, decoder, parameters, optimizer, dict(run.mesh.shape))
    full = _compile(with_full_logits(run)).total if full_logits else None
    return TrainingPlan(
        topology=topology.name,
        chips=run.mesh.size,
        mesh={axis: size for axis, size in run.mesh.shape.items() if size > 1},
        batch_size=config.data.batch_size,
        sequence_length=length,
        accumulation=config.accumulation,
        remat=decoder.remat,
        parameters=parameters,
        optimizer=optimizer,
        activations=compiled.total - parameters - optimizer,
        total=compiled.total,
        usable=int(chip.hbm_gib * GIB),
        fits=compiled.fits,
        flops=work,
        recomputed_flops=again,
        tokens=tokens,
        useful_tokens=useful_tokens(config),
        time=StepTime(
            (work + again) / run.mesh.size / (chip.teraflops * 1e12),
            traffic / (chip.gigabytes_per_second * 1e9),
        ),
        compile_seconds=compiled.seconds,
        compile_processor_seconds=compiled.processor_seconds,
        host_gigabytes=host_gigabytes(),
        full_logits_total=full,
    )


def with_full_logits(run: TrainSetup) -> TrainSetup:
    """The same run with the loss that holds all logits.

    Raises:
      UserError: the run has an action expert.
    """
    if run.expert is not None:
        raise UserError("--full_logits: not for a run with an action expert")
    return dataclasses.replace(run, loss=full_logit_loss(run.model, label_weights(run.config.data)))


def useful_tokens(config: TrainConfig) -> int:
    """Tokens per step which are no padding, as many usual samples per row as fit."""
    length, sample = config.data.sequence_length, config.sample_tokens
    if not sample:
        return config.data.batch_size * length
    per_row = max(1, length // sample) if config.data.packing else 1
    return config.data.batch_size * min(length, per_row * sample)


def least_traffic(
    config: TrainConfig,
    decoder: DecoderConfig,
    parameters: int,
    optimizer: int,
    mesh: dict[str, int],
) -> float:
    """Bytes which each chip moves to or from its memory in any schedule.

    Its part of parameters, moments and gradients is read and written once; the weights of its
    tensor part, gathered in the compute type, are read by the forward and the backward pass of
    every micro-batch, and once more where layers are recomputed; the inputs of all layers are
    written and read.
    """
    whole = parameters * mesh["fsdp"] * mesh["context"]
    whole *= decoder.compute_dtype.itemsize / decoder.storage_dtype.itemsize
    passes = 2 if decoder_config.GATE in decoder_config.REMAT_PRESETS[decoder.remat] else 3
    parts = math.prod(mesh[axis] for axis in ("replica", "data", "fsdp", "context"))
    tokens = config.data.batch_size * config.data.sequence_length / parts
    kept = 2 * tokens * decoder.num_layers * decoder.hidden_size * decoder.compute_dtype.itemsize
    gradients = parameters
    return 2 * (parameters + optimizer + gradients) + config.accumulation * passes * whole + kept


def _compile(run: TrainSetup) -> Compiled:
    batch = _abstract_batch(run)
    lowered = run.train_step().lower(run.abstract, batch)
    return compile_for(lowered, shard_bytes((run.abstract, batch)))


def _abstract_batch(run: TrainSetup) -> Batch:
    shape = (run.config.data.batch_size, run.config.data.sequence_length)
    place = functools.partial(jax.ShapeDtypeStruct, sharding=run.batch_sharding)
    ids, small = place(shape, jnp.int32), place(shape, jnp.uint8)
    actions = None
    if run.expert is not None:
        steps, dimensions = run.config.data.chunk_size, run.expert.config.action_dim
        actions = place((shape[0], steps, dimensions), jnp.float32)
    return Batch(ids, small, small, positions=ids, segment_ids=ids, actions=actions)
