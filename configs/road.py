"""The whole way on the embedded road: demonstrations, tokenizers, world model, policy, score.

    bash launch/quickstart.sh --config=configs/road.py road          # all stages, in order
    python -m univla_jax.evaluate --config=configs/road.py:evaluate --checkpoint=road/policy \\
        --assets=road/demonstrations --out=DIR

The demonstrations are NAVSIM logs (``data/navsim.py``), so every stage works on real ones as well;
PDM-Closed drives. The policy is DriveVLA-W0's form at a small size: two frames of 96 x 48 a second
apart, past motions, and eight motions to come.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from univla_jax.config import complete, of_stage
from univla_jax.data.tokenize import TokenizeConfig
from univla_jax.data.tokenizer_fitting import ActionFitConfig, TextFitConfig
from univla_jax.evaluation.closed_loop import EvaluateConfig
from univla_jax.evaluation.steered_imagination import SteeringConfig
from univla_jax.simulators.road.road_expert import DemonstrationsConfig
from univla_jax.training.train_config import TrainConfig
from univla_jax.training.vision_training import VisionFitConfig

CORPUS = "road"
IMAGE_SPEC = {"size": (48, 96), "factor": 8, "min_pixels": 4608}
IMAGE_SPECS = {view: IMAGE_SPEC for view in ("image", "previous_image")}

Values = dict[str, Any]


def demonstrations() -> ConfigDict:
    """PDM-Closed's drives; evaluation draws its own scenes, from other seeds."""
    return complete(DemonstrationsConfig, {"train_episodes": 600, "val_episodes": 40})


def text() -> ConfigDict:
    """SentencePiece on the commands, whose words are one id each, as the frame header is."""
    symbols = ("1*6*12", "left", "right", "straight", "unknown")
    return complete(TextFitConfig, {"corpus": CORPUS, "symbols": symbols})


def action() -> ConfigDict:
    """FAST on the normalized motions."""
    return complete(
        ActionFitConfig,
        {"corpus": CORPUS, "chunk_size": 8, "scale": 10.0, "vocabulary_size": 512},
    )


def vision() -> ConfigDict:
    """A small video VQ on the front camera."""
    values = {"corpus": CORPUS, "image_specs": {"image": IMAGE_SPEC}, "total_steps": 900}
    return complete(VisionFitConfig, values)


def tokens() -> ConfigDict:
    """Both splits into token stores."""
    values = {
        "corpus": CORPUS,
        "image_specs": IMAGE_SPECS,
        "splits": {"train": "train", "val": "val"},
        "batch_frames": 128,
    }
    return complete(TokenizeConfig, values)


def world_model() -> ConfigDict:
    """The next frame, from those before it and the motions that lead there."""
    data = {
        "task": "driving_world_model",
        "views": ("image",),
        "frames": 2,
        "sequence_length": 224,
        "batch_size": 16,
        "vision_weight": 1.0,
    }
    return complete(TrainConfig, training(700, data))


def policy() -> ConfigDict:
    """Eight motions from two frames, commands and past motions."""
    data = {
        "task": "driving_vava",
        "views": ("previous_image", "image"),
        "frames": 1,
        "state": True,
        "sequence_length": 256,
        "batch_size": 16,
        "loss_on": "action",
    }
    return complete(TrainConfig, training(2200, data) | {"loss": {"max_labeled": 64}})


def training(steps: int, data: Values) -> Values:
    """What both training stages have in common."""
    return {
        "total_steps": steps,
        "model": {"preset": "quickstart", "visual_init": "codebook"},
        "data": {
            "stores": ("TOKEN_STORE",),
            "read_threads": 1,
            "packing": False,
            "chunk_size": 8,
            **data,
        },
        "optimizer": {
            "learning_rate": 2.5e-3,
            "min_learning_rate": 1.5e-4,
            "clip_norm": 1.0,
        },
        "checkpoint": {"every": 500},
        "evaluation": {"every": 500, "batches": 4, "stores": ("TOKEN_STORE",)},
        "log_every": 20,
    }


def evaluate() -> ConfigDict:
    """Closed loop on held-out scenes, beside what the score is to be compared with."""
    conditions = (
        "policy",
        "wrong_command",
        "black_image",
        "ego_only",
        "constant_velocity",
        "expert",
    )
    values = {"benchmark": "road", "episodes": 200, "batch": 50, "conditions": conditions}
    return complete(EvaluateConfig, values)


def imagine() -> ConfigDict:
    """Frames a second ahead under the true and under a changed steering."""
    return complete(SteeringConfig, {"scenes": 100})


STAGES = (demonstrations, text, action, vision, tokens, world_model, policy, evaluate, imagine)


def get_config(stage: str = "") -> ConfigDict:
    """The config of one stage.

    Args:
      stage: name of a function above.

    Raises:
      UserError: no such stage.
    """
    return of_stage(STAGES, stage)
