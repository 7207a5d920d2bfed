"""Writes demonstrations of scripted experts as an RLDS dataset.

    python -m univla_jax.demonstrate --config=configs/quickstart.py:demonstrations --out=FOLDER
    python -m univla_jax.demonstrate --benchmark=libero --assets=LIBERO_ASSETS \\
        --config=configs/libero_scratch.py:demonstrations_goal --out=FOLDER
    python -m univla_jax.demonstrate --benchmark=aloha \\
        --config=configs/aloha_sim.py:demonstrations --out=FOLDER
    python -m univla_jax.demonstrate --benchmark=calvin \\
        --config=configs/calvin_scratch.py:demonstrations --out=FOLDER
    python -m univla_jax.demonstrate --config=configs/road.py:demonstrations --out=FOLDER

The first are of the embedded tabletop, the second of LIBERO, with the fields of its published data,
the third of ALOHA's simulated tasks, the fourth of CALVIN's scene D; the last are drives on the
embedded road, as NAVSIM logs in ``FOLDER`` itself instead of RLDS.
The dataset lies in ``FOLDER/NAME/VERSION`` and appears there when it is complete; started again,
the command leaves it as it is.
"""

from __future__ import annotations

import importlib

from absl import flags

from univla_jax import cli
from univla_jax.config import build_config
from univla_jax.errors import UserError
from univla_jax.inference.policy import Policy
from univla_jax.simulators import DEMONSTRATIONS

CONFIG = cli.config_flag()
OUT = cli.string_flag("out", "folder for the dataset")
BENCHMARK = flags.DEFINE_enum(
    "benchmark", None, list(DEMONSTRATIONS), "whose experts; the config's own, or the tabletop's"
)
ASSETS = cli.string_flag("assets", "the simulator's assets", required=False)


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    values = CONFIG.value.to_dict()
    benchmark = BENCHMARK.value or values.get("benchmark", "tabletop")
    if benchmark not in DEMONSTRATIONS:
        raise UserError(f"config.benchmark: {benchmark!r}, not one of {', '.join(DEMONSTRATIONS)}")
    module = importlib.import_module(DEMONSTRATIONS[benchmark])
    config = build_config(module.DemonstrationsConfig, values)
    # Experts that correct a policy know it from their config.
    options = {"load_policy": Policy.load} if getattr(config, "policy", "") else {}
    folder = module.write_demonstrations(config, OUT.value, assets=ASSETS.value, **options)
    print(f"{config.train_episodes} + {config.val_episodes} demonstrations in {folder}")


if __name__ == "__main__":
    cli.run(main)
