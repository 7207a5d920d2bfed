"""The quickstart in the world "free": nothing lies in a grid, and the expert errs and recovers.

    CONFIG=configs/quickstart_free.py bash launch/quickstart.sh W

Blocks and zones lie anywhere without overlap, among blocks that no instruction names; the expert
of the demonstrations shakes, is bumped, begins above wrong spots, and recovers; and some pairs of
family and color are never demonstrated, whose success ``evaluate`` prints by itself. The pictures
are larger than the quickstart's, because where things lie is no longer one of a few choices. What
is not named here is as in ``quickstart.py``.
"""

from __future__ import annotations

import runpy
from typing import Any

from ml_collections import ConfigDict

_QUICKSTART = runpy.run_path(__file__.replace("quickstart_free.py", "quickstart.py"))
_SPECS: dict[str, Any] = {
    "image_specs.image.size": (48, 48),
    "image_specs.wrist_image.size": (24, 24),
}
_FRAME_HEADERS = ("1*6*6", "1*3*3")
_CHANGES: dict[str, dict[str, Any]] = {
    "demonstrations": {"world": "free"},
    "text": {"symbols": _FRAME_HEADERS},
    "vision": _SPECS,
    "tokens": _SPECS,
    "world_model": {"data.sequence_length": 208},
    "attempts": {"world": "free"},
    "attempts_held_out": {"world": "free"},
    "joint": {"data.sequence_length": 352},
    "unified": {"data.sequence_length": 352},
    "policy": {"data.sequence_length": 176},
    "realtime": {"data.sequence_length": 200},
    "evaluate": {"world": "free", "episodes": 300},
    "counterfactuals": {"world": "free"},
    "improve": {"attempts.world": "free", "train.data.sequence_length": 352},
}


def get_config(stage: str = "") -> ConfigDict:
    """The quickstart's config of ``stage`` with what this world changes.

    Raises:
      UserError: no such stage.
    """
    config = _QUICKSTART["get_config"](stage)
    config.update_from_flattened_dict(_CHANGES.get(stage, {}))
    return config
