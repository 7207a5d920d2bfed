"""A small policy for eight tasks of CALVIN's scene D, from nothing, on two CPU cores.

    C=configs/calvin_scratch.py
    .venv-calvin/bin/python -m pip install --editable .
    .venv-calvin/bin/python -m univla_jax.demonstrate --benchmark=calvin \\
        --config=$C:demonstrations --out=W
    for kind in text action vision; do python -m univla_jax.fit_tokenizer --config=$C:$kind \\
        --source=W/calvin_sim --workdir=W/$kind; done
    python -m univla_jax.tokenize_dataset --config=$C:tokens --source=W/calvin_sim \\
        --vision=W/vision --out=W/tokens
    python -m univla_jax.train --config=$C:policy --workdir=W/policy \\
        --config.data.stores="('W/tokens/train',)" --config.evaluation.stores="('W/tokens/val',)" \\
        --config.tokenizers.text=W/text --config.tokenizers.vision=W/vision \\
        --config.tokenizers.action=W/action
    python -m univla_jax.evaluate --benchmark=calvin --suite=scripted --renderer=tiny \\
        --episodes_per_task=100 --simulator_python=.venv-calvin/bin/python \\
        --checkpoint=W/policy --out=W/evaluation

``bash launch/simulators/calvin.sh CALVIN`` made ``.venv-calvin``. The demonstrations are written in
it, so this package is installed there, too; the evaluation runs only its simulator there.

The tasks open and close the drawer, move the slider and switch both lights. Every demonstration
begins in a scene drawn at random, with the hand at a random place or where the task before left it;
the evaluation's chains begin in CALVIN's own 192 first states.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from univla_jax.config import complete, of_stage
from univla_jax.data.tokenize import TokenizeConfig
from univla_jax.data.tokenizer_fitting import ActionFitConfig, TextFitConfig
from univla_jax.simulators.calvin.calvin_demonstrations import CORPUS, DemonstrationsConfig
from univla_jax.training.train_config import TrainConfig
from univla_jax.training.vision_training import VisionFitConfig

# Steps of an action chunk, and from one picture to the next: a third of a second.
ACTION_FRAMES = 10
VIEWS = ("image", "wrist_image")
# One code for 4 x 4 pixels tells where things are; one for 8 x 8 blurs it.
_FINE = {"factor": 4, "min_pixels": 256}
IMAGE_SPECS = {
    "image": {"size": (40, 40), **_FINE},
    "wrist_image": {"size": (16, 16), **_FINE},
}
FRAME_HEADERS = ("1*10*10", "1*4*4")  # one text id each, as they stand before every frame

Values = dict[str, Any]


def demonstrations() -> ConfigDict:
    """Scripted episodes of one task each, whose hand is pushed off its way now and then."""
    values = {
        "train_episodes": 100,
        "val_episodes": 4,
        "draw_every": ACTION_FRAMES,
        "push": 0.03,
    }
    return complete(DemonstrationsConfig, values)


def text() -> ConfigDict:
    """SentencePiece on the instructions."""
    return complete(TextFitConfig, {"corpus": CORPUS, "symbols": FRAME_HEADERS})


def action() -> ConfigDict:
    """FAST on the chunks, which end behind their last coefficient that is not 0."""
    values = {
        "corpus": CORPUS,
        "chunk_size": ACTION_FRAMES,
        "scale": 5.0,
        # Hardly any merges: a wrong token that stands for several coefficients shifts all that
        # follow.
        "vocabulary_size": 272,
        "drop_trailing_zeros": True,
    }
    return complete(ActionFitConfig, values)


def vision() -> ConfigDict:
    """A small video VQ on the frames of both cameras."""
    values = {
        "image_specs": IMAGE_SPECS,
        "overrides": {"ch_mult": (1, 4, 8)},
        "total_steps": 250,
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
    """Action chunks after one moment of both cameras and the state."""
    values = {
        "total_steps": 4400,
        "model": {"preset": "quickstart", "visual_init": "codebook"},
        "data": {
            "stores": ("TOKEN_STORE",),
            "task": "policy_image",
            "views": VIEWS,
            "frames": 1,
            "chunk_size": ACTION_FRAMES,
            "aligned_windows": 1.0,
            "state": True,
            "sequence_length": 256,
            "packing": False,
            "batch_size": 8,
            "read_threads": 1,
        },
        "loss": {"max_labeled": 72},
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
