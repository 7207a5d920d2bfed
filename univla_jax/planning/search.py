"""Plan search: compiles the most promising meshes, batch sizes and remat presets and ranks them."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator

import tqdm

from univla_jax.errors import UserError
from univla_jax.models import decoder_config as remat
from univla_jax.planning.topologies import Topology
from univla_jax.planning.training_plan import TrainingPlan, gib, plan_training
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training import hardware
from univla_jax.training.model_setup import decoder_config
from univla_jax.training.sharding import MeshConfig
from univla_jax.training.train_config import TrainConfig

_TENSOR, _CONTEXT, _BATCHES = (1, 2, 4, 8), (1, 2, 4), (1, 2, 4)


def search_plans(config: TrainConfig, topology: Topology, *, limit: int) -> list[TrainingPlan]:
    """Compiles the ``limit`` candidates that promise most, best first.

    Candidates keep the recipe's batch size or multiply it. They are ordered by arithmetic per
    token, the recomputed part included, then by how little is exchanged inside layers (tensor and
    context parts). Of those that differ only in remat, all are tried: what fits decides.

    Args:
      config: the recipe.
      topology: the slice.
      limit: how many to compile.

    Raises:
      UserError: no mesh divides the recipe's batch and the slice.
    """
    found = sorted(candidates(config, len(topology.devices)), key=_promise)
    if not found:
        raise UserError(
            f"no mesh of {len(topology.devices)} chips divides a batch of {config.data.batch_size} "
            f"rows x {config.data.sequence_length} tokens; change config.data.batch_size"
        )
    bar = tqdm.tqdm(_spread(found, limit), unit="candidate", file=sys.stderr)
    plans = [plan_training(candidate, topology) for candidate in bar]
    return sorted(plans, key=lambda plan: (not plan.fits, seconds_per_token(plan)))


def candidates(config: TrainConfig, chips: int) -> Iterator[TrainConfig]:
    """Every variation of the recipe that divides evenly over ``chips``."""
    heads = decoder_config(config.model, Vocabulary.emu3()).num_kv_heads
    choices = itertools.product(_TENSOR, _CONTEXT, _BATCHES, remat.REMAT_PRESETS)
    for tensor, context, times, preset in choices:
        rows = config.data.batch_size * times
        fsdp, rest = divmod(chips, tensor * context)
        micro, uneven = divmod(rows, config.accumulation)
        odd = rest or uneven or heads % tensor or config.data.sequence_length % context
        if odd or not fsdp or micro % fsdp:
            continue
        yield dataclasses.replace(
            config,
            mesh=MeshConfig(fsdp=fsdp, tensor=tensor, context=context),
            data=dataclasses.replace(config.data, batch_size=rows),
            model=dataclasses.replace(
                config.model, overrides={**config.model.overrides, "remat": preset}
            ),
        )


def seconds_per_token(plan: TrainingPlan) -> float:
    """Lower bound of the time per useful token."""
    return plan.time.lower_bound / plan.useful_tokens


def _promise(config: TrainConfig) -> tuple[float, int, int]:
    decoder = decoder_config(config.model, Vocabulary.emu3())
    again = hardware.recomputed_flops(decoder, config.data.sequence_length)
    exchanged = config.mesh.tensor * config.mesh.context
    return again, exchanged, config.data.batch_size


def _spread(found: list[TrainConfig], limit: int) -> list[TrainConfig]:
    """The first ``limit``, taking turns over remat presets: the best of each before the second."""
    groups: dict[str, list[TrainConfig]] = {}
    for candidate in found:
        groups.setdefault(candidate.model.overrides["remat"], []).append(candidate)
    turns = itertools.zip_longest(*groups.values())
    return [c for c in itertools.chain.from_iterable(turns) if c is not None][:limit]


def search_table(plans: list[TrainingPlan]) -> str:
    """One line per plan."""
    lines = ["mesh | rows | remat | total per chip | step at least | us per useful token"]
    for plan in plans:
        mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
        total = gib(plan.total) + ("" if plan.fits else " (does not fit)")
        lines.append(
            f"{mesh} | {plan.batch_size} | {plan.remat} | {total} | "
            f"{plan.time.lower_bound:.3f} s | {1e6 * seconds_per_token(plan):.3f}"
        )
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells
    )
