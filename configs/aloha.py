"""A real ALOHA at full size: the image policy of two arms and three cameras.

    python -m univla_jax.train --config=configs/aloha.py --workdir=DIR \\
        --config.init_from=WORLD_MODEL_DIR --config.tokenizers.action=FAST_DIR \\
        --config.data.stores="('TOKEN_STORE',)"

Hyper-parameters of the reference (UniVLA scripts for real robots): global batch 64, 8,000 steps,
three views at 128 x 128 (256 codes), chunks of twenty actions of 14 dimensions, a FAST of its own.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from univla_jax.config import complete
from univla_jax.training.train_config import TrainConfig


def get_config() -> ConfigDict:
    """One chunk of twenty actions after the frames of all cameras."""
    values = {
        "total_steps": 8000,
        "model": {"preset": "emu3_8b"},
        "tokenizers": {"vocabulary": "emu3"},
        "data": {
            "stores": ("TOKEN_STORE",),
            "task": "policy_image",
            "frames": 1,
            "chunk_size": 20,
            "sequence_length": 1100,
            "batch_size": 64,
        },
        "loss": {"max_labeled": 288},
        "optimizer": {
            "learning_rate": 5e-5,
            "min_learning_rate": 5e-6,
            "warmup_steps": 100,
            "clip_norm": 5.0,
        },
        "sample_tokens": 950,
    }
    return complete(TrainConfig, values)
