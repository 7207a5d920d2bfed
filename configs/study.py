"""The paper's tables in small, on the tabletop; each row with three seeds and paired episodes.

    python -m univla_jax.study --config=configs/study.py:posttraining --workdir=quickstart --out=S

``posttraining``: policies after no post-training, after actions alone, text-to-image, video without
words, and the world model (Table 4). ``short``: its first and last row, post-trained for longer and
fine-tuned for fewer steps, in about an hour. ``efficiency``: both at shares of demonstrations and
steps (Table 5). ``vision_loss`` and ``history``: what fine-tuning learns and sees (Table 6).
"""

from __future__ import annotations

import runpy
from typing import Any

from ml_collections import ConfigDict

from univla_jax.config import complete, of_stage
from univla_jax.evaluation.study_runs import StudyConfig

_QUICKSTART = runpy.run_path(__file__.replace("study.py", "quickstart.py"))["get_config"]
NONE = {"name": "none", "post_trained": False}
WORLD_MODEL = {"name": "world_model"}


def posttraining() -> ConfigDict:
    """What is post-trained, at a tenth and at all of the demonstrations."""
    one_view = {"frames": 1, "sequence_length": 96, "vision_weight": 1.0}
    arms = (
        NONE,
        {"name": "actions", "post": {"data": _policy_data()}},
        {"name": "text_to_image", "post": {"data": {"task": "text_to_image", **one_view}}},
        {"name": "video", "post": {"data": {"null_prompt_prob": 1.0}}},
        WORLD_MODEL,
    )
    return _study(arms, demonstrations=(0.1, 1.0))


def short() -> ConfigDict:
    """None and a world model of both cameras, post-trained four times as long as fine-tuned.

    The paper's own ratio: 30,000 and 8,000 steps.
    """
    config = _study((NONE, WORLD_MODEL), demonstrations=(0.1, 1.0))
    config.policy.total_steps = 900
    config.post_training.total_steps = 3600
    config.post_training.data.update({"views": config.policy.data.views, "sequence_length": 112})
    return config


def efficiency() -> ConfigDict:
    """How many demonstrations and steps post-training saves."""
    shares = {"demonstrations": (0.1, 1.0), "steps": (0.25, 0.5, 1.0)}
    return _study((NONE, WORLD_MODEL), **shares)


def vision_loss() -> ConfigDict:
    """Fine-tuning on actions alone, and on the frames between them too."""
    both = {"loss_on": "both", "vision_weight": 0.3}
    long = {"max_labeled": 0}
    return _study(
        ({"name": "actions"}, {"name": "and_frames", "policy": {"data": both, "loss": long}})
    )


def history() -> ConfigDict:
    """Moments that a policy sees before the present one."""
    lengths = {0: 64, 1: 112, 2: 160}
    arms = tuple(
        {
            "name": f"history_{count}",
            "policy": {
                "data": {"frames": count + 1, "sequence_length": length},
                "loss": {"max_labeled": 32 * (count + 1)},
            },
        }
        for count, length in lengths.items()
    )
    return _study(arms)


def _study(arms: tuple[dict[str, Any], ...], **shares: Any) -> ConfigDict:
    values = {
        "post_training": _QUICKSTART("world_model").to_dict(),
        "policy": _QUICKSTART("policy").to_dict(),
        "evaluate": {"episodes": 300, "batch": 75, "conditions": ("policy",), "video_episodes": 0},
        "arms": arms,
        **shares,
    }
    return complete(StudyConfig, values)


def _policy_data() -> dict[str, Any]:
    """The policy's part of the data, as an objective of post-training."""
    data = _QUICKSTART("policy").data.to_dict()
    del data["stores"]
    return data


STUDIES = (posttraining, short, efficiency, vision_loss, history)


def get_config(stage: str = "") -> ConfigDict:
    """The config of a study.

    Raises:
      UserError: no such study.
    """
    return of_stage(STUDIES, stage)
