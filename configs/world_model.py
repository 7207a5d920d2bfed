"""World-model post-training at full size: six frames of robot video, about a second apart.

    python -m univla_jax.train --config=configs/world_model.py --workdir=DIR \\
        --config.init_from=EMU3_STAGE1_DIR --config.data.stores="('BRIDGE', 'DROID', ...)" \\
        --config.data.weights="(1.0, 0.2, ...)"

Hyper-parameters of the reference (UniVLA scripts/pretrain/train_video_1node.sh, arXiv 2506.19850):
global batch 64, 30,000 steps, 6,400 tokens, the loss on every visual token.

Six frames take 3,530 to 6,220 tokens, so no two samples fit into 6,400 and 91 % of a row is useful
at best. ``--config.data.sequence_length=12800 --config.data.batch_size=32`` packs the same tokens
to 96 %, at about 10 % more arithmetic for attention where the kernel does not skip other segments.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from univla_jax.config import complete
from univla_jax.training.train_config import TrainConfig


def get_config() -> ConfigDict:
    """The next frames of one camera, from the first and the instruction."""
    values = {
        "total_steps": 30_000,
        "model": {"preset": "emu3_8b"},
        "tokenizers": {"vocabulary": "emu3"},
        "data": {
            "stores": ("TOKEN_STORE",),
            "task": "world_model",
            "frames": 6,
            "sequence_length": 6400,
            "batch_size": 64,
            "vision_weight": 1.0,
        },
        "sample_tokens": 6240,
    }
    return complete(TrainConfig, values)
