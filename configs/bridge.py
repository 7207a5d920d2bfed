"""SimplerEnv Bridge (WidowX) at full size: the video policy.

    python -m univla_jax.train --config=configs/bridge.py --workdir=DIR \\
        --config.init_from=WORLD_MODEL_DIR --config.tokenizers.action=FAST_DIR \\
        --config.data.stores="('TOKEN_STORE',)"

Hyper-parameters of the reference (UniVLA scripts/simulator/simplerenv): global batch 128, 20,000
steps, one view at 256 x 256 (1,024 codes), chunks of five actions at 5 Hz, FAST of scale 50.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from univla_jax.config import complete
from univla_jax.training.train_config import TrainConfig


def get_config() -> ConfigDict:
    """Two chunks of five actions, each after a frame."""
    values = {
        "total_steps": 20_000,
        "model": {"preset": "emu3_8b"},
        "tokenizers": {"vocabulary": "emu3"},
        "data": {
            "stores": ("TOKEN_STORE",),
            "task": "policy_video",
            "frames": 2,
            "chunk_size": 5,
            "sequence_length": 2400,
            "batch_size": 128,
        },
        "loss": {"max_labeled": 96},
        "optimizer": {"warmup_steps": 500, "clip_norm": 2.0},
        "sample_tokens": 2150,
    }
    return complete(TrainConfig, values)
