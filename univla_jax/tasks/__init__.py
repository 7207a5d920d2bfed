"""Tasks: what a training sequence looks like, how it is prompted, and what is decoded from it.

A new task is one file ``tasks/NAME.py``, with a subclass of ``tasks.base.Task`` called ``TASK``,
and its name in ``TASK_NAMES``.
"""

from __future__ import annotations

import importlib

from univla_jax.assets import Assets
from univla_jax.errors import UserError
from univla_jax.sequences.tokens import TextEncoder
from univla_jax.tasks.base import Task, TaskSettings

TASK_NAMES = (
    "policy_video",
    "policy_image",
    "policy_flow",
    "chain_of_thought",
    "world_model",
    "question",
    "caption",
    "text_to_image",
)


def task_class(name: str) -> type[Task]:
    """The class of a registered task.

    Raises:
      UserError: no such task.
    """
    if name not in TASK_NAMES:
        raise UserError(f"task {name!r}: expected one of {', '.join(TASK_NAMES)}")
    return importlib.import_module(f"{__name__}.{name}").TASK


def make_task(
    name: str, settings: TaskSettings, assets: Assets, text_encoder: TextEncoder | None = None
) -> Task:
    """The task ``name`` over the tokenizers and statistics of ``assets``.

    Args:
      name: one of ``TASK_NAMES``.
      settings: of the run.
      assets: vocabulary, text and action tokenizer, action statistics; a task without actions uses
        the first two alone.
      text_encoder: of the same assets, to share its cache; made here when None.

    Raises:
      UserError: no such task, or it writes actions and the assets have no action tokenizer.
    """
    task = task_class(name)
    return task(
        settings,
        text_encoder or TextEncoder(assets.vocabulary, assets.text),
        assets.require("action") if task.needs.action_tokens else None,
        assets.statistics if task.needs.actions else None,
    )
