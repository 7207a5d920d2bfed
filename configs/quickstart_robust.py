"""The tabletop under changed cameras, starts, words, light, backgrounds, noise and layouts.

    C=configs/quickstart_robust.py
    for kind in demonstrations demonstrations_plain; do
      python -m univla_jax.demonstrate --config=$C:$kind --out=W/$kind
    done
    for kind in text action vision; do
      python -m univla_jax.fit_tokenizer --config=$C:$kind --source=W/demonstrations \\
          --workdir=W/tokenizers/$kind
    done
    for kind in demonstrations demonstrations_plain; do
      python -m univla_jax.tokenize_dataset --config=$C:tokens --source=W/$kind/tabletop \\
          --vision=W/tokenizers/vision --out=W/tokens/$kind
    done
    T=W/tokens/demonstrations P=W/tokens/demonstrations_plain
    python -m univla_jax.train --config=$C:policy_plain --workdir=W/policy0 \\
        --config.data.stores="('$P/train',)" --config.evaluation.stores="('$P/val',)" \\
        --config.tokenizers.text=W/tokenizers/text --config.tokenizers.action=W/tokenizers/action \\
        --config.tokenizers.vision=W/tokenizers/vision
    for part in 1 2 3; do
      python -m univla_jax.train --config=$C:policy --workdir=W/policy$part \\
          --config.init_from=W/policy$((part - 1)) --config.tokenizers.statistics=init_from \\
          --config.data.stores="('$T/train','$P/train')" --config.evaluation.stores="('$T/val',)"
    done
    python -m univla_jax.evaluate --config=$C:evaluate --checkpoint=W/policy3 --out=W/evaluation

Each of these is changed in a fourth of the demonstrations, several at once
(``tabletop_randomization.py``), in other ways than the evaluation changes them, one at a time;
plain demonstrations are learned from before and beside them. The policy looks at the present frames
alone, and is told where its gripper is. What is not named here is as in ``quickstart.py``.
"""

from __future__ import annotations

import runpy
from typing import Any

from ml_collections import ConfigDict

_QUICKSTART = runpy.run_path(__file__.replace("quickstart_robust.py", "quickstart.py"))
# One code for 4 x 4 pixels tells where things are on any table; one for 8 x 8 cannot.
_FINE = {"factor": 4, "min_pixels": 256}
IMAGE_SPECS = {
    "image": {"size": (32, 32), **_FINE},
    "wrist_image": {"size": (16, 16), **_FINE},
}
FRAME_HEADERS = ("1*8*8", "1*4*4")  # one text id each, as they stand before every frame
STATE_STEPS = 100  # equal steps as which the state is written: to 2 % of its half range
# The gripper begins anywhere: else, where it is tells where it is going, and nothing need be seen.
_ANYWHERE = 0.7
_POLICY: dict[str, Any] = {
    "data.frames": 1,
    "data.state": True,
    "data.state_steps": STATE_STEPS,
    "data.sequence_length": 136,
    "loss.max_labeled": 32,
}
_CHANGES: dict[str, dict[str, Any]] = {
    # Each of the seven things is changed in a fourth of the episodes, and none in a seventh.
    "demonstrations": {"train_episodes": 7000, "randomized": 0.25, "anywhere": _ANYWHERE},
    "demonstrations_plain": {
        "train_episodes": 3000,
        "first_seed": 20000,
        "anywhere": _ANYWHERE,
    },
    "text": {"symbols": FRAME_HEADERS},
    "action": {"state_steps": STATE_STEPS, "drop_trailing_zeros": True},
    "vision": {"image_specs": IMAGE_SPECS, "overrides": ConfigDict({"ch_mult": (1, 4, 8)})},
    "tokens": {"image_specs": IMAGE_SPECS},
    "policy_plain": {"total_steps": 3500, **_POLICY},
    "policy": {"total_steps": 10000, "data.aligned_windows": 1.0, **_POLICY},
    "evaluate": {
        "benchmark": "tabletop_plus",
        "episodes": 0,
        "episodes_per_task": 100,
        "conditions": ("policy",),
    },
}
_LIKE = {"demonstrations_plain": "demonstrations", "policy_plain": "policy"}  # in the quickstart


def get_config(stage: str = "") -> ConfigDict:
    """The quickstart's config of ``stage`` with what the changed scenes need.

    Raises:
      UserError: no such stage.
    """
    config = _QUICKSTART["get_config"](_LIKE.get(stage, stage))
    config.update_from_flattened_dict(_CHANGES.get(stage, {}))
    return config
