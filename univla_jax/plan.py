"""Plans a run: compiled for a TPU slice with the TPU compiler, without a TPU, or by count.

    python -m univla_jax.plan --config=configs/libero.py:video --topology=v5p:4x4x4
    python -m univla_jax.plan --config=configs/libero.py:video --topology=v6e:16x16 \\
        --config.mesh.tensor=4 --json
    python -m univla_jax.plan --config=configs/libero.py:video --topology=v6e:8x8 --search
    python -m univla_jax.plan --config=configs/libero.py:video --topology=v6e:2x2 --decode \\
        --block=1 --block=16
    python -m univla_jax.plan --config=configs/libero.py:video --device=h100 --search

Prints per chip what parameters, optimizer and activations take of the memory a program may use,
the operations and tokens of a step, and the time it takes at least; then what the chips exchange:
bytes of each kind of collective, how much of them travels behind arithmetic, arrays that are laid
out anew though nothing asked for it, and the time of a step that the compiler's own estimates add
up to. Mesh and XLA options are those that training would choose for the chip. ``--decode`` plans
prefill and the decode loop, and times a call of the decoder for each ``--block``; ``--int8`` plans
them with the weights as ``serve --int8`` keeps them. ``--full_logits`` compiles the step a second
time, with the textbook loss. Needs ``pip install 'univla_jax[plan]'``.

``--device`` counts the same memory from the shapes of the arrays, without a compiler, for one GPU
or chip. ``--search`` then tries smaller moments, bfloat16 parameters, LoRA and QLoRA, each with as
few micro-batches as fit; with ``--topology`` it does so where the recipe itself cannot fit.
Exit status: 0 it fits, 1 it does not, 2 an error with its remedy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags, logging

from univla_jax import cli
from univla_jax.config import build_config
from univla_jax.errors import UserError
from univla_jax.planning.decode_plan import plan_decoding
from univla_jax.planning.device_plan import find_card, plan_device, search_device
from univla_jax.planning.device_plan import search_table as device_table
from univla_jax.planning.plan_search import search_plans, search_table
from univla_jax.planning.topologies import find_topology
from univla_jax.planning.training_plan import plan_training
from univla_jax.training.hardware import CARDS
from univla_jax.training.train_config import TrainConfig

CONFIG = cli.config_flag()
TOPOLOGY = cli.string_flag("topology", "slice to plan for, such as v5p:4x4x4", required=False)
DEVICE = cli.string_flag(
    "device", f"one accelerator to plan for by count: {', '.join(CARDS)}", required=False
)
JSON = flags.DEFINE_bool("json", False, "Print JSON instead of text")
FULL_LOGITS = flags.DEFINE_bool("full_logits", False, "Compare with the loss that holds all logits")
DECODE = flags.DEFINE_bool("decode", False, "Plan prefill and decoding of the trained policy")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "With --decode: robots served at the same time")
BLOCK = flags.DEFINE_multi_integer(
    "block", [1], "With --decode: tokens of a call, drafts included; may be repeated"
)
INT8 = flags.DEFINE_bool("int8", False, "With --decode: weights in eight bits")
SEARCH = flags.DEFINE_bool("search", False, "Try meshes, batch sizes and remat presets")
LIMIT = flags.DEFINE_integer("limit", 6, "With --search: how many candidates to compile")


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    del argv
    logging.set_verbosity(logging.ERROR)
    jax.config.update("jax_platforms", "cpu")  # programs are compiled for TPUs, none is run
    config = build_config(TrainConfig, CONFIG.value.to_dict())
    if (TOPOLOGY.value is None) == (DEVICE.value is None):
        raise UserError("give --topology=v5p:4x4x4 or --device=h100, one of them")
    plans, table = _plan_device(config) if DEVICE.value is not None else _plan_slice(config)
    values = [plan.to_dict() for plan in plans]
    if JSON.value:
        print(json.dumps(values if SEARCH.value else values[0]))
    else:
        print(table(plans) if SEARCH.value else plans[0].describe())
    return 0 if any(plan.fits for plan in plans) else 1


def _plan_slice(config: TrainConfig) -> tuple[Sequence[Any], Callable[[Any], str]]:
    """The compiled plans, one without ``--search``, and what makes a table of several."""
    topology = find_topology(TOPOLOGY.value)
    if SEARCH.value:
        return search_plans(config, topology, limit=LIMIT.value), search_table
    if DECODE.value:
        plan = plan_decoding(
            config,
            topology,
            batch_size=BATCH_SIZE.value,
            blocks=BLOCK.value,
            int8=INT8.value,
        )
        return [plan], search_table
    return [plan_training(config, topology, full_logits=FULL_LOGITS.value)], search_table


def _plan_device(config: TrainConfig) -> tuple[Sequence[Any], Callable[[Any], str]]:
    """The counted plans, one without ``--search``, and what makes a table of several."""
    if DECODE.value or FULL_LOGITS.value:
        raise UserError("--device counts a train step; --decode and --full_logits need --topology")
    chip = find_card(DEVICE.value)
    return search_device(config, chip) if SEARCH.value else [
        plan_device(config, chip)
    ], device_table


if __name__ == "__main__":
    cli.run(main)
