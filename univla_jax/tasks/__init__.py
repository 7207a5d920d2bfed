"""Tasks: what a training sequence looks like, how it is prompted, and what is decoded from it.

A new task is one file ``tasks/NAME.py``, with a subclass of ``tasks.base.Task`` called ``TASK``,
and its name in ``TASK_NAMES``.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from univla_jax.assets import Assets
from univla_jax.config import build_config, former_names
from univla_jax.errors import UserError
from univla_jax.sequences.tokens import LABELS, Role, TextEncoder
from univla_jax.tasks.base import Task, TaskSettings

TASK_NAMES = (
    "policy_video",
    "policy_image",
    "policy_flow",
    "chain_of_thought",
    "world_model",
    "value",
    "question",
    "grounding",
    "tracking",
    "caption",
    "text_to_image",
    "driving",
    "driving_vava",
    "driving_flow",
    "driving_world_model",
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


# What a checkpoint says about the task it was trained on, so that it can be prompted the same way.
# It is the entry "layout" of ``assets.json``, whose keys are older than the names here.


@dataclasses.dataclass(frozen=True)
class CorpusRecord:
    """What a model was shown of one corpus.

    Attributes:
      control_hz: control rate in steps per second.
      frame_spacing: steps between two frames of a world model.
      grids: code grid (h, w) per view.
      views: cameras in the order they are written; empty stands for ``TaskRecord.views``.
    """

    control_hz: float
    frame_spacing: int
    grids: Mapping[str, tuple[int, int]]
    views: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TaskRecord:
    """The task of a training run and its settings.

    Attributes:
      task: its registered name.
      frames: moments per training sample; the history window of a video policy.
      chunk_size: steps of an action chunk.
      frame_spacing: steps between two frames of a world model; 0 means each corpus' own.
      sequence_length: the most tokens a training sample had.
      views: cameras in the order they are written, of corpora that have none of their own.
      corpora: what was shown of each corpus.
      state: whether the proprioceptive state is written before each chunk.
      views_together: whether a world model was shown all cameras at every moment.
      labels: key of ``sequences.tokens.LABELS``, what was learned; empty for the task's own.
      max_committed: most committed actions that stood before a policy's newest chunk.
      advantage: whether a token behind the instruction said how good the chunks are.
      question_first: whether a question stood before the frames that it was about.
      wordless: whether the instruction was left out.
      state_steps: equal steps of the chunk as which a state is written.
    """

    task: str = dataclasses.field(metadata={"formerly": "layout"})
    frames: int
    chunk_size: int = dataclasses.field(metadata={"formerly": "action_frames"})
    frame_spacing: int
    sequence_length: int
    views: tuple[str, ...]
    corpora: Mapping[str, CorpusRecord]
    state: bool = False
    views_together: bool = False
    labels: str = ""
    max_committed: int = 0
    advantage: bool = False
    question_first: bool = False
    wordless: bool = False
    state_steps: int = 1

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TaskRecord:
        """The record that assets hold.

        Raises:
          UserError: they were saved without one, or with unknown keys.
        """
        record = build_config(cls, values, where="assets.layout")
        corpora = {
            name: build_config(CorpusRecord, corpus, where=f"assets.layout.corpora.{name}")
            for name, corpus in record.corpora.items()
        }
        return dataclasses.replace(record, corpora=corpora)

    def to_json(self) -> dict[str, Any]:
        """JSON values for the assets."""
        # The file keeps its first key names and leaves out what older checkpoints do not have, so
        # that a run which is continued finds the fingerprint that it saved.
        values = dataclasses.asdict(self)
        added = ("state", "views_together", "labels", "max_committed", "advantage")
        added = (*added, "question_first", "wordless", "state_steps")
        for name in added:
            if values[name] == getattr(TaskRecord, name):
                del values[name]  # absent, as in assets saved before there were such choices
        values["views"] = list(self.views)
        for corpus in values["corpora"].values():
            views = list(corpus.pop("views"))
            if views and views != values["views"]:
                corpus["views"] = views
            corpus["grids"] = {view: list(grid) for view, grid in corpus["grids"].items()}
        file_keys = {new: old for old, new in former_names(TaskRecord).items()}
        return {file_keys.get(name, name): value for name, value in values.items()}

    @property
    def settings(self) -> TaskSettings:
        """The settings of the task's sequences."""
        return TaskSettings(
            frames=self.frames,
            chunk_size=self.chunk_size,
            frame_spacing=self.frame_spacing,
            views=self.views,
            views_together=self.views_together,
            state=self.state,
            max_committed=self.max_committed,
            advantage=self.advantage,
            question_first=self.question_first,
            wordless=self.wordless,
            state_steps=self.state_steps,
        )

    def views_of(self, corpus: str) -> tuple[str, ...]:
        """The cameras that are shown of a corpus, in the order they are written."""
        return self.corpora[corpus].views or self.views

    def learned(self, role: Role) -> bool:
        """Whether tokens of this role were learned."""
        return role in LABELS[self.labels or task_class(self.task).labels]

    def find_corpus(self, name: str | None = None) -> str:
        """The corpus ``name``, or the only one there is.

        Raises:
          UserError: unknown, or not named where there are several.
        """
        known = sorted(self.corpora)
        if name is None and len(known) == 1:
            return known[0]
        if name in self.corpora:
            return str(name)
        what = "name one" if name is None else f"{name!r} is not among them"
        raise UserError(f"the checkpoint was trained on the corpora {', '.join(known)}; {what}")


_MIXTURE = "mixture"  # key of a mixture's records in ``Assets.task``


def records_to_json(records: Sequence[TaskRecord]) -> dict[str, Any]:
    """The value of ``Assets.task``: of one task its record, of a mixture those of all its tasks."""
    values = [record.to_json() for record in records]
    return values[0] if len(values) == 1 else {_MIXTURE: values}


def records_from_json(values: Mapping[str, Any]) -> tuple[TaskRecord, ...]:
    """The tasks that a checkpoint was trained on; the inverse of ``records_to_json``.

    Raises:
      UserError: a record with unknown or missing keys.
    """
    return tuple(map(TaskRecord.from_json, values.get(_MIXTURE, [values])))


def without_labels(values: Mapping[str, Any]) -> dict[str, Any]:
    """``Assets.task`` without what was learned, which may change while a run goes on."""
    records = [dataclasses.replace(record, labels="") for record in records_from_json(values)]
    return records_to_json(records)
