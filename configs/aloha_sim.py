"""A small three-view policy for ALOHA's simulated cube transfer, from nothing, on two CPU cores.

    C=configs/aloha_sim.py
    python -m univla_jax.demonstrate --benchmark=aloha --config=$C:demonstrations --out=W
    for kind in text action vision; do python -m univla_jax.fit_tokenizer --config=$C:$kind \\
        --source=W/aloha_sim --workdir=W/$kind; done
    python -m univla_jax.tokenize_dataset --config=$C:tokens --source=W/aloha_sim \\
        --vision=W/vision --out=W/tokens
    python -m univla_jax.train --config=$C:policy --workdir=W/policy \\
        --config.data.stores="('W/tokens/train',)" --config.evaluation.stores="('W/tokens/val',)" \\
        --config.tokenizers.text=W/text --config.tokenizers.vision=W/vision \\
        --config.tokenizers.action=W/action
    python -m univla_jax.evaluate --benchmark=aloha --suite=poses --tasks=0 \\
        --checkpoint=W/policy --out=W/evaluation

Both arms are told poses of their hands, as differences from where they are at the beginning of a
chunk of half a second. Evaluation takes the first states 0 to 49, which no demonstration shows.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from univla_jax.config import complete, of_stage
from univla_jax.data.tokenize import TokenizeConfig
from univla_jax.data.tokenizer_fitting import ActionFitConfig, TextFitConfig
from univla_jax.simulators.aloha.aloha_demonstrations import CORPUS, DemonstrationsConfig
from univla_jax.training.train_config import TrainConfig
from univla_jax.training.vision_training import VisionFitConfig

ACTION_FRAMES = 25  # steps of an action chunk, and from one picture to the next
VIEWS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
# One code for 4 x 4 pixels tells where things are; one for 8 x 8 blurs it. The camera above shows
# the part of the table where cubes lie, at 1.2 cm per pixel.
_FINE = {"factor": 4, "min_pixels": 256}
IMAGE_SPECS = {
    "cam_high": {"size": (32, 32), "crop": (0.44, 0.435, 0.74, 0.66), **_FINE},
    "cam_left_wrist": {"size": (16, 16), **_FINE},
    "cam_right_wrist": {"size": (24, 24), **_FINE},
}
FRAME_HEADERS = ("1*8*8", "1*4*4", "1*6*6")  # one text id each, as they stand before every frame

Values = dict[str, Any]


def demonstrations() -> ConfigDict:
    """Scripted episodes whose hands are pushed off their way now and then."""
    values = {
        "train_episodes": 400,
        "val_episodes": 5,
        "draw_every": ACTION_FRAMES,
        "push": 0.025,
        # So that an episode shows about three places of the cube.
        "moved": 0.7,
        "max_steps": 500,
    }
    return complete(DemonstrationsConfig, values)


def text() -> ConfigDict:
    """SentencePiece on the instruction."""
    return complete(TextFitConfig, {"corpus": CORPUS, "symbols": FRAME_HEADERS})


def action() -> ConfigDict:
    """FAST on the normalized chunk deltas, which end behind their last coefficient not 0."""
    values = {
        "corpus": CORPUS,
        "chunk_size": ACTION_FRAMES,
        "scale": 10.0,
        # No merges: each coefficient is a token at its own place, and a wrong one shifts no other.
        "vocabulary_size": 256,
        "drop_trailing_zeros": True,
    }
    return complete(ActionFitConfig, values)


def vision() -> ConfigDict:
    """A small video VQ on the frames of all cameras."""
    values = {
        "image_specs": IMAGE_SPECS,
        "overrides": {"ch_mult": (1, 4, 8)},
        "total_steps": 400,
        "batch_size": 16,
        "max_episodes": 100,
    }
    return complete(VisionFitConfig, {"corpus": CORPUS, **values})


def tokens() -> ConfigDict:
    """Both splits into token stores."""
    values = {
        "corpus": CORPUS,
        "image_specs": IMAGE_SPECS,
        "splits": {"train": "train", "val": "val"},
        "batch_frames": 128,
    }
    return complete(TokenizeConfig, values)


def policy() -> ConfigDict:
    """Action chunks after one moment of three cameras and the state."""
    values = {
        "total_steps": 8000,
        "model": {"preset": "quickstart", "visual_init": "codebook", "overrides": {"dropout": 0.1}},
        "data": {
            "stores": ("TOKEN_STORE",),
            "task": "policy_image",
            "views": VIEWS,
            "frames": 1,
            "chunk_size": ACTION_FRAMES,
            "aligned_windows": 1.0,
            "state": True,
            "state_steps": ACTION_FRAMES,  # about 2 mm: differences need the pose they begin at
            "sequence_length": 208,
            "packing": False,
            "batch_size": 8,
            "read_threads": 1,
        },
        "loss": {"max_labeled": 32},
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
