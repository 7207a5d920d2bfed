"""An evaluation: every condition over the same episodes, resumable, ending in one report.

::

    out/
      evaluation.json   config and checkpoint; fixed when the evaluation is begun
      episodes.jsonl    one line per finished episode, written at once
      calls.jsonl       wall time of every call to the policy
      rollouts.gif      the first episodes of the first condition
      report.json       written last; its presence means finished

Episodes are run in fixed batches. A batch that a kill cut short is run again whole and only its
missing episodes are written, so the records do not depend on where it was cut.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import platform
from collections.abc import Iterator
from typing import Any

import jax
import tqdm

from univla_jax import __version__, io
from univla_jax.checkpoints import checkpoint_identity, find_checkpoint
from univla_jax.errors import UserError
from univla_jax.evaluation.actors import RandomActions, ZeroActions
from univla_jax.evaluation.report import latency, summarize_episodes
from univla_jax.evaluation.runner import Actor, PolicyCall, Watch, rollout
from univla_jax.evaluation.videos import Clip, write_gif
from univla_jax.inference.policy import Policy
from univla_jax.io import JsonlWriter
from univla_jax.run_dir import check_config, write_config
from univla_jax.simulators.tabletop.tabletop_benchmark import Tabletop, TabletopEpisode

BENCHMARKS = {Tabletop.name: Tabletop}
CONDITIONS = ("policy", "other_instruction", "untrained", "random", "zero")
EPISODES, CALLS, VIDEO_FILE, REPORT = "episodes.jsonl", "calls.jsonl", "rollouts.gif", "report.json"
_IDENTITY = "evaluation.json"
_VIDEO_SIZE = 192


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What is evaluated.

    Attributes:
      benchmark: a key of ``BENCHMARKS``.
      episodes: episodes per condition.
      conditions: of ``CONDITIONS``: the policy; the policy told another object's task
        ("other_instruction", scored on the true one); the same model with random parameters
        ("untrained"); random actions; zero actions.
      batch: episodes stepped together.
      max_steps: steps after which an episode ends.
      execute: actions executed of each chunk; 0 executes all.
      first_seed: place of the first seed in the range kept for evaluation.
      untrained_seed: of the random parameters.
      video_episodes: episodes shown in ``rollouts.gif``.
    """

    benchmark: str = "tabletop"
    episodes: int = 120
    conditions: tuple[str, ...] = ("policy", "other_instruction", "untrained", "random")
    batch: int = 40
    max_steps: int = 40
    execute: int = 0
    first_seed: int = 0
    untrained_seed: int = 0
    video_episodes: int = dataclasses.field(default=6, metadata={"formerly": "film_episodes"})

    def __post_init__(self) -> None:
        """Raises UserError for a value outside its range."""
        if self.benchmark not in BENCHMARKS:
            raise UserError(
                f"config.benchmark: {self.benchmark!r}, expected one of {', '.join(BENCHMARKS)}"
            )
        for name in self.conditions:
            if name not in CONDITIONS:
                raise UserError(
                    f"config.conditions: {name!r}, expected some of {', '.join(CONDITIONS)}"
                )
        if not self.conditions or len(set(self.conditions)) != len(self.conditions):
            raise UserError("config.conditions: name at least one condition, each once")
        least = {"episodes": 1, "batch": 1, "execute": 0, "video_episodes": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"config.{name}: {getattr(self, name)}, expected at least {value}")


def evaluate(
    config: EvaluateConfig,
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs what is missing of an evaluation and writes its report.

    Args:
      config: what to run.
      checkpoint: a checkpoint folder, or the workdir whose newest one is taken.
      out: folder of the evaluation.
      progress: whether to draw a progress bar on standard error.

    Returns:
      the report, also where it was finished already.

    Raises:
      UserError: ``out`` holds another evaluation, or the checkpoint cannot be used.
    """
    folder, out = find_checkpoint(checkpoint), pathlib.Path(out)
    made_with = {"name": _IDENTITY, "extra": {"checkpoint": checkpoint_identity(folder)}}
    if not check_config(out, config, **made_with):
        write_config(out, config, **made_with)
    if finished(out):
        return io.read_json(out / REPORT)
    with JsonlWriter(out / EPISODES) as episodes, JsonlWriter(out / CALLS) as calls:
        study = _Study(config, folder, out, episodes, calls)
        study.run(progress)
        report = study.report()
    io.write_json(out / REPORT, report)
    return report


def finished(out: str | os.PathLike[str]) -> bool:
    """Whether ``out`` holds a finished evaluation."""
    return (pathlib.Path(out) / REPORT).exists()


class _Study:
    """An evaluation under way."""

    def __init__(
        self,
        config: EvaluateConfig,
        checkpoint: pathlib.Path,
        out: pathlib.Path,
        episodes: JsonlWriter,
        calls: JsonlWriter,
    ) -> None:
        self._config, self._checkpoint, self._out = config, checkpoint, out
        self._episodes, self._calls = episodes, calls
        self._benchmark = BENCHMARKS[config.benchmark](
            first_seed=config.first_seed, max_steps=config.max_steps
        )

    def run(self, progress: bool) -> None:
        config = self._config
        done = {(line["condition"], line["episode"]) for line in self._episodes.lines}
        total = config.episodes * len(config.conditions)
        with tqdm.tqdm(total=total, initial=len(done), unit="episode", disable=not progress) as bar:
            for condition in config.conditions:
                bar.set_description(condition)
                for batch in self._batches():
                    missing = [i for i in batch if (condition, i) not in done]
                    video = self._wants_video(condition, batch)
                    if missing or video:
                        self._run_batch(condition, batch, set(missing), video, bar)

    def report(self) -> dict[str, Any]:
        config = self._config
        return {
            "checkpoint": str(self._checkpoint),
            "checkpoint_identity": checkpoint_identity(self._checkpoint),
            "protocol": {
                **self._benchmark.protocol(),
                "episodes_per_condition": config.episodes,
                "episodes_together": config.batch,
                "actions_executed_per_chunk": config.execute or "all",
                "undecodable_chunk": "no motion, gripper as it was, counted",
            },
            "conditions": {name: self._summary(name) for name in config.conditions},
            "versions": {
                "univla_jax": __version__,
                "jax": jax.__version__,
                "python": platform.python_version(),
                "platform": jax.default_backend(),
            },
        }

    def _summary(self, condition: str) -> dict[str, Any]:
        records, calls = (
            [line for line in journal.lines if line["condition"] == condition]
            for journal in (self._episodes, self._calls)
        )
        return {**summarize_episodes(records), "latency": latency(calls)}

    def _batches(self) -> Iterator[range]:
        config = self._config
        for start in range(0, config.episodes, config.batch):
            yield range(start, min(start + config.batch, config.episodes))

    def _wants_video(self, condition: str, batch: range) -> bool:
        first = condition == self._config.conditions[0] and batch.start == 0
        return first and not (self._out / VIDEO_FILE).exists()

    def _run_batch(
        self, condition: str, batch: range, missing: set[int], video: bool, bar: tqdm.tqdm
    ) -> None:
        """Runs one batch and writes its missing episodes, and the video where wanted."""
        clips = _VideoRecorder(self._config.video_episodes)
        records = rollout(
            self._actor(condition),
            [self._episode(condition, index) for index in batch],
            execute=self._config.execute or None,
            on_call=functools.partial(self._note_call, condition),
            watch=clips.watch if video else None,
        )
        for place, record in records:
            index = batch[place]
            clips.end(place, record["success"])
            if index in missing:
                self._episodes.append({"condition": condition, "episode": index, **record})
                bar.update()
        if video:
            clips.write(self._out / VIDEO_FILE)

    def _note_call(self, condition: str, call: PolicyCall) -> None:
        self._calls.append({"condition": condition, **dataclasses.asdict(call)})

    def _episode(self, condition: str, index: int) -> TabletopEpisode:
        other = condition == "other_instruction"
        return self._benchmark.episode(index, other_instruction=other)

    def _actor(self, condition: str) -> Actor:
        if condition in ("policy", "other_instruction"):
            return self._policy
        if condition == "untrained":
            return self._untrained
        statistics, chunk = self._policy.statistics, self._policy.chunk_size
        if condition == "random":
            return RandomActions(statistics, chunk)
        return ZeroActions(statistics.action_dim, chunk)

    @functools.cached_property
    def _policy(self) -> Policy:
        return self._load()

    @functools.cached_property
    def _untrained(self) -> Policy:
        return self._load(untrained=True, seed=self._config.untrained_seed)

    def _load(self, **changes: Any) -> Policy:
        return Policy.load(
            self._checkpoint,
            corpus=self._benchmark.corpus,
            batch_size=self._config.batch,
            **changes,
        )


class _VideoRecorder:
    """Pictures of the first episodes of a batch."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._clips: dict[int, Clip] = {}

    @property
    def watch(self) -> Watch:
        return self._watch

    def end(self, place: int, success: bool) -> None:
        if place in self._clips:
            self._clips[place].success = success

    def write(self, path: pathlib.Path) -> None:
        partial = io.partial_path(path)
        write_gif(partial, [self._clips[i] for i in sorted(self._clips)])
        os.replace(partial, path)

    def _watch(self, place: int, episode: TabletopEpisode) -> None:
        if place < self._count:
            clip = self._clips.setdefault(place, Clip(episode.told))
            clip.frames.append(episode.render(_VIDEO_SIZE))
