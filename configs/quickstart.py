"""The whole way on the embedded tabletop, sized for two CPU cores and a quarter of an hour.

    bash launch/quickstart.sh W                                 # all stages, in order

It post-trains on frames without actions (``world_model``), lets an expert that errs act
(``attempts``), and fine-tunes on a mixture of tasks (``joint``), in the end without words where
frames are to follow given actions (``unified``): one checkpoint that acts, imagines, obeys given
actions and judges, from which all results come. It also plans and learns from its own failures, and
there is a specialist to compare it with::

    python -m univla_jax.evaluate --config=configs/quickstart.py:evaluate \\
        --checkpoint=W/unified --plan=8 --conditions=policy --out=W/planned
    python -m univla_jax.improve --config=configs/quickstart.py:improve --checkpoint=W/unified \\
        --stores=W/tokens/train --held_out=W/tokens/val --out=W/improved
    python -m univla_jax.train --config=configs/quickstart.py:policy --workdir=W/policy \\
        --config.init_from=W/world_model --config.data.stores="('W/tokens/train',)" \\
        --config.evaluation.stores="('W/tokens/val',)"

One recipe per stage, chosen by the name after the colon; each names only what differs from the
defaults of its dataclass, and every field of that can be set on the command line.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from univla_jax.config import complete, of_stage
from univla_jax.data.tokenize import TokenizeConfig
from univla_jax.data.tokenizer_fitting import ActionFitConfig, TextFitConfig
from univla_jax.evaluation.closed_loop import EvaluateConfig
from univla_jax.evaluation.counterfactuals import CounterfactualConfig
from univla_jax.evaluation.imagined_episodes import ImagineConfig
from univla_jax.evaluation.improvement import ImproveConfig
from univla_jax.simulators.tabletop.tabletop_expert import DemonstrationsConfig
from univla_jax.training.train_config import TrainConfig
from univla_jax.training.vision_training import VisionFitConfig

CORPUS = "tabletop"
ACTION_FRAMES = 5  # steps of an action chunk: one second at 5 Hz
VIEWS = ("image", "wrist_image")
FRAME_SPACING = 3  # steps between the world model's frames
IMAGE_SPECS = {
    "image": {"size": (32, 32), "factor": 8, "min_pixels": 256},
    "wrist_image": {"size": (16, 16), "factor": 8, "min_pixels": 256},
}
ACTING = {  # of the policies that do nothing else
    "task": "policy_video",
    "views": VIEWS,
    "frames": 2,
    "chunk_size": ACTION_FRAMES,
    "aligned_windows": 0.7,
}
FRAME_HEADERS = ("1*4*4", "1*2*2")  # one text id each, as they stand before every frame

Values = dict[str, Any]


def demonstrations() -> ConfigDict:
    """Scripted episodes; evaluation draws its own, from other seeds."""
    values = {
        "train_episodes": 4000,
        "val_episodes": 65,
        # Placing takes two decisions, and "reach" teaches the second: which zone is which.
        "families": ("touch", "lift", "push", "reach", "place", "place"),
    }
    return complete(DemonstrationsConfig, values)


def text() -> ConfigDict:
    """SentencePiece on the instructions."""
    return complete(TextFitConfig, {"corpus": CORPUS, "symbols": FRAME_HEADERS})


def action() -> ConfigDict:
    """FAST on the normalized chunks."""
    return complete(
        ActionFitConfig,
        {"corpus": CORPUS, "chunk_size": ACTION_FRAMES, "scale": 5.0, "vocabulary_size": 384},
    )


def vision() -> ConfigDict:
    """A small video VQ on the frames of both cameras."""
    return complete(
        VisionFitConfig, {"corpus": CORPUS, "image_specs": IMAGE_SPECS, "total_steps": 900}
    )


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
        "sequence_length": 96,
        "batch_size": 16,
        "vision_weight": 1.0,
    }
    return complete(TrainConfig, training(900, data))


def policy() -> ConfigDict:
    """Action chunks alone, interleaved with the frames of both cameras: the specialist."""
    data = {**ACTING, "sequence_length": 112, "packing": False, "batch_size": 16}
    return complete(TrainConfig, training(3600, data) | {"loss": {"max_labeled": 64}})


def realtime() -> ConfigDict:
    """For a robot that goes on moving while the policy computes; begins with ``unified``.

    Up to three actions under way stand before each chunk: 0.6 seconds of latency.
    """
    data = {**ACTING, "max_committed": 3, "sequence_length": 256, "batch_size": 8}
    config = complete(TrainConfig, training(2000, data))
    config.optimizer.learning_rate = 1.5e-3
    return config


def joint() -> ConfigDict:
    """All tasks in one run, from ``world_model``.

    Its stores are ``train``, the demonstrations, and ``rollouts``, the attempts with outcomes.
    """
    return complete(TrainConfig, training(4000, mixed("rollouts", 3.0)))


def unified() -> ConfigDict:
    """One checkpoint that acts, imagines, obeys given actions and judges; begins with ``joint``.

    Beside words that tell what will be done, ``joint`` hardly learns to read the actions; without
    words, in the last steps alone, it does, and what the other tasks learned stays. From the first
    step on this costs them more.
    """
    data = mixed("rollouts", 3.0)
    changes: dict[str, Values] = {
        "dynamics": {"weight": 0.5, "wordless": True, "vision_weight": 1.0},
        "world_model": {"weight": 0.3},
        "value": {"weight": 0.25},
    }
    data["mixture"] = tuple(
        {**entry, **changes.get(entry.get("name", entry["task"]), {})} for entry in data["mixture"]
    )
    config = complete(TrainConfig, training(950, data))
    config.optimizer.learning_rate = 1e-3
    return config


def mixed(rollouts: str, share: float, **of_policy: Any) -> Values:
    """The mixture of all directions.

    Args:
      rollouts: name of the store with attempts.
      share: of an attempt beside a demonstration, where frames follow actions.
      **of_policy: further settings of the policy.
    """
    both = {"views": VIEWS}
    mixture = (
        {
            "task": "policy_video",
            "name": "policy",
            "stores": ("train",),
            "weight": 0.5,
            "frames": 2,
            "aligned_windows": 0.7,
            "evaluation_stores": ("val",),
            **both,
            **of_policy,
        },
        {
            # Attempts teach what actions do where they do not follow from the instruction.
            "task": "policy_video",
            "name": "dynamics",
            "stores": ("train", rollouts),
            "weights": (1.0, share),
            "weight": 0.2,
            "frames": 3,
            "loss_on": "vision",
            **both,
        },
        {
            "task": "world_model",
            "stores": ("train",),
            "weight": 0.2,
            "frames": 4,
            "frame_spacing": FRAME_SPACING,
            "evaluation_stores": ("val",),
            **both,
        },
        {
            "task": "value",
            "stores": (rollouts,),
            "weight": 0.1,
            "frames": 3,
            "aligned_windows": 0.5,
            **both,
        },
    )
    return {
        "mixture": mixture,
        "chunk_size": ACTION_FRAMES,
        "sequence_length": 256,
        "batch_size": 8,
        "vision_weight": 0.3,
    }


def attempts() -> ConfigDict:
    """Roll-outs of an expert that errs, with their outcomes, on scenes of demonstrations."""
    values = {
        "episodes": 1200,
        "batch": 40,
        "max_steps": 30,
        "conditions": ("attempts",),
        "training_scenes": True,
        "first_seed": 500_000,
        "rollouts": True,
        "video_episodes": 0,
    }
    return complete(EvaluateConfig, values)


def attempts_held_out() -> ConfigDict:
    """Further attempts, for the held-out loss of the value."""
    config = attempts()
    config.update({"episodes": 80, "first_seed": 600_000})
    return config


def improve() -> ConfigDict:
    """A round of learning from the policy's own successes and failures, without demonstrations."""
    attempts_of_policy = {
        "episodes": 1000,
        "batch": 100,
        "conditions": ("policy",),
        "training_scenes": True,
        "first_seed": 700_000,
        "video_episodes": 0,
    }
    data = mixed("advantages", 1.0, stores=("train", "advantages"), advantage=True)
    values = training(1500, data)
    values["optimizer"]["learning_rate"] = 1e-3
    return complete(ImproveConfig, {"attempts": attempts_of_policy, "train": values})


def training(steps: int, data: Values) -> Values:
    """What all training stages have in common."""
    return {
        "total_steps": steps,
        "model": {"preset": "quickstart", "visual_init": "codebook"},
        "data": {"stores": ("TOKEN_STORE",), "read_threads": 1, **data},
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
    """Closed loop on held-out episodes, beside its baselines."""
    conditions = ("policy", "other_instruction", "untrained", "random")
    return complete(EvaluateConfig, {"episodes": 150, "batch": 75, "conditions": conditions})


def imagine() -> ConfigDict:
    """Held-out episodes continued from their first frame."""
    return complete(ImagineConfig, {"corpus": CORPUS, "episodes": 48, "frames": 3, "batch": 48})


def obey() -> ConfigDict:
    """Held-out episodes continued by their own actions, two chunks."""
    config = imagine()
    config.frames = 2
    return config


def counterfactuals() -> ConfigDict:
    """Held-out scenes under other instructions and other actions."""
    return complete(CounterfactualConfig, {"counterfactuals": 200})


STAGES = (
    demonstrations,
    text,
    action,
    vision,
    tokens,
    world_model,
    attempts,
    attempts_held_out,
    joint,
    unified,
    policy,
    realtime,
    evaluate,
    imagine,
    obey,
    counterfactuals,
    improve,
)


def get_config(stage: str = "") -> ConfigDict:
    """The config of one stage.

    Args:
      stage: name of a function above.

    Raises:
      UserError: no such stage.
    """
    return of_stage(STAGES, stage)
