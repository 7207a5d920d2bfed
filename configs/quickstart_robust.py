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

Each demonstration has about a third of these changed at once (``tabletop_randomization.py``), in
other ways than the evaluation changes them, one at a time. A code stands for 4 x 4 pixels instead
of 8 x 8, because what is seen in so small a part is less often a combination that was never shown.
The policy looks at the present frames alone. What is not named here is as in ``quickstart.py``.
"""

from __future__ import annotations

import runpy
from typing import Any

from ml_collections import ConfigDict

from univla_jax.config import complete, of_stage
from univla_jax.training.train_config import TrainConfig

_QUICKSTART = runpy.run_path(__file__.replace("quickstart_robust.py", "quickstart.py"))
_IMAGE_SPECS = {
    "image": {"size": (32, 32), "factor": 4, "min_pixels": 256},
    "wrist_image": {"size": (16, 16), "factor": 4, "min_pixels": 256},
}
_FRAME_HEADERS = ("1*8*8", "1*4*4")


def _changed(stage: str, values: dict[str, Any]) -> ConfigDict:
    """The quickstart's config of a stage with other values."""
    config = _QUICKSTART[stage]()
    for name, value in values.items():
        config[name] = value
    return config


def demonstrations() -> ConfigDict:
    """Scripted episodes, each of the seven things changed in a third of them."""
    return _changed("demonstrations", {"train_episodes": 8000, "randomized": 0.35})


def text() -> ConfigDict:
    """SentencePiece on the instructions."""
    return _changed("text", {"symbols": _FRAME_HEADERS})


def action() -> ConfigDict:
    """FAST on the normalized chunks."""
    return _changed("action", {})


def vision() -> ConfigDict:
    """A video VQ with smaller patches and more codes than the quickstart's."""
    values = {
        "image_specs": _IMAGE_SPECS,
        "overrides": {"ch_mult": (1, 2, 4), "codebook_size": 512},
        "total_steps": 2000,
    }
    return _changed("vision", values)


def tokens() -> ConfigDict:
    """Both splits into token stores."""
    return _changed("tokens", {"image_specs": _IMAGE_SPECS})


def policy() -> ConfigDict:
    """Action chunks after the present frames of both cameras."""
    data = {
        **_QUICKSTART["ACTING"],
        "frames": 1,
        "sequence_length": 128,
        "packing": False,
        "batch_size": 16,
    }
    values = _QUICKSTART["training"](10_000, data)
    return complete(TrainConfig, values | {"loss": {"max_labeled": 32}})


def evaluate() -> ConfigDict:
    """One thing changed at a time on a hundred held-out scenes each."""
    values = {"benchmark": "tabletop_plus", "episodes": 0, "episodes_per_task": 100}
    return _changed("evaluate", {**values, "conditions": ("policy",)})


STAGES = (demonstrations, text, action, vision, tokens, policy, evaluate)


def get_config(stage: str = "") -> ConfigDict:
    """The config of one stage.

    Args:
      stage: name of a function above.

    Raises:
      UserError: no such stage.
    """
    return of_stage(STAGES, stage)
