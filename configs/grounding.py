"""Grounding on the embedded tabletop: one checkpoint that points, answers, thinks and acts.

It starts from the quickstart's specialist, which lies in Q with its tokenizers: a policy that knows
where the blocks are, and learns to say it. Questions stand before the frames, as instructions do,
so that its way of finding the block that is meant serves them too::

    bash launch/quickstart.sh Q                          # the stages up to world_model are needed
    python -m univla_jax.train --config=configs/quickstart.py:policy --workdir=Q/policy \\
        --config.init_from=Q/world_model --config.data.stores="('Q/tokens/train',)" \\
        --config.evaluation.stores="('Q/tokens/val',)"
    python -m univla_jax.demonstrate --config=configs/grounding.py:demonstrations \\
        --out=W/demonstrations
    python -m univla_jax.fit_tokenizer --config=configs/grounding.py:text \\
        --source=W/demonstrations --workdir=W/text
    python -m univla_jax.tokenize_dataset --config=configs/grounding.py:tokens \\
        --source=W/demonstrations --vision=Q/tokenizers/vision --out=W/tokens
    python -m univla_jax.train --config=configs/grounding.py:grounding --workdir=W/grounding \\
        --config.init_from=Q/policy --config.data.stores="('W/tokens/train',)" \\
        --config.evaluation.stores="('W/tokens/val',)" --config.tokenizers.text=W/text \\
        --config.tokenizers.vision=Q/tokenizers/vision \\
        --config.tokenizers.action=Q/tokenizers/action
    python -m univla_jax.train --config=configs/grounding.py:relations --workdir=W/relations \\
        --config.init_from=W/grounding --config.data.stores="('W/tokens/train',)" \\
        --config.evaluation.stores="('W/tokens/val',)"
    python -m univla_jax.train --config=configs/grounding.py:refined --workdir=W/refined \\
        --config.init_from=W/relations --config.data.stores="('W/tokens/train',)" \\
        --config.evaluation.stores="('W/tokens/val',)"
    python -m univla_jax.evaluate --grounding=W/tokens/val --checkpoint=W/refined --out=W/scores
    python -m univla_jax.evaluate --config=configs/grounding.py:evaluate --checkpoint=W/refined \\
        --out=W/acts
    python -m univla_jax.ask --checkpoint=W/refined --image=PNG "where is the red block?"

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
tokens = quickstart.tokens

Values = dict[str, Any]


def demonstrations() -> ConfigDict:
    """Scripted episodes with boxes, questions and thoughts at every step."""
    values = {
        "train_episodes": 3000,
        "val_episodes": 500,
        # Other scenes than those of the quickstart, whose policy this one starts from.
        "first_seed": 10_000,
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
    """Boxes in both cameras, boxes along episodes, questions and actions together."""
    return _training(_mixture(grounding=0.5, question=0.2, acting=0.25), 3000)


def relations() -> ConfigDict:
    """Goes on from ``grounding`` with more questions: relations are learned after colors."""
    return _training(_mixture(grounding=0.4, question=0.4, acting=0.15), 2400)


def refined() -> ConfigDict:
    """Goes on from ``relations`` for long: what is composed of several things is learned last."""
    return _training(_mixture(grounding=0.45, question=0.35, acting=0.15), 8000)


def _mixture(*, grounding: float, question: float, acting: float) -> tuple[Values, ...]:
    """The tasks by their shares of the samples; the rest follows things along episodes."""
    rest = round(1 - grounding - question - acting, 4)
    first = {"question_first": True}
    return (
        {"task": "grounding", "weight": grounding, "views": VIEWS, **first},
        {"task": "tracking", "weight": rest, "views": ("image",), "frames": 3, "frame_spacing": 3},
        {"task": "question", "weight": question, "views": ("image",), **first},
        {"task": "policy_video", "weight": acting, "views": VIEWS, "aligned_windows": 0.7},
    )


def policy() -> ConfigDict:
    """The plain policy of one image, at the steps of ``reasoning``."""
    entry = {"task": "policy_image", "views": VIEWS, "aligned_windows": 0.7}
    return _training((entry,), 900)


def reasoning() -> ConfigDict:
    """The policy that writes a thought with boxes and its next move before each chunk."""
    entry = {"task": "chain_of_thought", "views": VIEWS, "aligned_windows": 0.7}
    config = _training((entry,), 900)
    config.loss.max_labeled = 0  # thoughts fill most of a row
    return config


def _training(mixture: tuple[Values, ...], steps: int) -> ConfigDict:
    data = {
        "mixture": mixture,
        "chunk_size": quickstart.ACTION_FRAMES,
        "sequence_length": 256,
        "batch_size": 8,
    }
    values = quickstart.training(steps, data) | {"loss": {"max_labeled": 128}}
    # The text tokenizer is another than the specialist's: its pieces are matched, the rest is new.
    values |= {"init_from": "SPECIALIST", "warm_start": "partial"}
    values["optimizer"]["warmup_steps"] = 50
    return complete(TrainConfig, values)


def evaluate() -> ConfigDict:
    """Closed loop on held-out episodes."""
    return complete(EvaluateConfig, {"episodes": 300, "batch": 75, "conditions": ("policy",)})


STAGES = (demonstrations, text, tokens, grounding, relations, refined, policy, reasoning, evaluate)


def get_config(stage: str = "") -> ConfigDict:
    """The config of one stage.

    Args:
      stage: name of a function above.

    Raises:
      UserError: no such stage.
    """
    return of_stage(STAGES, stage)
