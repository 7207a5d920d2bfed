"""Plan search: compiles the most promising meshes, batch sizes and remat presets and ranks them."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator

import tqdm

from univla_jax.cli import format_table
from univla_jax.errors import UserError
from univla_jax.models.decoder_config import REMAT_PRESETS
from univla_jax.planning.topologies import Topology, format_gib
from univla_jax.planning.training_plan import TrainingPlan, plan_training
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training import hardware
from univla_jax.training.model_setup import decoder_config
from univla_jax.training.sharding import MeshConfig
from univla_jax.training.train_config import TrainConfig

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
