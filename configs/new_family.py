"""A task family that a policy has never seen: full fine-tuning beside LoRA, on the tabletop.

A policy learns every family but "push" and is then adapted to it, once as a whole and once by
adapters alone, on new demonstrations and as many of the old ones: without those both forget what
they knew. Both are scored on the new family and on the old ones. Tokenizers come from a finished
quickstart ``Q``::

    C=configs/new_family.py
    for kind in known new; do
      python -m univla_jax.demonstrate --config=$C:demonstrations_$kind --out=W/$kind
      python -m univla_jax.tokenize_dataset --config=$C:tokens --source=W/$kind \\
          --vision=Q/tokenizers/vision --out=W/tokens_$kind
    done
    python -m univla_jax.train --config=$C:world_model --workdir=W/world_model \\
        --config.data.stores="('W/tokens_known/train',)" \\
        --config.evaluation.stores="('W/tokens_known/val',)" \\
        --config.tokenizers.text=Q/tokenizers/text --config.tokenizers.action=Q/tokenizers/action \\
        --config.tokenizers.vision=Q/tokenizers/vision
    python -m univla_jax.train --config=$C:policy --workdir=W/policy \\
        --config.init_from=W/world_model --config.data.stores="('W/tokens_known/train',)" \\
        --config.evaluation.stores="('W/tokens_known/val',)"
    for how in full lora; do
      python -m univla_jax.train --config=$C:$how --workdir=W/$how --config.init_from=W/policy \\
          --config.data.stores="('W/tokens_new/train','W/tokens_known/train')" \\
          --config.evaluation.stores="('W/tokens_new/val','W/tokens_known/val')"
    done
    for model in policy full lora; do for kind in known new; do
      python -m univla_jax.evaluate --config=$C:evaluate_$kind --checkpoint=W/$model \\
          --out=W/score_${model}_$kind
    done; done
    python -m univla_jax.evaluate --compare W/score_policy_known W/score_lora_known
"""

from __future__ import annotations

import runpy

from ml_collections import ConfigDict

from univla_jax.config import of_stage

_QUICKSTART = runpy.run_path(__file__.replace("new_family.py", "quickstart.py"))["get_config"]
NEW = "push"
KNOWN = ("touch", "lift", "reach", "place", "place")  # placing takes two decisions
_NUMBERS = {"known": (0, 1, 3, 4), "new": (2,)}  # in the benchmark's order


def demonstrations_known() -> ConfigDict:
    """Of every family but the new one."""
    config = _QUICKSTART("demonstrations")
    config.update({"families": KNOWN, "train_episodes": 3300})
    return config


def demonstrations_new() -> ConfigDict:
    """Of the new family, on scenes of their own."""
    config = _QUICKSTART("demonstrations")
    config.update({"families": (NEW,), "train_episodes": 700, "first_seed": 10_000})
    return config


def tokens() -> ConfigDict:
    """As the quickstart's."""
    return _QUICKSTART("tokens")


def world_model() -> ConfigDict:
    """As the quickstart's, without a frame of the new family."""
    return _QUICKSTART("world_model")


def policy() -> ConfigDict:
    """The specialist of the known families."""
    config = _QUICKSTART("policy")
    config.total_steps = 3000
    return config


def full() -> ConfigDict:
    """All weights; half of the samples are of the new family, half of the known ones."""
    config = _QUICKSTART("policy")
    stores = ("NEW_TOKEN_STORE", "KNOWN_TOKEN_STORE")
    config.data.update({"stores": stores, "weights": (1.0, 1.0), "weight_unit": "store"})
    config.total_steps = 600
    # What the policy knows keeps its meaning: pushing never opens the gripper.
    config.tokenizers.statistics = "init_from"
    config.optimizer.update({"learning_rate": 1e-3, "min_learning_rate": 1e-4})
    return config


def lora() -> ConfigDict:
    """Adapters alone, 4.0 % as many weights; they take a higher rate."""
    config = full()
    config.model.lora.rank = 4
    config.optimizer.learning_rate = 3e-3
    return config


def evaluate_known() -> ConfigDict:
    """The families that the policy knew before."""
    return _evaluate("known")


def evaluate_new() -> ConfigDict:
    """The new family."""
    return _evaluate("new")


def _evaluate(kind: str) -> ConfigDict:
    config = _QUICKSTART("evaluate")
    config.update({"tasks": _NUMBERS[kind], "episodes": 200, "conditions": ("policy",)})
    return config


STAGES = (
    demonstrations_known,
    demonstrations_new,
    tokens,
    world_model,
    policy,
    full,
    lora,
    evaluate_known,
    evaluate_new,
)


def get_config(stage: str = "") -> ConfigDict:
    """The config of one stage.

    Raises:
      UserError: no such stage.
    """
    return of_stage(STAGES, stage)
