"""Grounding on the embedded tabletop: one checkpoint that points, answers, thinks and acts.

    W=grounding
    python -m univla_jax.demonstrate --config=configs/grounding.py:demonstrations \\
        --out=$W/demonstrations
    for kind in text action vision; do
      python -m univla_jax.fit_tokenizer --config=configs/grounding.py:$kind \\
          --source=$W/demonstrations --workdir=$W/tokenizers/$kind
    done
    python -m univla_jax.tokenize_dataset --config=configs/grounding.py:tokens \\
        --source=$W/demonstrations --vision=$W/tokenizers/vision --out=$W/tokens
    python -m univla_jax.train --config=configs/grounding.py:grounding --workdir=$W/grounding \\
        --config.data.stores="('$W/tokens/train',)" \\
        --config.evaluation.stores="('$W/tokens/val',)" \\
        --config.tokenizers.text=$W/tokenizers/text \\
        --config.tokenizers.vision=$W/tokenizers/vision \\
        --config.tokenizers.action=$W/tokenizers/action
    python -m univla_jax.evaluate --grounding=$W/tokens/val --checkpoint=$W/grounding --out=$W/S
    python -m univla_jax.ask --checkpoint=$W/grounding --image=PNG "where is the red block?"

``policy`` and ``reasoning`` are trained like ``grounding``, for the comparison of a policy that
thinks with one that does not. The split ``val`` has other scenes, and pairs of color and relation
that ``train`` never puts together.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs import quickstart
from univla_jax.config import complete, of_stage
from univla_jax.data.tokenizer_fitting import TextFitConfig
from univla_jax.evaluation.closed_loop import EvaluateConfig
from univla_jax.simulators.tabletop.tabletop_expert import DemonstrationsConfig
from univla_jax.tasks.question import TEMPLATE
from univla_jax.training.train_config import TrainConfig

VIEWS = quickstart.VIEWS
action, vision, tokens = quickstart.action, quickstart.vision, quickstart.tokens

Values = dict[str, Any]


def demonstrations() -> ConfigDict:
    """Scripted episodes with boxes, questions and thoughts at every step."""
    values = {
        "train_episodes": 1200,
        "val_episodes": 500,
        "families": ("touch", "lift", "push", "reach", "place", "place"),
        "annotations": True,
    }
    return complete(DemonstrationsConfig, values)


def text() -> ConfigDict:
    """SentencePiece on instructions, phrases, questions, answers and thoughts; location ids."""
    values = {
        "corpus": quickstart.CORPUS,
        "symbols": (*quickstart.FRAME_HEADERS, *TEMPLATE),
        "texts": ("question", "answer", "reasoning"),
        "locations": True,
        "vocabulary_size": 1536,
    }
    return complete(TextFitConfig, values)


def grounding() -> ConfigDict:
    """Boxes in both cameras, boxes along episodes, questions, thoughts and actions together."""
    mixture = (
        {"task": "grounding", "weight": 0.45, "views": VIEWS},
        {"task": "tracking", "weight": 0.05, "views": ("image",), "frames": 3, "frame_spacing": 3},
        {"task": "question", "weight": 0.2, "views": ("image",)},
        {"task": "policy_image", "weight": 0.3, "views": VIEWS, "aligned_windows": 0.7},
    )
    return _training(mixture, 2400)


def policy() -> ConfigDict:
    """The plain policy, at the steps of ``reasoning``."""
    entry = {"task": "policy_image", "views": VIEWS, "aligned_windows": 0.7}
    return _training((entry,), 900)


def reasoning() -> ConfigDict:
    """The policy that writes a thought with boxes and its next move before each chunk."""
    entry = {"task": "chain_of_thought", "views": VIEWS, "aligned_windows": 0.7}
    return _training((entry,), 900)


def _training(mixture: tuple[Values, ...], steps: int) -> ConfigDict:
    data = {
        "mixture": mixture,
        "chunk_size": quickstart.ACTION_FRAMES,
        "sequence_length": 256,
        "batch_size": 8,
    }
    values = quickstart.training(steps, data) | {"loss": {"max_labeled": 96}}
    values["optimizer"]["warmup_steps"] = 50
    return complete(TrainConfig, values)


def evaluate() -> ConfigDict:
    """Closed loop on held-out episodes."""
    return complete(EvaluateConfig, {"episodes": 300, "batch": 75, "conditions": ("policy",)})


STAGES = (demonstrations, text, action, vision, tokens, grounding, policy, reasoning, evaluate)


def get_config(stage: str = "") -> ConfigDict:
    """The config of one stage.

    Args:
      stage: name of a function above.

    Raises:
      UserError: no such stage.
    """
    return of_stage(STAGES, stage)
