"""LIBERO at full size: video, image and flow policy on all four suites together.

    python -m univla_jax.train --config=configs/libero.py:video --workdir=DIR \\
        --config.init_from=WORLD_MODEL_DIR --config.tokenizers.action=FAST_DIR \\
        --config.data.stores="('SPATIAL', 'OBJECT', 'GOAL', 'LONG')"
    python -m univla_jax.plan --config=configs/libero.py:video --topology=v5p:4x4x4

Hyper-parameters of the reference (UniVLA scripts/simulator/libero/train_libero_video.sh): global
batch 192, 8,000 steps, both views at 200 x 200 (625 codes a frame), universal FAST.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from univla_jax.config import complete
from univla_jax.errors import UserError
from univla_jax.training.train_config import TrainConfig

# task, frames, sequence length, most labeled tokens of a row, tokens of a usual sample
RECIPES = {
    "video": ("policy_video", 2, 3200, 160, 2630),
    "image": ("policy_image", 1, 1600, 80, 1330),
    "flow": ("policy_flow", 1, 1600, 1, 1280),
}


def get_config(recipe: str = "video") -> ConfigDict:
    """The policy that sees two moments (``video``) or one (``image``, ``flow``).

    ``flow`` trains the action expert: continuous chunks instead of tokens.

    Raises:
      UserError: no such recipe.
    """
    if recipe not in RECIPES:
        raise UserError(f"config recipe {recipe!r}; name one after a colon: {', '.join(RECIPES)}")
    task, frames, length, labeled, sample = RECIPES[recipe]
    values = {
        "total_steps": 8000,
        "model": {"preset": "emu3_8b"},
        "tokenizers": {"vocabulary": "emu3"},
        "data": {
            "stores": ("TOKEN_STORE",),
            "task": task,
            "frames": frames,
            "chunk_size": 10,
            "sequence_length": length,
            "batch_size": 192,
            "packing": recipe != "flow",
        },
        "loss": {"max_labeled": labeled},
        "sample_tokens": sample,
    }
    return complete(TrainConfig, values)
