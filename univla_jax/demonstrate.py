"""Writes demonstrations of the embedded tabletop's scripted expert as an RLDS dataset.

    python -m univla_jax.demonstrate --config=configs/quickstart.py:demonstrations --out=FOLDER

The dataset lies in ``FOLDER/tabletop/VERSION`` and appears there when it is complete; started
again, the command leaves it as it is.
"""

from __future__ import annotations

from univla_jax import commands
from univla_jax import config as strict
from univla_jax.data.demonstrations import DemonstrationsConfig, write_demonstrations

CONFIG = commands.config_flag()
OUT = commands.string_flag("out", "folder for the dataset")


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    config = strict.build(DemonstrationsConfig, CONFIG.value.to_dict())
    folder = write_demonstrations(config, OUT.value)
    print(f"{config.train_episodes} + {config.val_episodes} demonstrations in {folder}")


if __name__ == "__main__":
    commands.run(main)
