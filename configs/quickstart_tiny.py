"""Every stage of the quickstart in a minute or two: it shows that all works, and learns nothing.

CONFIG=configs/quickstart_tiny.py bash launch/quickstart.sh WORKDIR
"""

from __future__ import annotations

import runpy
from typing import Any

from ml_collections import ConfigDict

_FULL = runpy.run_path(__file__.replace("quickstart_tiny.py", "quickstart.py"))
_SMALLER: dict[str, dict[str, Any]] = {
    "demonstrations": {"train_episodes": 12, "val_episodes": 4},
    "vision": {"total_steps": 6, "batch_size": 2, "evaluation_frames": 16},
    "world_model": {"total_steps": 4, "data.batch_size": 2, "evaluation.every": 2},
    "attempts": {"episodes": 10, "max_steps": 12},
    "attempts_held_out": {"episodes": 5, "max_steps": 12},
    "joint": {"total_steps": 4, "data.batch_size": 2, "evaluation.every": 2},
    "unified": {"total_steps": 4, "data.batch_size": 2, "evaluation.every": 2},
    "policy": {"total_steps": 4, "data.batch_size": 2, "evaluation.every": 2},
    "realtime": {"total_steps": 4, "data.batch_size": 2, "evaluation.every": 2},
    "evaluate": {"episodes": 5, "batch": 5, "max_steps": 10},
    "imagine": {"episodes": 2, "batch": 2},
    "improve": {
        "attempts.episodes": 5,
        "attempts.batch": 5,
        "attempts.max_steps": 12,
        "train.total_steps": 4,
        "train.data.batch_size": 2,
        "train.evaluation.every": 2,
        "train.model.preset": "tiny",
    },
    "obey": {"episodes": 2, "batch": 2},
    "counterfactuals": {"counterfactuals": 2, "batch": 2},
}


def get_config(stage: str = "") -> ConfigDict:
    """The quickstart's config of ``stage`` with fewer of everything.

    Raises:
      UserError: no such stage.
    """
    config = _FULL["get_config"](stage)
    config.update_from_flattened_dict(_SMALLER.get(stage, {}))
    if stage in ("world_model", "joint", "unified", "policy", "realtime"):
        config.checkpoint.every = 2
        config.log_every = 1
        config.model.preset = "tiny"
    return config
