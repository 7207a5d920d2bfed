"""Runs the episodes of a benchmark: many simulators, one policy that answers all in one batch.

::

    out/
      episodes.jsonl    one line per finished episode, written at once
      calls.jsonl       wall time of every call to the policy
      times.jsonl       seconds inside the simulator per episode, and of whole runs
      videos/           <condition>_<task>_<trial>_<success or failure>.gif
      recorded/         steps of the episodes, where they are to be learned from (``rollouts.py``)
      workers/          what each simulator in a process of its own printed

Episodes do not depend on each other nor on which worker runs them, so the records of a run that
was killed and resumed equal those of an uninterrupted one.
"""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing.connection
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import tqdm
from etils import epath

from univla_jax.episode import ActionChunk, Observation
from univla_jax.errors import UserError
from univla_jax.evaluation.rollouts import RECORDED
from univla_jax.evaluation.worker import InProcessWorker, Message, ProcessWorker
from univla_jax.inference.policy import no_motion
from univla_jax.io import JsonlWriter, is_remote
from univla_jax.simulators import Benchmark, Simulator, Trial

EPISODES, CALLS, TIMES = "episodes.jsonl", "calls.jsonl", "times.jsonl"
VIDEOS, _LOGS = "videos", "workers"
_FORMER_KEYS = {
    "family": "task",
    "steered": "num_overridden",
    "told": "given_instruction",
    "told_success": "given_task_success",
}
_ATTEMPTS = 2  # of an episode whose worker crashes or hangs


class Actor(Protocol):
    """What acts: a trained policy or a baseline."""

    def start(self, seed: int = 0) -> Any:
        """The session of a new episode; ``seed`` fixes whatever is drawn at random in it."""
        ...

    def act(
        self, observations: Sequence[Observation], sessions: Sequence[Any]
    ) -> list[ActionChunk]:
        """The next chunk of every episode."""
        ...


class PolicyLost(Exception):
    """The policy lost its sessions, for example because its server was restarted."""


@dataclasses.dataclass(frozen=True)
class RunnerConfig:
    """How a benchmark is run; nothing here changes a record.

    Attributes:
      workers: simulators at once, and so the most episodes in a call to the policy.
      hang_seconds: a simulator silent for so long is restarted.
      videos: episodes of each task that are recorded.
      progress: whether to draw a progress bar on standard error.
      record: whether the steps of all episodes are recorded.
      simulator_python: interpreter of the simulators' processes; this one by default.
    """

    workers: int = 1
    hang_seconds: float = 600.0
    videos: int = 1
    progress: bool = True
    record: bool = False
    simulator_python: str = ""

    def __post_init__(self) -> None:
        """Raises UserError for a number out of range."""
        if self.workers < 1 or self.hang_seconds <= 0 or self.videos < 0:
            raise UserError(
                f"--workers {self.workers} must be at least 1, --hang_seconds {self.hang_seconds} "
                f"above 0, --videos {self.videos} not negative"
            )
        if self.simulator_python and not shutil.which(self.simulator_python):
            raise UserError(f"--simulator_python: {self.simulator_python!r} is no interpreter")


@dataclasses.dataclass
class WorkerSlot:
    """One simulator and the episode it runs.

    Attributes:
      worker: the simulator.
      number: of the slot.
      since: monotonic time of the last message to the worker.
      trial: the episode; None while there is none.
      video: where its video goes, less outcome and suffix.
      recording: where its steps go, less part and suffix.
      session: of the policy.
      earlier: what earlier sessions of the episode say of themselves.
      observation: that waits for an action; None while the worker computes.
      last_action: float [A], the last of the chunk before.
      counts: chunks, those the grammar overruled, and those that did not decode.
      invalid_reason: of the first that did not decode.
      retired: its simulator could not be started.
    """

    worker: InProcessWorker | ProcessWorker
    number: int
    since: float = 0.0
    trial: Trial | None = None
    video: epath.Path | None = None
    recording: epath.Path | None = None
    session: Any = None
    earlier: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    observation: Observation | None = None
    last_action: np.ndarray | None = None
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    invalid_reason: str = ""
    retired: bool = False

    def begin(self, trial: Trial, video: epath.Path | None, recording: epath.Path | None) -> None:
        """Resets the simulator to an episode."""
        self.close_session()
        self.trial, self.video, self.recording, self.earlier = trial, video, recording, []
        self.observation, self.last_action = None, None
        self.counts, self.invalid_reason = collections.Counter(), ""
        self.since = time.monotonic()
        self.worker.reset(trial, video, recording)

    def act(self, chunk: ActionChunk, execute: int, *, whole: bool = False) -> None:
        """Executes the first ``execute`` actions of a chunk, all of them if it is 0.

        ``whole`` gives the chunk to the simulator as one step.
        """
        self.counts["chunks"] += 1
        self.counts["num_overridden"] += chunk.num_overridden > 0
        if not chunk.valid:
            self.counts["invalid"] += 1
            self.invalid_reason = self.invalid_reason or chunk.reason
        actions = chunk.actions[None] if whole else chunk.actions[: execute or None]
        self.last_action, self.observation = (chunk.actions if whole else actions)[-1], None
        self.since = time.monotonic()
        self.worker.act(actions)

    def start_session(self, session: Any) -> None:
        """Begins without history: a new episode, or the next task of this one."""
        if self.counts["chunks"] and hasattr(self.session, "record"):
            self.earlier.append(self.session.record())
        self.close_session()
        self.session, self.last_action = session, None

    def close_session(self) -> None:
        """Ends the session; one that holds a connection closes it."""
        if hasattr(self.session, "close"):
            self.session.close()
        self.session = None

    def chunk_counts(self) -> dict[str, Any]:
        """What the policy answered in this episode, for its record; a session may know more."""
        counts = {name: self.counts[name] for name in ("chunks", "num_overridden", "invalid")}
        own: dict[str, Any] = {}
        if hasattr(self.session, "record"):
            records = [*self.earlier, self.session.record()]
            own = {name: np.sum([r[name] for r in records], axis=0).tolist() for name in records[0]}
        return {**counts, **own, "invalid_reason": self.invalid_reason}


class BenchmarkRunner:
    """Runs the missing episodes of a benchmark, one condition at a time; a context manager.

    Attributes:
      episodes: records, one per finished episode.
      calls: to the policy.
      times: seconds of episodes inside the simulator, and of whole runs.
      versions: of simulator and renderer, once a worker is ready.
    """

    def __init__(self, benchmark: Benchmark, out: epath.Path, config: RunnerConfig) -> None:
        """Opens the logs in ``out``, which must exist."""
        self._benchmark, self._out, self._config = benchmark, out, config
        self.versions: dict[str, str] = {}
        (out / VIDEOS).mkdir(parents=True, exist_ok=True)
        # What simulators print goes straight to a file, which a bucket does not have.
        local = tempfile.mkdtemp(prefix="univla_jax_") if is_remote(out) else out
        self._logs = pathlib.Path(local, _LOGS)
        self._logs.mkdir(exist_ok=True)
        self.episodes, self.calls, self.times = (
            JsonlWriter(out / name) for name in (EPISODES, CALLS, TIMES)
        )
        self.episodes.lines[:] = [self._renamed(line) for line in self.episodes.lines]

    def __enter__(self) -> BenchmarkRunner:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the logs."""
        for log in (self.episodes, self.calls, self.times):
            log.close()

    def missing(self, condition: str) -> list[Trial]:
        """The trials without a record, in the benchmark's order."""
        done = {
            Trial(line["number"], line["trial"])
            for line in self.episodes.lines
            if line["condition"] == condition
        }
        return [trial for trial in self._benchmark.trials if trial not in done]

    def run(
        self,
        condition: str,
        actor: Actor,
        make: Callable[[], Simulator] | None = None,
        *,
        videos: bool = True,
    ) -> None:
        """Runs what is missing of a condition.

        Args:
          condition: name in the records.
          actor: acts in all episodes.
          make: makes a simulator; the benchmark's by default.
          videos: whether to record any.

        Raises:
          UserError: a simulator cannot start, or the policy's server stays away; finished
            episodes are kept and the next run goes on.
        """
        self._condition, self._actor, self._videos = condition, actor, videos
        self._make = make or self._benchmark.make
        missing, total = self.missing(condition), len(self._benchmark.trials)
        self._waiting = collections.deque(missing)
        self._failures: collections.Counter[Trial] = collections.Counter()
        self._slots: list[WorkerSlot] = []
        hidden, done = not self._config.progress, total - len(missing)
        begin, before = time.perf_counter(), len(self.episodes.lines)
        with tqdm.tqdm(
            total=total, initial=done, desc=condition, unit="episode", disable=hidden
        ) as self._bar:
            try:
                for number in range(min(self._config.workers, len(missing))):
                    self._slots.append(WorkerSlot(self._start_worker(number), number))
                self._loop()
            finally:
                for slot in self._slots:
                    slot.close_session()
                    slot.worker.stop()
                self._record_run(time.perf_counter() - begin, len(self.episodes.lines) - before)

    def _renamed(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record with today's names, where an older version wrote it."""
        if "condition" not in record:
            raise UserError(f"{self._out} was begun by an older version; use another --out")
        record = {_FORMER_KEYS.get(key, key): value for key, value in record.items()}
        if "episode" in record:  # the tabletop's number of the episode over all tasks
            trial = self._benchmark.trials[record.pop("episode")]
            record |= {"number": trial.task, "trial": trial.trial}
        return record

    def _start_worker(self, number: int) -> InProcessWorker | ProcessWorker:
        if self._benchmark.in_process:
            return InProcessWorker(self._make, self._benchmark.video_every)
        log = self._logs / f"{number}.log"
        python = self._config.simulator_python
        return ProcessWorker(self._make, self._benchmark.video_every, log, python)

    def _loop(self) -> None:
        """Receives from the workers, and answers all that wait in one call to the policy."""
        for slot in self._slots:
            slot.since = time.monotonic()
        # A slot is in one of three states: its worker computes (``observation`` is None), its
        # episode waits for an action, or it has no episode and is removed. Each round moves all
        # slots that can be moved without waiting for the slowest worker.
        while self._slots:
            for slot in self._ready([slot for slot in self._slots if slot.observation is None]):
                self._receive(slot, slot.worker.receive())
            self._restart_hanging()
            self._slots = [slot for slot in self._slots if not self._finished(slot)]
            waiting = [slot for slot in self._slots if slot.observation is not None]
            # A call costs about the same for one episode as for all, so it is made once no worker
            # executes a chunk any more. Those that start a process or reset a simulator would
            # keep the others waiting for too long; in this process they are ready by the next
            # round.
            absent = [slot for slot in self._slots if slot.observation is None]
            executing = [s for s in absent if s.counts["chunks"] or self._benchmark.in_process]
            if waiting and not executing:
                self._query(waiting)

    def _ready(self, slots: Sequence[WorkerSlot]) -> list[WorkerSlot]:
        """Those with a message: all in this process, or what comes within a second."""
        if self._benchmark.in_process:
            return list(slots)
        connections = {slot.worker.connection: slot for slot in slots}
        ready = multiprocessing.connection.wait(list(connections), timeout=1.0)
        return [connections[connection] for connection in ready]

    def _receive(self, slot: WorkerSlot, message: Message) -> None:
        match message:
            case "ready", versions:
                self.versions = versions
                self._assign(slot)
            case "observation", observation, starts:
                slot.observation = observation
                if starts:
                    slot.start_session(self._actor.start(self._benchmark.seed(slot.trial)))
            case "end", result, seconds:
                self._record_episode(slot, result)
                self.times.append(
                    {
                        "condition": self._condition,
                        "episode_seconds": round(seconds, 3),
                        "steps": result["steps"],
                    }
                )
                self._assign(slot)
            case "crash", how:
                self._restart(slot, how.strip().splitlines()[-1])
            case "user_error", text:
                raise UserError(text)

    def _record_episode(self, slot: WorkerSlot, result: dict[str, Any]) -> None:
        where = {"number": slot.trial.task, "trial": slot.trial.trial}
        record = {"condition": self._condition, **where, **result, **slot.chunk_counts()}
        self.episodes.append(record)
        self._bar.update()

    def _assign(self, slot: WorkerSlot) -> None:
        """Gives a worker its next episode, or none."""
        slot.close_session()
        slot.trial = None
        if self._waiting:
            trial = self._waiting.popleft()
            recorded = self._videos and trial.trial < self._config.videos
            name = f"{self._condition}_{trial.task:03d}_{trial.trial:02d}"
            video = self._out / VIDEOS / name if recorded else None
            slot.begin(trial, video, self._out / RECORDED / name if self._config.record else None)

    def _finished(self, slot: WorkerSlot) -> bool:
        """Whether a slot has nothing left to do; its worker is ended then."""
        finished = slot.retired or (slot.trial is None and not self._waiting)
        if finished:
            slot.worker.stop()
        return finished

    def _restart_hanging(self) -> None:
        now, limit = time.monotonic(), self._config.hang_seconds
        for slot in self._slots:
            if slot.observation is None and now - slot.since > limit:
                self._restart(slot, f"silent for {limit:g} s")

    def _restart(self, slot: WorkerSlot, error: str) -> None:
        """Restarts a worker; its episode is repeated once, then recorded as failed."""
        slot.worker.stop()
        if slot.trial is None:
            # One that does not start, for example for want of memory, costs its seat. The others go
            # on, unless there is none.
            slot.retired = True
            if all(other.retired for other in self._slots):
                raise UserError(f"the simulator does not start: {error}; see {slot.worker.log}")
            return
        self._failures[slot.trial] += 1
        # Crashes of physics engines and renderers are rarely repeatable, so the episode is tried
        # again before it counts as failed. It goes first: its task is likely the loaded one.
        if self._failures[slot.trial] < _ATTEMPTS:
            self._waiting.appendleft(slot.trial)
        else:
            lost = {"task": str(slot.trial.task), "success": False, "steps": 0, "error": error}
            self._record_episode(slot, lost)
        slot.worker, slot.trial = self._start_worker(slot.number), None
        slot.counts = collections.Counter()
        slot.observation, slot.since = None, time.monotonic()

    def _query(self, slots: Sequence[WorkerSlot]) -> None:
        """One call to the policy for the episodes of ``slots``, which all wait for it."""
        begin = time.perf_counter()
        try:
            chunks = self._actor.act(
                [slot.observation for slot in slots], [slot.session for slot in slots]
            )
        except PolicyLost:
            # The history of these episodes is gone, so no record would be that of the policy: they
            # begin anew. Those whose workers compute keep their sessions, or get here later.
            for slot in slots:
                slot.begin(slot.trial, slot.video, slot.recording)
            return
        seconds = time.perf_counter() - begin
        rows = getattr(self._actor, "rows", len(slots))  # an actor may have asked nobody
        if rows:
            self.calls.append({"condition": self._condition, "rows": rows, "seconds": seconds})
        for slot, chunk in zip(slots, chunks, strict=True):
            checked = sanitize_chunk(chunk, self._benchmark.action_dim, slot.last_action)
            slot.act(checked, self._benchmark.execute, whole=self._benchmark.whole_chunks)

    def _record_run(self, seconds: float, episodes: int) -> None:
        if episodes:
            run = {"condition": self._condition, "run_seconds": round(seconds, 3)}
            workers = 1 if self._benchmark.in_process else self._config.workers
            self.times.append({**run, "episodes": episodes, "workers": workers})


def sanitize_chunk(
    chunk: ActionChunk, action_dim: int, last_action: np.ndarray | None
) -> ActionChunk:
    """The chunk itself, or no motion, marked as not valid, where it cannot be executed.

    Args:
      chunk: the policy's answer.
      action_dim: dimensions A the simulator takes.
      last_action: [A] executed before; its gripper is kept. None at the start.
    """
    actions = np.asarray(chunk.actions)
    if actions.ndim != 2 or actions.shape[1] != action_dim or not len(actions):
        reason = f"chunk of shape {list(actions.shape)}, expected [steps, {action_dim}]"
    elif not np.isfinite(actions).all():
        reason = "chunk with values that are not finite"
    else:
        return chunk
    steps = max(1, len(actions)) if actions.ndim else 1
    return ActionChunk(no_motion(steps, action_dim, last_action), valid=False, reason=reason)
