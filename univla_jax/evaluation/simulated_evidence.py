"""Evidence from a simulator: recorded actions executed in it, its pictures, words and roll-outs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from univla_jax.episode import ActionChunk, Episode, Observation
from univla_jax.evaluation import conventions
from univla_jax.evaluation.conventions import Change, ChangedSimulator
from univla_jax.evaluation.diagnosed_setup import SIMULATOR, Finding, Setup
from univla_jax.evaluation.recorded_evidence import dark_views
from univla_jax.evaluation.report import proportion
from univla_jax.evaluation.runner import Actor, BenchmarkRunner, RunnerConfig
from univla_jax.inference.execution import Execution, Executor
from univla_jax.inference.policy import Policy
from univla_jax.simulators import Trial

_CLOSER, _DIFFERS = 0.6, 0.02  # pictures: factor that counts, and share of the gray levels
_REPLAYED, _MORE = 0.7, 0.3  # replays that are enough; how many more a change must bring
_WAITS = (3, 5, 10)


class _Replay:
    """Acts as recorded, and keeps the first observation of every episode."""

    def __init__(self, episodes: Sequence[Episode]) -> None:
        self._episodes = episodes
        self.first: dict[int, Observation] = {}

    def start(self, seed: int = 0) -> dict[str, int]:
        return {"episode": seed, "calls": 0}

    def act(
        self, observations: Sequence[Observation], sessions: Sequence[Any]
    ) -> list[ActionChunk]:
        chunks = []
        for observation, session in zip(observations, sessions, strict=True):
            actions = np.asarray(self._episodes[session["episode"]].actions, np.float32)
            self.first.setdefault(session["episode"], observation)
            still = np.zeros_like(actions[-1:])
            still[:, -1] = actions[-1, -1]
            chunks.append(ActionChunk(still if session["calls"] else actions))
            session["calls"] += 1
        return chunks


class _Shown:
    """A policy, executed as the benchmark says, that keeps every episode's first observation."""

    def __init__(self, policy: Policy, execute: int) -> None:
        self._actor: Any = policy
        if 0 < execute < policy.chunk_size:
            self._actor = Executor(policy, Execution("receding", steps=execute))
        self.first: list[Observation] = []
        self._begun: list[Any] = []  # sessions not asked about yet

    def start(self, seed: int = 0) -> Any:
        self._begun.append(self._actor.start(seed))
        return self._begun[-1]

    def act(
        self, observations: Sequence[Observation], sessions: Sequence[Any]
    ) -> list[ActionChunk]:
        for observation, session in zip(observations, sessions, strict=True):
            if any(session is other for other in self._begun):
                self.first.append(observation)
        self._begun = [s for s in self._begun if all(s is not other for other in sessions)]
        return self._actor.act(observations, sessions)


def explain_in_simulator(
    setup: Setup,
    fitting: Callable[[Episode], Episode],
    findings: list[Finding],
    out: epath.Path,
) -> dict[str, Any]:
    """Replays, pictures, words and roll-outs; adds what is found."""
    benchmark, policies = setup.benchmark, setup.policies
    runs: dict[str, Any] = {}

    def run(
        name: str, actor: Actor, changes: Sequence[Change] = (), starts: Sequence[Episode] = ()
    ) -> float:
        trials = tuple(Trial(0, i) for i in range(len(starts))) or benchmark.trials
        made = ChangedSimulator(benchmark.make, tuple(changes), tuple(starts), benchmark.action_dim)
        seed = (lambda trial: trial.trial) if starts else benchmark.seed
        limited = dataclasses.replace(
            benchmark,
            trials=trials[: len(starts) or setup.rollouts],
            make=made,
            seed=seed,
            execute=0 if starts else benchmark.execute,
        )
        folder = out / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        config = RunnerConfig(
            len(limited.trials) if benchmark.in_process else 1,
            videos=0,
            progress=False,
            simulator_python=setup.simulator_python,
        )
        with BenchmarkRunner(limited, folder, config) as runner:
            runner.run(name, actor, videos=False)
            records = [r for r in runner.episodes.lines if r["condition"] == name]
        runs[name] = proportion(r["success"] for r in records)
        return runs[name]["rate"]

    # Recorded actions, executed from where they began, need no policy: where they fail, data and
    # simulator disagree, and where they succeed, what is left is between policy and simulator. They
    # are replayed as recorded and as the policy would have to see them; the better tells which of
    # data and checkpoint is right.
    starts = setup.episodes if benchmark.restorable else ()
    shown = _Shown(policies.make(), benchmark.execute)
    success = run("roll-outs", shown)
    observed = shown.first
    expected = [fitting(e) for e in setup.episodes]
    if starts:
        replay = _Replay(starts)
        rate = run("replayed as recorded", replay, starts=starts)
        observed = [replay.first[i] for i in range(len(starts))]
        fitted = _Replay(expected)
        if any(e.actions is not s.actions for e, s in zip(expected, starts)):
            changed = run("replayed as the policy expects", fitted, starts=starts)
            _place_of_actions(findings, rate, changed)
            rate = max(rate, changed)
            replay = fitted if changed >= rate else replay
        if rate < _REPLAYED:
            finding = _replay_changes(setup, run, replay._episodes, rate)
            findings += [finding] if finding else []
    findings += _seen_in_simulator(setup, expected, observed, paired=bool(starts))
    fix = next((f.change for f in findings if f.where == SIMULATOR and f.change), None)
    if fix is not None:
        run(f"roll-outs with {fix.what}", _Shown(policies.make(), benchmark.execute), [fix])
    return {"runs": runs, "success": success}


def _place_of_actions(findings: list[Finding], recorded: float, changed: float) -> None:
    """Says in the finding whether the data or the checkpoint is wrong, by what succeeds."""
    for i, finding in enumerate(findings):
        if finding.change is not None and finding.change.actions and recorded != changed:
            side = "the data" if changed > recorded else "the checkpoint"
            saw = f"{finding.saw}; the simulator agrees with the other: {side} is wrong"
            field = finding.field if changed > recorded else "assets.statistics, action tokenizer"
            findings[i] = dataclasses.replace(finding, saw=saw, field=field)


def _replay_changes(
    setup: Setup, run: Callable[..., float], episodes: Sequence[Episode], rate: float
) -> Finding | None:
    """The change of the simulator under which recorded actions succeed again."""
    actions = np.concatenate([e.actions for e in episodes])
    turns = actions.shape[1] == 7 and bool(np.abs(actions[:, 3:6]).max() > 1e-6)
    changes = conventions.action_changes(actions.shape[1], turns=turns)
    displacements = tuple(setup.policies.make().absolute_dims) == (actions.shape[1] - 1,)
    changes += [conventions.waiting(steps) for steps in _WAITS] if displacements else []
    changes.append(dataclasses.replace(conventions.MERGED, what="every action executed twice"))
    best, most = None, rate + _MORE
    for change in changes:
        found = run(f"replayed, {change.what}", _Replay(episodes), [change], setup.episodes)
        if found > most:
            best, most = change, found
    if best is None:
        return None
    saw = f"recorded actions succeed in {100 * rate:.0f} %, in {100 * most:.0f} % with {best.what}"
    return Finding(best.convention, SIMULATOR, saw, most - rate, best.field[1], best)


def _seen_in_simulator(
    setup: Setup, expected: Sequence[Episode], observed: Sequence[Observation], *, paired: bool
) -> list[Finding]:
    """What rate, pictures and words of the simulator say beside the recorded ones."""
    found, benchmark = [], setup.benchmark
    trained = getattr(setup.policies.loaded.record.corpora[setup.policies.corpus], "control_hz", 0)
    rate = benchmark.protocol.get("control_hz", trained)
    if trained and abs(rate / trained - 1) > 0.02:
        saw = f"{benchmark.name} steps at {rate:g} Hz, the checkpoint was trained at {trained:g} Hz"
        found.append(Finding("control rate", SIMULATOR, saw, 1.0, "the benchmark's control_hz"))
    dark = dark_views(o.frames for o in observed)
    if dark:
        saw = f"no value above 1 in {', '.join(dark)}: frames of 0...1 were cast to uint8"
        found.append(Finding("dtype", SIMULATOR, saw, 1.0, "the benchmark's frames: 0...255"))
    elif (pictures := _pictures(setup, expected, observed, paired=paired)) is not None:
        found.append(pictures)
    styles = [
        {conventions.plain_words(text) == text for text in texts}
        for texts in ([e.instruction for e in expected], [o.instruction for o in observed])
    ]
    if False in styles[1] and False not in styles[0]:
        saw = f"recorded: {expected[0].instruction!r}, simulator: {observed[0].instruction!r}"
        change = conventions.WORDS
        found.append(Finding("prompt", SIMULATOR, saw, 1.0, change.field[1], change))
    return found


def _pictures(
    setup: Setup, expected: Sequence[Episode], observed: Sequence[Observation], *, paired: bool
) -> Finding | None:
    """The change of the simulator's frames that brings them much nearer to the recorded ones."""
    views = setup.policies.make().views
    recorded = [{v: e.frames[v][0] for v in views} for e in expected]
    seen = [{v: o.frames[v] for v in views} for o in observed]
    draws = np.random.default_rng(0).integers(len(seen), size=(100, len(seen)))

    def distances(change: Change | None) -> np.ndarray:
        """Of every draw and of all, mean over views and pixels, of 1."""
        shown = [change.frames(frames) if change else frames for frames in seen]
        total = np.zeros(len(draws) + 1)
        for view in views:
            ours = np.stack([conventions.small(frames[view]) for frames in shown])
            theirs = np.stack([conventions.small(frames[view]) for frames in recorded])
            if paired:
                apart = np.abs(ours - theirs).mean((1, 2, 3))
                total += np.append(apart[draws].mean(1), apart.mean())
            else:  # of the mean pictures, which the scenes' differences leave
                means = np.append(ours[draws].mean(1), ours.mean(0)[None], 0)
                total += np.abs(means - theirs.mean(0)).mean((1, 2, 3))
        return total / len(views) / 255

    before = distances(None)
    if before[-1] < _DIFFERS:
        return None
    after = {i: distances(c) for i, c in enumerate(conventions.frame_changes(views))}
    best = min(after, key=lambda i: after[i][-1])
    change, apart = conventions.frame_changes(views)[best], after[best]
    if apart[-1] > _CLOSER * before[-1]:
        return None
    sure = float(np.mean(apart[:-1] < before[:-1]))
    saw = f"frames differ from the recorded ones by {before[-1]:.3f} of the range, "
    saw += f"by {apart[-1]:.3f} with {change.what}"
    return Finding(change.convention, SIMULATOR, saw, sure, change.field[1], change)
