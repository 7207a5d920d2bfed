"""Configuration of the input pipeline: tasks, stores, windows, packing, batch."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from univla_jax import tasks
from univla_jax.errors import UserError
from univla_jax.sequences.tokens import LABELS
from univla_jax.tasks.base import Needs, TaskSettings

_WEIGHT_UNITS = ("episode", "store")
_TOO_LONG = ("error", "drop", "cut_text")


@dataclasses.dataclass(frozen=True)
class MixtureTask:
    """One task of a mixture. What is empty or None is as ``DataConfig`` has it for all tasks.

    Attributes:
      task: one of ``tasks.TASK_NAMES``.
      weight: share of the samples in proportion to the other tasks' weights.
      name: of its metrics and in messages; by default that of the task. Two entries of one task,
        such as a video policy that learns actions and one that learns frames, need names.
      stores: folders, or last names of folders in ``DataConfig.stores``.
      weights: one per store.
      frames: moments per sample; 1 where the task shows one moment.
      chunk_size: steps of an action chunk.
      state: whether the proprioceptive state is written before each chunk.
      state_steps: equal steps of the chunk as which it is written.
      advantage: whether a token behind the instruction says how good the chunks are.
      question_first: whether a question stands before the frames that it is about.
      wordless: whether the instruction is left out.
      views: cameras in the order they are written.
      views_together: whether a world model shows all cameras at every moment instead of one.
      frame_spacing: steps between two frames of the world model.
      aligned_windows: fraction of the windows that begin a whole number of chunks in.
      max_committed: most committed actions before a policy's newest chunk.
      loss_on: key of ``sequences.tokens.LABELS``; empty takes the task's own.
      vision_weight: loss weight of a visual id, a number or (start, end, steps).
      value_weight: loss weight of a value.
      null_prompt_prob: fraction of samples with an empty instruction.
      evaluation_stores: of ``evaluation.stores``, by folder or last name; empty takes all that have
        what the task needs.
    """

    task: str
    weight: float = 1.0
    name: str = ""
    stores: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    frames: int | None = None
    chunk_size: int | None = None
    state: bool | None = None
    state_steps: int | None = None
    advantage: bool | None = None
    question_first: bool | None = None
    wordless: bool | None = None
    views: tuple[str, ...] = ()
    views_together: bool | None = None
    frame_spacing: int | None = None
    aligned_windows: float | None = None
    max_committed: int | None = None
    loss_on: str = ""
    vision_weight: float | tuple[float, float, int] | None = None
    value_weight: float | None = None
    null_prompt_prob: float | None = None
    evaluation_stores: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What its metrics are called."""
        return self.name or self.task

    def overrides(self) -> dict[str, object]:
        """The fields of ``DataConfig`` that it sets."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del own["weight"], own["name"], own["evaluation_stores"]
        return {name: value for name, value in own.items() if value not in (None, "", ())}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What the training batches are made of; built with ``univla_jax.config.build_config``.

    Attributes:
      sequence_length: tokens S of a batch element.
      batch_size: batch elements B of a step over all hosts.
      stores: folders of token stores, one per corpus or suite.
      task: one of ``tasks.TASK_NAMES``: what the sequences look like; empty with a mixture.
      mixture: tasks that are trained together and share batch elements, instead of ``task``.
      too_long: what becomes of samples of more than ``sequence_length`` tokens: "error" refuses the
        stores before the first step, "drop" draws another sample of the same store instead,
        "cut_text" leaves out the last words of the instruction.
      weights: one per store; when empty, each takes the ``mixture_weight`` of its corpus.
      weight_unit: "episode": a store is drawn in proportion to weight x its episodes, so equal
        weights make an epoch of everything, as the reference's sampler does; "store": in
        proportion to its weight alone.
      frames: moments per sample: chunks of the video policy, frames of the world model; 1 for all
        other tasks.
      chunk_size: steps of an action chunk.
      state: whether policies see the proprioceptive state, written before each chunk.
      state_steps: equal steps of the chunk as which the state is written; the reference has 1. With
        FAST n steps make its levels sqrt(n) times as fine, at no more tokens where trailing zeros
        are dropped: a policy of differences from the measured pose must know that pose.
      advantage: whether a token behind the instruction tells the video policy how good its chunks
        are, which ``improve`` learns from roll-outs; the policy then acts for good ones.
      question_first: whether a question stands before the frames that it is about, so that they are
        read in its light, and not behind them, as Emu3 has it. A small decoder learns far sooner
        to find what is asked for.
      wordless: whether the video policy leaves out the instruction, so that its frames follow from
        its actions alone. Beside words that tell what will be done, actions are hardly read.
      views: cameras in the order they are written; empty takes the ``policy_views`` of each corpus.
        The world model shows one: when empty, each of the corpus' ``world_model_views`` in a sample
        of its own, else by chance one of those named that the episode has.
      views_together: whether the world model shows all cameras at every moment instead of one.
      frame_spacing: steps between two frames of the world model; 0 takes each corpus' own.
      aligned_windows: fraction of the windows that begin a whole number of chunks into their
        episode, where a policy that executes whole chunks is queried; the rest begins anywhere. In
        short episodes the first chunk, which only the instruction decides, would else be rare.
      max_committed: most committed actions, executed while a policy computes, that stand before its
        newest chunk, which then begins after them; how many is drawn per sample, from 0 on. It is
        the longest latency in steps that ``--execution=realtime`` bridges; 0 trains none.
      loss_on: key of ``sequences.tokens.LABELS``; empty takes the task's own. "both" with a vision
        weight is the composite loss of the action's accuracy and the predicted frames' consistency.
      vision_weight: loss weight of a visual id, where other labeled ids weigh 1: a number, or
        (start, end, steps) for a line from ``start`` at step 0 to ``end`` at step ``steps``.
      value_weight: loss weight of a value, the one labeled id of its sample. Where others label a
        hundred, it is hardly learned with a weight of 1.
      null_prompt_prob: fraction of samples with an empty instruction, for guidance.
      packing: True packs samples first-fit; False pads each to a batch element of its own.
      packing_bins: batch elements packed together; more fill better and hold more samples in
        memory.
      seed: of the order and the windows.
      workers: processes that build batch elements; 0 builds in this one. Best a divisor of a host's
        elements.
      read_threads: threads per process that load and build; 0 does it on demand.
      prefetch_batches: batches made ahead on a thread; 0 makes them on demand.
      copies_per_epoch: of each episode and its augmented copies in a store, how many are drawn anew
        for every epoch; 0 shows all of them in each.
      held_out_every: each so many-th episode of a store is for evaluation and never trained on; 0
        holds none out, and evaluation then uses whole stores.
    """

    sequence_length: int
    batch_size: int
    stores: tuple[str, ...] = ()
    task: str = dataclasses.field(default="", metadata={"formerly": "layout"})
    mixture: tuple[MixtureTask, ...] = ()
    too_long: str = "error"
    weights: tuple[float, ...] = ()
    weight_unit: str = "episode"
    frames: int = 2
    chunk_size: int = dataclasses.field(default=10, metadata={"formerly": "action_frames"})
    state: bool = False
    state_steps: int = 1
    advantage: bool = False
    question_first: bool = False
    wordless: bool = False
    views: tuple[str, ...] = ()
    views_together: bool = False
    frame_spacing: int = 0
    aligned_windows: float = 0.0
    max_committed: int = 0
    loss_on: str = ""
    vision_weight: float | tuple[float, float, int] = 0.5
    value_weight: float = 1.0
    null_prompt_prob: float = 0.0
    packing: bool = True
    packing_bins: int = 16
    seed: int = 42
    workers: int = 0
    read_threads: int = 2
    prefetch_batches: int = 2
    copies_per_epoch: int = 0
    held_out_every: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for a value outside its range."""
        if bool(self.task) == bool(self.mixture):
            given = f"task={self.task!r} and a mixture" if self.task else "neither"
            raise UserError(f"data.task, data.mixture: {given}; give one of the two")
        if self.task:
            _check_one_of("task", self.task, tasks.TASK_NAMES)
        _check_one_of("loss_on", self.loss_on, ("", *LABELS))
        _check_one_of("weight_unit", self.weight_unit, _WEIGHT_UNITS)
        _check_one_of("too_long", self.too_long, _TOO_LONG)
        for name in ("sequence_length", "batch_size", "frames", "chunk_size", "packing_bins"):
            _check_at_least(name, getattr(self, name), 1)
        _check_at_least("state_steps", self.state_steps, 1)
        for name in ("frame_spacing", "workers", "read_threads", "prefetch_batches", "seed"):
            _check_at_least(name, getattr(self, name), 0)
        _check_at_least("copies_per_epoch", self.copies_per_epoch, 0)
        _check_at_least("max_committed", self.max_committed, 0)
        for name in ("null_prompt_prob", "aligned_windows"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.{name}: {getattr(self, name)}, expected 0…1")
        if min(self.vision_schedule) < 0:
            raise UserError(f"data.vision_weight: {self.vision_weight}, expected at least 0")
        if self.value_weight < 0:
            raise UserError(f"data.value_weight: {self.value_weight}, expected at least 0")
        if self.held_out_every < 0 or self.held_out_every == 1:
            raise UserError(
                f"data.held_out_every: {self.held_out_every}, expected 0 or at least 2 (1 would "
                "leave nothing to train on)"
            )
        self._check_weights()
        if self.mixture:
            self._check_mixture()
        else:
            self._check_needs()

    @property
    def parts(self) -> tuple[DataConfig, ...]:
        """One config per task: itself, or those of the mixture with their own settings.

        Raises:
          UserError: a task of the mixture has a setting that does not fit it.
        """
        if not self.mixture:
            return (self,)
        parts = []
        for number, entry in enumerate(self.mixture):
            own = {"frames": self.frames, **entry.overrides()}
            if entry.frames is None and not tasks.task_class(entry.task).needs.frame_sequence:
                own["frames"] = 1
            # The settings that only some tasks have go to those; one that an entry names itself is
            # kept, so that it is refused where it means nothing.
            for field, need, absent in (
                ("state", "state", False),
                ("advantage", "advantage", False),
                ("question_first", "question", False),
                ("wordless", "wordless", False),
                ("max_committed", "committed", 0),
            ):
                fits = getattr(tasks.task_class(entry.task).needs, need)
                if getattr(entry, field) is None and not fits:
                    own[field] = absent
            if entry.stores:
                own["stores"] = tuple(find_store(name, self.stores) for name in entry.stores)
                own.setdefault("weights", ())
            try:
                parts.append(dataclasses.replace(self, mixture=(), **own))
            except UserError as error:
                where = f"data.mixture[{number}] ({entry.title})"
                raise UserError(f"{where}: {str(error).removeprefix('data.')}") from error
        return tuple(parts)

    @property
    def titles(self) -> tuple[str, ...]:
        """The names of a mixture's tasks in metrics and messages; none of a single task."""
        return tuple(entry.title for entry in self.mixture)

    @property
    def needs(self) -> Needs:
        """What the task needs of data and model; of a mixture what any of its tasks needs."""
        if not self.mixture:
            return tasks.task_class(self.task).needs
        needs = [tasks.task_class(entry.task).needs for entry in self.mixture]
        names = [f.name for f in dataclasses.fields(Needs) if isinstance(f.default, bool)]
        return Needs(**{name: any(getattr(n, name) for n in needs) for name in names})

    @property
    def settings(self) -> TaskSettings:
        """The fields that shape the task's sequences."""
        names = [field.name for field in dataclasses.fields(TaskSettings)]
        return TaskSettings(**{name: getattr(self, name) for name in names})

    @property
    def labels(self) -> str:
        """The key of ``sequences.tokens.LABELS`` in force: ``loss_on``, else the task's own."""
        return self.loss_on or tasks.task_class(self.task).labels

    @property
    def vision_schedule(self) -> tuple[float, float, int]:
        """``vision_weight`` as (start, end, steps).

        Raises:
          UserError: neither a number nor three of them.
        """
        weight = self.vision_weight
        if isinstance(weight, (int, float)):
            return weight, weight, 0
        if len(weight) != 3:
            raise UserError(
                f"data.vision_weight: {weight}, expected a number or (start, end, steps)"
            )
        return weight

    def proportions(self, episodes: Sequence[int], own_weights: Sequence[float]) -> list[float]:
        """Proportion of each store in the stream, unnormalized.

        Args:
          episodes: training episodes per store; of a mixture those of its first task, then those
            of the second, and so on.
          own_weights: per store the ``mixture_weight`` of its corpus.
        """
        if self.mixture:
            found, start = [], 0
            for entry, part in zip(self.mixture, self.parts):
                cut = slice(start, start := start + len(part.stores))
                own = part.proportions(episodes[cut], own_weights[cut])
                found += [entry.weight * p / sum(own) for p in own]
            return found
        weights = self.weights or own_weights
        per_episode = self.weight_unit == "episode"
        return [w * (n if per_episode else 1) for w, n in zip(weights, episodes)]

    def _check_mixture(self) -> None:
        for number, entry in enumerate(self.mixture):
            where = f"data.mixture[{number}]"
            if entry.task not in tasks.TASK_NAMES:
                raise UserError(
                    f"{where}.task: {entry.task!r} is not one of {', '.join(tasks.TASK_NAMES)}"
                )
            if not entry.weight > 0:
                raise UserError(
                    f"{where}.weight: {entry.weight}, expected above 0; leave out a task to skip it"
                )
            if self.titles.index(entry.title) != number:
                raise UserError(
                    f"{where}: two tasks are called {entry.title!r}; give each a name of its own"
                )
            if tasks.task_class(entry.task).needs.own_row:
                raise UserError(
                    f"{where}: the task {entry.task!r} takes one sample per batch element, so it "
                    "cannot share a mixture; train it in a run of its own"
                )
        for part in self.parts:  # each checks itself
            if not part.stores:
                raise UserError("data.stores: none named; give the folders of token stores")

    def _check_needs(self) -> None:
        if self.frames != 1 and not self.needs.frame_sequence:
            raise UserError(
                f"data.frames: {self.frames}, but the task {self.task!r} shows one moment; set "
                "frames=1, or take a task of several"
            )
        if self.state and not self.needs.state:
            raise UserError(f"data.state: the task {self.task!r} has no place for it")
        if self.max_committed and not self.needs.committed:
            raise UserError(
                f"data.max_committed: the task {self.task!r} has no place for committed actions"
            )
        if self.advantage and not self.needs.advantage:
            raise UserError(f"data.advantage: the task {self.task!r} has no place for it")
        if self.question_first and not self.needs.question:
            raise UserError(f"data.question_first: the task {self.task!r} asks no question")
        if self.wordless and not self.needs.wordless:
            raise UserError(f"data.wordless: the task {self.task!r} needs its instruction")
        if self.views_together and not self.needs.frame_spacing:
            raise UserError(
                f"data.views_together: a choice of world models, not of the task {self.task!r}"
            )
        if self.packing and self.needs.own_row:
            raise UserError(
                f"data.packing: the task {self.task!r} takes one sample per batch element; set "
                "packing=False"
            )

    def _check_weights(self) -> None:
        if self.weights and len(self.weights) != len(self.stores):
            raise UserError(
                f"data.weights: {len(self.weights)} weights for {len(self.stores)} stores; give "
                "one per store, or none for their corpora's own"
            )
        for store, weight in zip(self.stores, self.weights):
            if not weight > 0:
                raise UserError(
                    f"data.weights: {weight} for {store!r}; weights are positive: leave the store "
                    "out of data.stores to skip it"
                )


def find_store(name: str, folders: Sequence[str], field: str = "data.stores") -> str:
    """The folder among ``folders`` that ``name`` means, else ``name`` itself.

    Raises:
      UserError: it may be two of them; the message names them as ``field``.
    """
    found = [s for s in folders if s == name or pathlib.PurePath(s).name == name]
    if len(found) > 1:
        raise UserError(f"{field}: {name!r} may be {found[0]} or {found[1]}; name the folder")
    return found[0] if found else name


def _check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        names = ", ".join(repr(k) for k in known)
        raise UserError(f"data.{name}: {value!r} is not one of {names}")


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"data.{name}: {value}, expected at least {least}")
