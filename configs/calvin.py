"""CALVIN ABCD to D at full size: the video policy.

    python -m univla_jax.train --config=configs/calvin.py --workdir=DIR \\
        --config.init_from=WORLD_MODEL_DIR --config.tokenizers.action=FAST_DIR \\
        --config.data.stores="('TOKEN_STORE',)"

Hyper-parameters of the reference (UniVLA scripts/simulator/calvin): global batch 192, 8,000 steps,
static camera at 200 x 200 and gripper camera at 80 x 80 (625 and 100 codes), FAST of scale 50.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from univla_jax.config import complete
from univla_jax.training.train_config import TrainConfig


def get_config() -> ConfigDict:
    """Two chunks of ten actions, each after the frames of both cameras."""
    values = {
        "total_steps": 8000,
        "model": {"preset": "emu3_8b"},
        "tokenizers": {"vocabulary": "emu3"},
        "data": {
            "stores": ("TOKEN_STORE",),
            "task": "policy_video",
            "frames": 2,
            "chunk_size": 10,
            "sequence_length": 1700,
            "batch_size": 192,
        },
        "loss": {"max_labeled": 160},
        "sample_tokens": 1580,
    }
    return complete(TrainConfig, values)
