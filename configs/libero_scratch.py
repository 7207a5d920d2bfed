"""A small policy for one LIBERO task, from nothing: scripted demonstrations to score.

    python -m univla_jax.demonstrate --benchmark=libero --assets=LIBERO_ASSETS \\
        --config=configs/libero_scratch.py:demonstrations --out=W/demonstrations
"""

from __future__ import annotations

from ml_collections import ConfigDict

from univla_jax.config import complete
from univla_jax.errors import UserError
from univla_jax.evaluation.libero_demonstrations import LiberoDemonstrationsConfig

SUITE, TASK = "libero_goal", 7  # turn on the stove


def demonstrations() -> ConfigDict:
    """Scripted episodes from the initial states 20 to 49, which evaluation leaves alone."""
    values = {"suite": SUITE, "tasks": (TASK,), "train_episodes": 60, "val_episodes": 6}
    return complete(LiberoDemonstrationsConfig, values)


STAGES = (demonstrations,)


def get_config(stage: str = "") -> ConfigDict:
    """The config of one stage.

    Args:
      stage: name of a function above.

    Raises:
      UserError: no such stage.
    """
    recipes = {function.__name__: function for function in STAGES}
    if stage not in recipes:
        raise UserError(f"config stage {stage!r}; name one after a colon: {', '.join(recipes)}")
    return recipes[stage]()
