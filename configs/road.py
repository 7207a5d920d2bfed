"""The whole way on the embedded road: demonstrations, tokenizers, world model, policy, score.

    bash launch/quickstart.sh --config=configs/road.py road          # all stages, in order
    python -m univla_jax.evaluate --config=configs/road.py:evaluate --checkpoint=road/policy \\
        --assets=road/demonstrations --out=DIR

The demonstrations are NAVSIM logs (``data/navsim.py``), so every stage works on real ones as well;
PDM-Closed drives. The policy is the UniVLA paper's form at a small size: one frame of 96 x 48, the
ego status, and eight motions to come. It is half as long as DriveVLA-W0's, so that twice as many
moments are learned in the same time, and it holds no past motions that could simply be continued.
The world model also learns from logs whose steering was changed again and again: an expert's alone
do not show what another steering does.
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
IMAGE_SPECS = {"image": IMAGE_SPEC}

Values = dict[str, Any]


def demonstrations() -> ConfigDict:
    """PDM-Closed's drives; evaluation draws its own scenes, from other seeds."""
    values = {"train_episodes": 360, "val_episodes": 24, "swerving_episodes": 80, "pushed": 0.8}
    return complete(DemonstrationsConfig, values)


def text() -> ConfigDict:
    """SentencePiece on the commands, whose words are one id each, as the frame header is."""
    symbols = ("1*6*12", "left", "right", "straight", "unknown")
    return complete(TextFitConfig, {"corpus": CORPUS, "symbols": symbols})


def action() -> ConfigDict:
    """FAST on the normalized motions."""
    return complete(
        ActionFitConfig,
        {"corpus": CORPUS, "chunk_size": 8, "scale": 10.0, "vocabulary_size": 256},
    )


def vision() -> ConfigDict:
    """A small video VQ on the front camera."""
    values = {"corpus": CORPUS, "image_specs": IMAGE_SPECS, "total_steps": 700}
    return complete(VisionFitConfig, values)


def tokens() -> ConfigDict:
    """All splits into token stores."""
    values = {
        "corpus": CORPUS,
        "image_specs": IMAGE_SPECS,
        "splits": {"train": "train", "swerves": "swerves", "val": "val"},
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
    values = training(1000, data)
    values["data"] |= {"stores": ("TOKEN_STORE", "SWERVES"), "weights": (0.5, 0.5)}
    values["data"]["weight_unit"] = "store"
    return complete(TrainConfig, values)


def policy() -> ConfigDict:
    """Eight motions from a frame, the command and the ego status."""
    data = {
        "task": "driving",
        "views": ("image",),
        "frames": 1,
        "state": True,
        "sequence_length": 128,
        "batch_size": 32,
        "loss_on": "action",
    }
    values = training(1000, data) | {"loss": {"max_labeled": 32, "vision_noise": 0.3}}
    # Some thousands of moments are soon known by heart: without noise and dropout the loss on
    # held-out logs rises from 0.47 after 500 steps to 0.77 after 1,800.
    values["model"]["overrides"] = {"dropout": 0.1}
    return complete(TrainConfig, values)


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
