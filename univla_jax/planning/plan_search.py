"""Search for the best plan: compiles the most promising meshes, batch sizes and remat presets."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator

import tqdm

from univla_jax.cli import format_table
from univla_jax.errors import UserError
from univla_jax.models.decoder_config import REMAT_PRESETS
from univla_jax.planning.device_plan import DevicePlan, smaller_plans
from univla_jax.planning.topologies import Topology, format_gib
from univla_jax.planning.training_plan import TrainingPlan, plan_training
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training import hardware
from univla_jax.training.hardware import Chip
from univla_jax.training.mesh_choice import fsdp_limit
from univla_jax.training.model_setup import decoder_config
from univla_jax.training.sharding import MeshConfig
from univla_jax.training.train_config import TrainConfig

_TENSOR, _CONTEXT, _DATA, _BATCH_FACTORS = (1, 2, 4, 8), (1, 2, 4), (1, 2, 4, 8), (1, 2, 4)


def search_plans(config: TrainConfig, topology: Topology, *, limit: int) -> list[TrainingPlan]:
    """Compiles the ``limit`` most promising candidates; best plan first.

    Where the recipe does not fit by count, these are variations that take less memory: smaller
    moments, bfloat16 parameters, adapters (``device_plan.py``).

    Args:
      config: the recipe.
      topology: the slice.
      limit: how many to compile.

    Raises:
      UserError: no mesh divides the recipe's batch and the slice.
    """
    smaller = smaller_plans(config, topology.chip, topology.devices)
    own, counted = next(smaller)
    if not counted.fits:
        return _search_smaller(smaller, topology, limit)
    config = own  # with as many micro-batches as it takes
    slices = len({getattr(device, "slice_index", 0) for device in topology.devices})
    found = sorted(
        candidates(config, len(topology.devices), slices),
        key=lambda candidate: _expected_cost(candidate, topology.chip),
    )
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


def _search_smaller(
    smaller: Iterator[tuple[TrainConfig, DevicePlan]], topology: Topology, limit: int
) -> list[TrainingPlan]:
    """Compiles what fits by count of variations with less memory, the least changed first."""
    chosen = list(itertools.islice((pair for pair in smaller if pair[1].fits), limit))
    if not chosen:
        raise UserError(
            f"the step does not fit {topology.name} by count, nor do its variations with adapters "
            "beside four bits; take more chips, a smaller preset or shorter sequences"
        )
    bar = tqdm.tqdm(chosen, unit="candidate", file=sys.stderr)
    plans = [
        dataclasses.replace(plan_training(config, topology), changes=counted.flags)
        for config, counted in bar
    ]
    return sorted(plans, key=lambda plan: not plan.fits)


def candidates(config: TrainConfig, chips: int, slices: int = 1) -> Iterator[TrainConfig]:
    """Every variation of the recipe that divides evenly over ``chips`` of ``slices`` slices.

    The batch size is the recipe's or a multiple of it.
    """
    kv_heads = decoder_config(config.model, Vocabulary.emu3()).num_kv_heads
    choices = itertools.product(_TENSOR, _CONTEXT, _DATA, _BATCH_FACTORS, REMAT_PRESETS)
    # ``fsdp`` takes the chips that are left, so that every candidate uses the whole slice.
    for tensor, context, data, factor, preset in choices:
        batch_size = config.data.batch_size * factor
        fsdp, rest = divmod(chips, slices * data * tensor * context)
        micro_batch, uneven = divmod(batch_size, config.accumulation)
        uneven = uneven or rest or kv_heads % tensor or config.data.sequence_length % context
        uneven = uneven or (context > 1 and config.has_expert)
        if uneven or not fsdp or micro_batch % (slices * data * fsdp):
            continue
        yield dataclasses.replace(
            config,
            mesh=MeshConfig(replica=slices, data=data, fsdp=fsdp, tensor=tensor, context=context),
            data=dataclasses.replace(config.data, batch_size=batch_size),
            model=dataclasses.replace(
                config.model, overrides={**config.model.overrides, "remat": preset}
            ),
        )


def _expected_cost(config: TrainConfig, chip: Chip) -> tuple[float, int, int, int]:
    """Order of candidates: recomputed operations per token, then communication."""
    decoder = decoder_config(config.model, Vocabulary.emu3())
    recomputed = hardware.recomputed_flops(decoder, config.data.sequence_length)
    mesh, plane = config.mesh, fsdp_limit(chip)
    # Copies cost memory and an all-reduce; parameters split over all three axes of a torus cost
    # more than both.
    copies = mesh.data if mesh.fsdp <= plane else mesh.fsdp
    return recomputed, mesh.tensor * mesh.context, copies, config.data.batch_size


def search_table(plans: list[TrainingPlan]) -> str:
    """One line per plan."""
    header = [
        "mesh",
        "batch",
        "remat",
        "total per chip",
        "predicted step",
        "MFU",
        "us per useful token",
        "changes",
    ]
    lines = [
        [
            " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items()),
            str(plan.batch_size),
            plan.remat,
            format_gib(plan.total) + ("" if plan.fits else " (does not fit)"),
            f"{plan.step_seconds:.3f} s",
            f"{plan.mfu:.1%}",
            f"{1e6 * plan.seconds_per_token:.3f}",
            plan.changes,
        ]
        for plan in plans
    ]
    return format_table([header, *lines], left=len(header))
