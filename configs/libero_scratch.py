"""A small policy for eight LIBERO tasks of two suites, from nothing, and a world model.

    C=configs/libero_scratch.py
    for suite in goal object; do python -m univla_jax.demonstrate --benchmark=libero \\
        --config=$C:demonstrations_$suite --assets=LIBERO_ASSETS --out=W/demonstrations; done
    D=W/demonstrations/libero_goal,W/demonstrations/libero_object
    for kind in text action vision; do python -m univla_jax.fit_tokenizer --config=$C:$kind \\
        --source=$D --workdir=W/$kind; done
    for suite in goal object; do python -m univla_jax.tokenize_dataset --config=$C:tokens \\
        --source=W/demonstrations/libero_$suite --vision=W/vision --out=W/tokens/$suite; done
    S="'W/tokens/goal/train','W/tokens/object/train'"
    V="'W/tokens/goal/val','W/tokens/object/val'"
    T="--config.tokenizers.text=W/text --config.tokenizers.vision=W/vision"
    T="$T --config.tokenizers.action=W/action"
    for stage in policy world_model; do python -m univla_jax.train --config=$C:$stage \\
        --workdir=W/$stage --config.data.stores="($S)" --config.evaluation.stores="($V)" $T; done
    P=W/policy
    for round in 1 2; do
        for suite in goal object; do
            python -m univla_jax.demonstrate --benchmark=libero --config=$C:corrections_$suite \\
                --config.policy=$P --assets=LIBERO_ASSETS --out=W/corrections$round
            python -m univla_jax.tokenize_dataset --config=$C:tokens --vision=W/vision \\
                --source=W/corrections$round/libero_$suite --out=W/tokens/$suite$round
            S="$S,'W/tokens/$suite$round/train'" V="$V,'W/tokens/$suite$round/val'"
        done
        python -m univla_jax.train --config=$C:policy --workdir=W/policy$round \\
            --config.init_from=$P --config.tokenizers.statistics=init_from \\
            --config.data.stores="($S)" --config.evaluation.stores="($V)"
        P=W/policy$round
    done
    python -m univla_jax.evaluate --benchmark=libero --suite=libero_goal --tasks=0,1,7,8 \\
        --episodes_per_task=20 --checkpoint=$P --assets=LIBERO_ASSETS --out=W/goal
    python -m univla_jax.evaluate --benchmark=libero --suite=libero_object --tasks=0,4,5,7 \\
        --episodes_per_task=20 --checkpoint=$P --assets=LIBERO_ASSETS --out=W/object

Demonstrations for training begin from the initial states 20 to 45 of a task, those for validation
from 46 to 49; the evaluations above take the states 0 to 19. In the first chunk of a demonstration
the hand is moved elsewhere at random, later it is pushed now and then, and it misses a fourth of
its grasps. What such a policy does wrong on its own is corrected twice: a policy begins episodes
from the states of the demonstrations, the script says at each of its moments what is right and ends
them (DAgger), and the policy goes on learning from all. A command is held for ten steps, where the
policy's chunks of ten begin, and only there the cameras draw: without a GPU a picture costs twenty
times a step. The two suites are one corpus, ``libero``, with joint statistics. The policy begins
from nothing: a world model of the same episodes is there to imagine with.
``univla_jax/evaluation/README.md`` has the score and what fails.
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

CORPUS = "libero"
GOAL = (0, 1, 7, 8)  # open the middle drawer, bowl on the stove, turn on the stove, bowl on a plate
OBJECT = (0, 4, 5, 7)  # alphabet soup, ketchup, tomato sauce, milk into the basket
ACTION_FRAMES = 10  # steps of an action chunk, and from one picture to the next
# Equal steps as which the state is written: to 1 % of its half range, a few millimeters. What a
# command is depends on where the hand is.
STATE_STEPS = 100
FRAME_SPACING = 10  # steps between the world model's frames: half a second
VIEWS = ("image", "wrist_image")
# One code for 4 x 4 pixels tells where things are; one for 8 x 8 blurs it. The fixed camera shows
# the part of the table where things lie.
_FINE = {"factor": 4, "min_pixels": 256}
IMAGE_SPECS = {
    "image": {"size": (32, 48), "crop": (0.30, 0.03, 0.84, 0.87), **_FINE},
    "wrist_image": {"size": (32, 32), **_FINE},
}
FRAME_HEADERS = ("1*8*12", "1*8*8")  # one text id each, as they stand before every frame

Values = dict[str, Any]


def _demonstrations(suite: str, tasks: tuple[int, ...], **changes: Any) -> ConfigDict:
    values = {
        "suite": suite,
        "tasks": tasks,
        "train_episodes": 120,
        "val_episodes": 3,
        "displacement": 0.1,
        "draw_every": ACTION_FRAMES,
        "disturbance": 0.2,
        "slips": 0.25,
        "antialias": False,
    }
    return complete(DemonstrationsConfig, values | changes)


def _corrections(suite: str, tasks: tuple[int, ...]) -> ConfigDict:
    values = {"displacement": 0.04, "disturbance": 0.1, "slips": 0.1, "policy": "POLICY"}
    return _demonstrations(suite, tasks, train_episodes=60, policy_chunks=12, **values)


def demonstrations_goal() -> ConfigDict:
    """Scripted episodes of ``libero_goal``, from initial states that evaluation leaves alone."""
    return _demonstrations("libero_goal", GOAL)


def demonstrations_object() -> ConfigDict:
    """Scripted episodes of ``libero_object``."""
    return _demonstrations("libero_object", OBJECT)


def corrections_goal() -> ConfigDict:
    """Episodes of ``libero_goal`` that a policy begins and the script ends."""
    return _corrections("libero_goal", GOAL)


def corrections_object() -> ConfigDict:
    """Episodes of ``libero_object`` that a policy begins and the script ends."""
    return _corrections("libero_object", OBJECT)


def text() -> ConfigDict:
    """SentencePiece on the instructions."""
    return complete(TextFitConfig, {"corpus": CORPUS, "symbols": FRAME_HEADERS})


def action() -> ConfigDict:
    """FAST on the normalized chunks, which end behind their last coefficient that is not 0."""
    values = {
        "corpus": CORPUS,
        "chunk_size": ACTION_FRAMES,
        "scale": 10.0,
        # Hardly any merges: a held command has a token for each dimension, and a wrong one shifts
        # no other.
        "vocabulary_size": 256,
        "drop_trailing_zeros": True,
        "state_steps": STATE_STEPS,
    }
    return complete(ActionFitConfig, values)


def vision() -> ConfigDict:
    """A small video VQ on the frames of both cameras."""
    values = {
        "image_specs": IMAGE_SPECS,
        "overrides": {"ch_mult": (1, 4, 8)},
        "total_steps": 500,
        "batch_size": 16,
        "max_episodes": 128,
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


def world_model() -> ConfigDict:
    """The next frames of the fixed camera, from the first one and the instruction."""
    data = {
        "task": "world_model",
        "views": ("image",),
        "frames": 4,
        "frame_spacing": FRAME_SPACING,
        "sequence_length": 416,
        "batch_size": 8,
        "vision_weight": 1.0,
    }
    return complete(TrainConfig, _training(1200, data))


def policy() -> ConfigDict:
    """Action chunks after one moment of both cameras and the state."""
    data = {
        "task": "policy_image",
        "views": VIEWS,
        "frames": 1,
        "chunk_size": ACTION_FRAMES,
        "aligned_windows": 1.0,
        "state": True,
        "state_steps": STATE_STEPS,
        "sequence_length": 216,
        "packing": False,
        "batch_size": 8,
    }
    config = complete(TrainConfig, _training(8000, data) | {"loss": {"max_labeled": 16}})
    config.model.overrides = {"dropout": 0.1}
    return config


def _training(steps: int, data: Values) -> Values:
    return {
        "total_steps": steps,
        "model": {"preset": "quickstart", "visual_init": "codebook"},
        "data": {"stores": ("TOKEN_STORE",), "read_threads": 1, **data},
        "optimizer": {"learning_rate": 2.5e-3, "min_learning_rate": 1.5e-4, "clip_norm": 1.0},
        "checkpoint": {"every": 500},
        "evaluation": {"every": 500, "batches": 4, "stores": ("TOKEN_STORE",)},
        "log_every": 20,
    }


STAGES = (
    demonstrations_goal,
    demonstrations_object,
    corrections_goal,
    corrections_object,
    text,
    action,
    vision,
    tokens,
    world_model,
    policy,
)


def get_config(stage: str = "") -> ConfigDict:
    """The config of one stage.

    Args:
      stage: name of a function above.

    Raises:
      UserError: no such stage.
    """
    return of_stage(STAGES, stage)
