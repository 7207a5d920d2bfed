"""Many episodes of a benchmark: simulators in worker processes, one policy that answers in batches.

::

    out/
      campaign.json     protocol and policy; fixed when the campaign is begun
      episodes.jsonl    one line per finished episode, written at once
      calls.jsonl       wall time of every call to the policy
      times.jsonl       seconds inside the simulator per episode, and of whole runs
      videos/            <task>_<trial>_<success or failure>.gif
      workers/          what each simulator printed
      report.json       written last

Episodes do not depend on each other nor on which worker runs them, so the records of a campaign
that was killed and gone on with equal those of an uninterrupted one.
"""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing.connection
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import tqdm

from univla_jax.episode import ActionChunk, Observation
from univla_jax.errors import UserError
from univla_jax.evaluation.worker import Worker
from univla_jax.inference.policy import no_motion
from univla_jax.io import JsonlWriter
from univla_jax.simulators.base import Benchmark, Trial

# ----------------------------------------------------------------------------
# Many episodes stepped together against one policy that answers them in one batch.
#
# Each chunk is executed open loop, then every episode that still runs is observed and the policy is
# asked once for all of them.


class Actor(Protocol):
    """What acts: a trained policy or a baseline."""

    def start(self, seed: int = 0) -> Any:
        """The memory of a new episode; ``seed`` fixes whatever is drawn at random in it."""
        ...

    def act(
        self, observations: Sequence[Observation], sessions: Sequence[Any]
    ) -> list[ActionChunk]:
        """The next chunk of every episode."""
        ...


class Simulated(Protocol):
    """One episode of a benchmark."""

    @property
    def seed(self) -> int:
        """What fixes its scene and task."""
        ...

    def observe(self) -> Observation:
        """What the policy sees now."""
        ...

    def step(self, action: np.ndarray) -> bool:
        """Executes one action float [A], in physical units; returns whether the episode ended."""
        ...

    def result(self) -> dict[str, Any]:
        """Task and outcome as JSON values, ``success`` among them."""
        ...


@dataclasses.dataclass(frozen=True)
class PolicyCall:
    """One question to the policy: how many episodes it was for, and how long it took."""

    rows: int
    seconds: float


@dataclasses.dataclass
class _Run:
    """The state of one episode on its way."""

    index: int
    episode: Simulated
    session: Any
    chunks: int = 0
    num_overridden: int = 0
    invalid: int = 0
    invalid_reason: str = ""

    def execute(self, chunk: ActionChunk, steps: int, watch: Watch | None) -> bool:
        """Executes the first ``steps`` actions; returns whether the episode ended."""
        self.chunks += 1
        self.num_overridden += chunk.num_overridden > 0
        if not chunk.valid:
            self.invalid += 1
            self.invalid_reason = self.invalid_reason or chunk.reason
        for action in chunk.actions[:steps]:
            ended = self.episode.step(action)
            if watch is not None:
                watch(self.index, self.episode)
            if ended:
                return True
        return False

    def record(self) -> dict[str, Any]:
        """What is written about the episode."""
        names = ("chunks", "num_overridden", "invalid", "invalid_reason")
        counts = {name: getattr(self, name) for name in names}
        return {**self.episode.result(), **counts}


Watch = Callable[[int, Simulated], None]


def rollout(
    actor: Actor,
    episodes: Sequence[Simulated],
    *,
    execute: int | None = None,
    on_call: Callable[[PolicyCall], None] | None = None,
    watch: Watch | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Runs episodes to their ends.

    The order of calls depends on the episodes alone, so the same ones give the same records.

    Args:
      actor: acts in all of them.
      episodes: freshly reset.
      execute: steps executed of each chunk; all by default.
      on_call: told of every call to the actor.
      watch: shown every episode at its start and after each step.

    Yields:
      (position in ``episodes``, record) as each ends; the record is the episode's result with
      ``chunks``, ``num_overridden`` (chunks whose grammar overruled the model), ``invalid`` (that
      did not decode, replaced by no motion) and ``invalid_reason`` (of the first).
    """
    active = [_Run(i, e, actor.start(e.seed)) for i, e in enumerate(episodes)]
    for run in active if watch else ():
        watch(run.index, run.episode)
    while active:
        observations = [run.episode.observe() for run in active]
        begin = time.perf_counter()
        chunks = actor.act(observations, [run.session for run in active])
        if on_call is not None:
            on_call(PolicyCall(len(active), time.perf_counter() - begin))
        running = []
        for run, chunk in zip(active, chunks, strict=True):
            if run.execute(chunk, execute or len(chunk.actions), watch):
                yield run.index, run.record()
            else:
                running.append(run)
        active = running


# ----------------------------------------------------------------------------


EPISODES, CALLS, TIMES = "episodes.jsonl", "calls.jsonl", "times.jsonl"
_ATTEMPTS = 2  # of an episode whose worker crashes or hangs


class PolicyLost(Exception):
    """The policy forgot its sessions, for example because its server went away and came back."""


@dataclasses.dataclass(frozen=True)
class RunnerConfig:
    """How a campaign is run; nothing here changes a record.

    Attributes:
      workers: simulators at once.
      hang_seconds: a simulator silent for so long is started anew.
      videos: episodes of each task that are with_video.
      progress: whether to draw a progress bar on standard error.
    """

    workers: int = 1
    hang_seconds: float = 600.0
    videos: int = 1
    progress: bool = True

    def __post_init__(self) -> None:
        """Raises UserError for a number out of range."""
        if self.workers < 1 or self.hang_seconds <= 0 or self.videos < 0:
            raise UserError(
                f"--workers {self.workers} must be at least 1, --hang_seconds {self.hang_seconds} "
                f"above 0, --videos {self.videos} not negative"
            )


@dataclasses.dataclass
class _WorkerSlot:
    """One worker and the episode it runs."""

    number: int
    worker: Worker
    since: float = 0.0
    job: Trial | None = None
    session: Any = None
    seen: Observation | None = None
    last_action: np.ndarray | None = None
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    reason: str = ""

    def begin(self, job: Trial, video: pathlib.Path | None) -> None:
        self.forget()
        self.job, self.seen, self.last_action = job, None, None
        self.counts, self.reason, self.since = collections.Counter(), "", time.monotonic()
        self.worker.reset(job, video)

    def act(self, chunk: ActionChunk, execute: int) -> None:
        self.counts["chunks"] += 1
        self.counts["num_overridden"] += chunk.num_overridden > 0
        if not chunk.valid:
            self.counts["invalid"] += 1
            self.reason = self.reason or chunk.reason
        actions = chunk.actions[: execute or None]
        self.last_action, self.seen, self.since = actions[-1], None, time.monotonic()
        self.worker.act(actions)

    def forget(self) -> None:
        """Ends the session; one that holds a connection closes it."""
        if hasattr(self.session, "close"):
            self.session.close()
        self.session = None

    def record(self) -> dict[str, Any]:
        counts = {name: self.counts[name] for name in ("chunks", "num_overridden", "invalid")}
        return {**counts, "invalid_reason": self.reason}


class BenchmarkRunner:
    """The missing episodes of a benchmark, run to the end.

    Attributes:
      versions: of simulator and renderer, once a worker is ready.
    """

    def __init__(
        self, benchmark: Benchmark, actor: Actor, out: pathlib.Path, effort: RunnerConfig
    ) -> None:
        """Opens the journals in ``out``, which must exist."""
        self._benchmark, self._actor, self._out, self._effort = benchmark, actor, out, effort
        self.versions: dict[str, str] = {}
        for name in ("videos", "workers"):
            (out / name).mkdir(exist_ok=True)

    def run(self) -> None:
        """Runs what is missing.

        Raises:
          UserError: a simulator cannot start, or the policy's server stays away; finished
            episodes are kept and the next run goes on.
        """
        names = (EPISODES, CALLS, TIMES)
        self._episodes, self._calls, self._times = (JsonlWriter(self._out / name) for name in names)
        done = {Trial(line["number"], line["trial"]) for line in self._episodes.lines}
        jobs = self._benchmark.jobs
        self._waiting = collections.deque(job for job in jobs if job not in done)
        self._failures: collections.Counter[Trial] = collections.Counter()
        count = min(self._effort.workers, len(self._waiting))
        self._seats = [_WorkerSlot(n, self._start(n)) for n in range(count)]
        begin, finished = time.perf_counter(), len(self._episodes.lines)
        hidden = not self._effort.progress
        with tqdm.tqdm(total=len(jobs), initial=len(done), unit="episode", disable=hidden) as bar:
            self._bar = bar
            try:
                self._loop()
            finally:
                for seat in self._seats:
                    seat.forget()
                    seat.worker.stop()
                self._note_run(time.perf_counter() - begin, len(self._episodes.lines) - finished)
                for journal in (self._episodes, self._calls, self._times):
                    journal.close()

    def _start(self, number: int) -> Worker:
        return Worker(self._benchmark.make, self._out / "workers" / f"{number}.log")

    def _loop(self) -> None:
        """Listens to the workers, and answers all that wait in one call."""
        for seat in self._seats:
            seat.since = time.monotonic()
        while self._seats:
            busy = {seat.worker.connection: seat for seat in self._seats if seat.seen is None}
            for connection in multiprocessing.connection.wait(list(busy), timeout=1.0):
                self._hear(busy[connection], busy[connection].worker.receive())
            self._end_hanging()
            self._seats = [seat for seat in self._seats if not self._idle(seat)]
            if all(seat.seen is not None for seat in self._seats) or self._patient():
                self._answer([seat for seat in self._seats if seat.seen is not None])

    def _patient(self) -> bool:
        """Whether some episodes wait and the rest are between episodes, which takes longer."""
        slow = [seat for seat in self._seats if seat.seen is None and not seat.counts["chunks"]]
        silent = [seat for seat in self._seats if seat.seen is None]
        return len(silent) == len(slow) < len(self._seats)

    def _hear(self, seat: _WorkerSlot, message: tuple[Any, ...]) -> None:
        kind, *rest = message
        if kind == "mistake":
            raise UserError(rest[0])
        if kind == "crash":
            self._crashed(seat, rest[0])
        elif kind == "ready":
            self.versions = rest[0]
            self._next(seat)
        elif kind == "see":
            seat.seen, fresh = rest
            if fresh:
                seat.forget()
                seat.session, seat.last_action = self._actor.start(seat.job.trial), None
        else:
            self._finished(seat, *rest)

    def _finished(self, seat: _WorkerSlot, result: dict[str, Any], seconds: float) -> None:
        self._write(seat, {**result, **seat.record()})
        self._times.append({"episode_seconds": round(seconds, 3), "steps": result["steps"]})
        self._next(seat)

    def _write(self, seat: _WorkerSlot, record: dict[str, Any]) -> None:
        self._episodes.append({"number": seat.job.task, "trial": seat.job.trial, **record})
        self._bar.update()

    def _next(self, seat: _WorkerSlot) -> None:
        """Gives a worker its next episode, or lets it rest."""
        seat.forget()
        seat.job = None
        if self._waiting:
            job = self._waiting.popleft()
            with_video = job.trial < self._effort.videos
            video = self._out / "videos" / f"{job.task:03d}_{job.trial:02d}" if with_video else None
            seat.begin(job, video)

    def _idle(self, seat: _WorkerSlot) -> bool:
        """Whether a seat has nothing left to do; its worker is ended then."""
        idle = seat.job is None and bool(self.versions) and not self._waiting
        if idle:
            seat.worker.stop()
        return idle

    def _end_hanging(self) -> None:
        now, limit = time.monotonic(), self._effort.hang_seconds
        for seat in self._seats:
            if seat.seen is None and now - seat.since > limit:
                self._crashed(seat, f"silent for {limit:g} s")

    def _crashed(self, seat: _WorkerSlot, how: str) -> None:
        """Starts a worker anew; its episode is repeated once, then reported as failed."""
        seat.worker.stop()
        if seat.job is None:
            raise UserError(
                f"the simulator does not start: {how.strip().splitlines()[-1]}; see "
                f"{seat.worker.log}"
            )
        self._failures[seat.job] += 1
        if self._failures[seat.job] < _ATTEMPTS:
            self._waiting.appendleft(seat.job)
        else:
            error = how.strip().splitlines()[-1]
            lost = {"task": str(seat.job.task), "success": False, "steps": 0, "error": error}
            self._write(seat, {**lost, **seat.record()})
        seat.worker, seat.job = self._start(seat.number), None
        seat.seen, seat.since = None, time.monotonic()

    def _answer(self, seats: Sequence[_WorkerSlot]) -> None:
        if not seats:
            return
        begin = time.perf_counter()
        try:
            chunks = self._actor.act([s.seen for s in seats], [s.session for s in seats])
        except PolicyLost:
            for seat in seats:
                seat.begin(seat.job, None)
            return
        self._calls.append({"rows": len(seats), "seconds": time.perf_counter() - begin})
        for seat, chunk in zip(seats, chunks, strict=True):
            checked = sanitize_chunk(chunk, self._benchmark.action_dim, seat.last_action)
            seat.act(checked, self._benchmark.execute)

    def _note_run(self, seconds: float, episodes: int) -> None:
        if episodes:
            workers = self._effort.workers
            run = {"run_seconds": round(seconds, 3), "episodes": episodes, "workers": workers}
            self._times.append(run)


def sanitize_chunk(
    chunk: ActionChunk, action_dim: int, last_action: np.ndarray | None
) -> ActionChunk:
    """The chunk itself, or no motion, marked as not valid, where it cannot be executed.

    Args:
      chunk: what the policy answered.
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
