"""A small policy for one LIBERO task from nothing: scripted demonstrations, tokenizers, training.

    C=configs/libero_scratch.py
    python -m univla_jax.demonstrate --benchmark=libero --assets=LIBERO_ASSETS \\
        --config=$C:demonstrations --out=W/demonstrations
    for kind in text action vision; do python -m univla_jax.fit_tokenizer --config=$C:$kind \\
        --source=W/demonstrations --workdir=W/$kind; done
    python -m univla_jax.tokenize_dataset --config=$C:tokens --source=W/demonstrations \\
        --vision=W/vision --out=W/tokens
    python -m univla_jax.train --config=$C:policy --workdir=W/policy \\
        --config.data.stores="('W/tokens/train',)" --config.evaluation.stores="('W/tokens/val',)" \\
        --config.tokenizers.text=W/text --config.tokenizers.vision=W/vision \\
        --config.tokenizers.action=W/action
    python -m univla_jax.evaluate --benchmark=libero --suite=libero_goal --tasks=7 \\
        --episodes_per_task=20 --checkpoint=W/policy --assets=LIBERO_ASSETS --out=W/evaluation

Demonstrations begin from the initial states 20 to 49 of the task, each with the hand moved at
random before; the evaluation above takes the states 0 to 19. Cameras are drawn at 256 x 256 at
every step, as in the published data, which takes most of the time of a demonstration.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from univla_jax.config import complete, of_stage
from univla_jax.data.tokenize import TokenizeConfig
from univla_jax.data.tokenizer_fitting import ActionFitConfig, TextFitConfig
from univla_jax.simulators.libero.libero_demonstrations import DemonstrationsConfig
from univla_jax.training.train_config import TrainConfig
from univla_jax.training.vision_training import VisionFitConfig

SUITE, TASK = "libero_goal", 7  # turn on the stove
ACTION_FRAMES = 10
IMAGE_SPECS = {
    view: {"size": (48, 48), "factor": 8, "min_pixels": 256} for view in ("image", "wrist_image")
}
FRAME_HEADERS = ("1*6*6",)  # one text id, as it stands before every frame

Values = dict[str, Any]


def demonstrations() -> ConfigDict:
    """Scripted episodes from the initial states 20 to 49, which evaluation leaves alone."""
    values = {"suite": SUITE, "tasks": (TASK,), "train_episodes": 60, "val_episodes": 6}
    return complete(DemonstrationsConfig, values)


def text() -> ConfigDict:
    """SentencePiece on the instruction."""
    return complete(TextFitConfig, {"corpus": SUITE, "symbols": FRAME_HEADERS})


def action() -> ConfigDict:
    """FAST on the normalized chunks."""
    values = {"corpus": SUITE, "chunk_size": ACTION_FRAMES, "scale": 10.0, "vocabulary_size": 512}
    return complete(ActionFitConfig, values)


def vision() -> ConfigDict:
    """A small video VQ on the frames of both cameras."""
    values = {"corpus": SUITE, "image_specs": IMAGE_SPECS, "total_steps": 400}
    return complete(VisionFitConfig, values)


def tokens() -> ConfigDict:
    """Both splits into token stores."""
    values = {
        "corpus": SUITE,
        "image_specs": IMAGE_SPECS,
        "splits": {"train": "train", "val": "val"},
        "batch_frames": 128,
    }
    return complete(TokenizeConfig, values)


def policy() -> ConfigDict:
    """Action chunks after one moment of both cameras."""
    data = {
        "stores": ("TOKEN_STORE",),
        "task": "policy_image",
        "views": ("image", "wrist_image"),
        "frames": 1,
        "chunk_size": ACTION_FRAMES,
        "aligned_windows": 0.3,
        "sequence_length": 192,
        "packing": False,
        "batch_size": 16,
        "read_threads": 1,
    }
    values = {
        "total_steps": 2500,
        "model": {"preset": "quickstart", "visual_init": "codebook"},
        "data": data,
        "loss": {"max_labeled": 80},
        "optimizer": {"learning_rate": 2.5e-3, "min_learning_rate": 1.5e-4, "clip_norm": 1.0},
        "checkpoint": {"every": 500},
        "evaluation": {"every": 500, "batches": 4, "stores": ("TOKEN_STORE",)},
        "log_every": 20,
    }
    return complete(TrainConfig, values)


STAGES = (demonstrations, text, action, vision, tokens, policy)


def get_config(stage: str = "") -> ConfigDict:
    """The config of one stage.

    Args:
      stage: name of a function above.

    Raises:
      UserError: no such stage.
    """
    return of_stage(STAGES, stage)
