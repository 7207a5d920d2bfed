"""NAVSIM at full size: the paper's driving policy, DriveVLA-W0's, its flow expert, its world model.

    python -m univla_jax.tokenize_dataset --config=configs/tokens.py:navsim --source=DATA \\
        --vision=EMU3_VISION --out=STORES
    python -m univla_jax.train --config=configs/navsim.py:vava --workdir=DIR \\
        --config.init_from=WORLD_MODEL_DIR --config.tokenizers.action=FAST_DIR \\
        --config.data.stores="('STORES/train',)"
    python -m univla_jax.plan --config=configs/navsim.py:vava --topology=v6e:8x8 \\
        --config.mesh.tensor=4

``univla`` is the experiment of the UniVLA paper (arXiv 2506.19850, section 4.6): the current front
frame at 512 x 288, 2,304 codes; it needs a store of that size, made with
``--config.image_specs.image.size="(288, 512)"``. The paper gives no optimizer for it; steps, batch
and rate are those of DriveVLA-W0's whole backbone. The others are DriveVLA-W0's
(github.com/BraveGroup/DriveVLA-W0 scripts/): two frames at 256 x 144, 576 codes each. Motions are
scaled by the statistics of the training store, at test time too.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from univla_jax.config import complete
from univla_jax.errors import UserError
from univla_jax.training.train_config import TrainConfig

TWO_FRAMES = ("previous_image", "image")

# steps, rate, batch, warm-up, most labeled tokens of a row, tokens of a usual sample, data
RECIPES = {
    "univla": (
        4000,
        8e-5,
        48,
        50,
        80,
        2350,
        {"task": "driving", "views": ("image",), "sequence_length": 2432},
    ),
    "vava": (
        4000,
        8e-5,
        48,
        50,
        1280,
        1240,
        {"task": "driving_vava", "views": TWO_FRAMES, "sequence_length": 1400},
    ),
    "flow": (
        10_000,
        5e-5,
        96,
        50,
        1,
        1220,
        {"task": "driving_flow", "views": TWO_FRAMES, "sequence_length": 1400},
    ),
    "world_model": (
        8000,
        2e-4,
        96,
        400,
        0,
        3660,
        {"task": "driving_world_model", "views": ("image",), "sequence_length": 4000, "frames": 6},
    ),
}


def get_config(recipe: str = "vava") -> ConfigDict:
    """One of the policies (``univla``, ``vava``, ``flow``), or the ``world_model`` before them.

    Raises:
      UserError: no such recipe.
    """
    if recipe not in RECIPES:
        raise UserError(f"config recipe {recipe!r}; name one after a colon: {', '.join(RECIPES)}")
    steps, rate, batch, warmup, labeled, sample, data = RECIPES[recipe]
    values = {
        "total_steps": steps,
        "model": {"preset": "emu3_8b"},
        "tokenizers": {"vocabulary": "emu3"},
        "optimizer": {
            "learning_rate": rate,
            "min_learning_rate": 1e-6,
            "warmup_steps": warmup,
        },
        "data": {
            "stores": ("TOKEN_STORE",),
            "frames": 1,
            "chunk_size": 8,
            "state": recipe != "world_model",
            "batch_size": batch,
            "packing": False,
            "vision_weight": 0.5,
            **data,
        },
        "loss": {"max_labeled": labeled},
        "sample_tokens": sample,
    }
    return complete(TrainConfig, values)
