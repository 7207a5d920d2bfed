"""The tabletop under changed cameras, starts, words, light, backgrounds, noise and layouts.

    C=configs/quickstart_robust.py
    python -m univla_jax.demonstrate --config=$C:demonstrations --out=W/demonstrations
    for kind in text action vision; do
      python -m univla_jax.fit_tokenizer --config=$C:$kind --source=W/demonstrations \\
          --workdir=W/tokenizers/$kind
    done
    python -m univla_jax.tokenize_dataset --config=$C:tokens --source=W/demonstrations \\
        --vision=W/tokenizers/vision --out=W/tokens
    python -m univla_jax.train --config=$C:policy --workdir=W/policy \\
        --config.data.stores="('W/tokens/train',)" --config.evaluation.stores="('W/tokens/val',)" \\
        --config.tokenizers.text=W/tokenizers/text --config.tokenizers.action=W/tokenizers/action \\
        --config.tokenizers.vision=W/tokenizers/vision
    python -m univla_jax.evaluate --config=$C:evaluate --checkpoint=W/policy --out=W/evaluation

Each of these is changed in a fifth of the demonstrations, several at once
(``tabletop_randomization.py``), in other ways than the evaluation changes them, one at a time. The
policy looks at the present frames alone. What is not named here is as in ``quickstart.py``.
"""

from __future__ import annotations

import runpy
from typing import Any

from ml_collections import ConfigDict

_QUICKSTART = runpy.run_path(__file__.replace("quickstart_robust.py", "quickstart.py"))
_CHANGES: dict[str, dict[str, Any]] = {
    # Each of the seven things is changed in a fifth of the episodes, and none in a fifth of them.
    "demonstrations": {"train_episodes": 8000, "randomized": 0.2},
    # What is seen is of more kinds: more codes, learned for longer.
    "vision": {"overrides": ConfigDict({"codebook_size": 1024}), "total_steps": 1800},
    "policy": {
        "total_steps": 16000,
        "data.frames": 1,
        "data.sequence_length": 80,
        "loss.max_labeled": 32,
    },
    "evaluate": {
        "benchmark": "tabletop_plus",
        "episodes": 0,
        "episodes_per_task": 100,
        "conditions": ("policy",),
    },
}


def get_config(stage: str = "") -> ConfigDict:
    """The quickstart's config of ``stage`` with what the changed scenes need.

    Raises:
      UserError: no such stage.
    """
    config = _QUICKSTART["get_config"](stage)
    config.update_from_flattened_dict(_CHANGES.get(stage, {}))
    return config
