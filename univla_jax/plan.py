"""Plans a run on a TPU slice: compiles it with the TPU compiler, without a TPU.

    python -m univla_jax.plan --config=configs/libero.py:video --topology=v5p:4x4x4
    python -m univla_jax.plan --config=configs/libero.py:video --topology=v6e:16x16 \\
        --config.mesh.tensor=4 --json
    python -m univla_jax.plan --config=configs/libero.py:video --topology=v6e:8x8 --search
    python -m univla_jax.plan --config=configs/libero.py:video --topology=v6e:2x2 --decode

Prints per chip what parameters, optimizer and activations take of the memory a program may use,
the operations and tokens of a step, and the time it takes at least. ``--full_logits`` compiles the
step a second time, with the textbook loss. Needs ``pip install 'univla_jax[plan]'``. Exit status: 0
it fits, 1 it does not, 2 an error with its remedy.
"""

from __future__ import annotations

import json

import jax
from absl import flags, logging

from univla_jax import cli
from univla_jax.config import build_config
from univla_jax.planning.decode_plan import plan_decoding
from univla_jax.planning.plan_search import search_plans, search_table
from univla_jax.planning.topologies import find_topology
from univla_jax.planning.training_plan import plan_training
from univla_jax.training.train_config import TrainConfig

CONFIG = cli.config_flag()
TOPOLOGY = cli.string_flag("topology", "slice to plan for, such as v5p:4x4x4")
JSON = flags.DEFINE_bool("json", False, "Print JSON instead of text")
FULL_LOGITS = flags.DEFINE_bool("full_logits", False, "Compare with the loss that holds all logits")
DECODE = flags.DEFINE_bool("decode", False, "Plan prefill and decoding of the trained policy")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "With --decode: robots served at the same time")
SEARCH = flags.DEFINE_bool("search", False, "Try meshes, batch sizes and remat presets")
LIMIT = flags.DEFINE_integer("limit", 6, "With --search: how many candidates to compile")


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    del argv
    logging.set_verbosity(logging.ERROR)
    jax.config.update("jax_platforms", "cpu")  # programs are compiled for TPUs, none is run
    config = build_config(TrainConfig, CONFIG.value.to_dict())
    topology = find_topology(TOPOLOGY.value)
    if SEARCH.value:
        plans = search_plans(config, topology, limit=LIMIT.value)
        values, text = [plan.to_dict() for plan in plans], search_table(plans)
        fits = any(plan.fits for plan in plans)
    else:
        if DECODE.value:
            plan = plan_decoding(config, topology, batch_size=BATCH_SIZE.value)
        else:
            plan = plan_training(config, topology, full_logits=FULL_LOGITS.value)
        values, text, fits = plan.to_dict(), plan.describe(), plan.fits
    print(json.dumps(values) if JSON.value else text)
    return 0 if fits else 1


if __name__ == "__main__":
    cli.run(main)
