"""Latency of a policy: simulators that go on moving for a set time while each answer is computed.

    control step      0  1  2  3  4  5  6  7      latency of 2 steps
    robot             a0 a1 a2 a3 a4 b0 b1 b2     one action per step, from the robot's own queue
    policy                  └─ b ─┘               sees step 3, its answer is there at step 5

The queue is the client's (``client/chunk_queue.py``), as it runs on a robot. ``wait`` asks when all
is executed and stands still meanwhile, ``naive`` asks ahead and changes over to the answer when it
comes, ``realtime`` commits to what is executed meanwhile.

Axes: T steps, A action dimensions.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from univla_jax.client.chunk_queue import ChunkQueue, Execution
from univla_jax.episode import ActionChunk, Observation
from univla_jax.errors import UserError
from univla_jax.inference.policy import Policy, no_motion

EXECUTIONS = ("wait", "naive", "realtime")


class DelayedPolicy:
    """An actor that answers one action per control step; policy calls take a set time.

    Attributes:
      steps: control steps that a call takes.
      rows: episodes for which the policy was called in the last step.
    """

    def __init__(self, policy: Policy, execution: str, seconds: float) -> None:
        """Takes a policy.

        Args:
          policy: which answers.
          execution: one of ``EXECUTIONS``.
          seconds: from an observation to its answer.

        Raises:
          UserError: a latency that the policy cannot bridge.
        """
        rate = policy.loaded.record.corpora[policy.corpus].control_hz
        self.steps = int(np.ceil(round(seconds * rate, 6)))
        self.rows = 0
        self._policy, self._execution = policy, execution
        if execution == "realtime" and max(1, self.steps) > policy.max_committed:
            raise UserError(
                f"--latency: {seconds:g} s are {self.steps} steps at {rate:g} Hz, but the policy "
                f"was trained with at most {policy.max_committed} committed actions; take less, or "
                "train with a larger data.max_committed"
            )
        if self.steps >= policy.chunk_size:
            raise UserError(
                f"--latency: {seconds:g} s are {self.steps} steps at {rate:g} Hz, as long as a "
                f"whole chunk of {policy.chunk_size}; take less"
            )

    def start(self, seed: int = 0) -> DelayedEpisode:
        """The robot of a new episode."""
        ahead = 0 if self._execution == "wait" else self.steps
        execution = Execution(
            ahead_steps=ahead, realtime=self._execution == "realtime", blocking=False
        )
        client = DelayedClient(
            {
                "actions_per_call": self._policy.chunk_size,
                "action_dim": self._policy.statistics.action_dim,
                "absolute_dims": self._policy.absolute_dims,
                "max_committed": self._policy.max_committed,
            }
        )
        return DelayedEpisode(self._policy.start(seed), client, ChunkQueue(client, execution))

    def act(
        self, observations: Sequence[Observation], sessions: Sequence[DelayedEpisode]
    ) -> list[ActionChunk]:
        """The action of this control step in every episode."""
        asking = []
        for observation, episode in zip(observations, sessions):
            if episode.client.answer_if_due():
                episode.answered()
            episode.queue.ask({"observation": observation})
            if episode.client.request is not None:
                asking.append(episode)
        self.rows = len(asking)
        if asking:
            self._answer(asking)
        for episode in sessions:  # without any latency the answer is there at once
            if episode.client.answer_if_due():
                episode.answered()
        return [episode.take(self._policy) for episode in sessions]

    def _answer(self, asking: Sequence[DelayedEpisode]) -> None:
        """One call of the policy for all that ask in this step."""
        observations = []
        for episode in asking:
            request, episode.client.request = episode.client.request, None
            if "executed" in request:
                episode.session.set_executed(request["executed"])
            committed = request.get("committed")
            observations.append(dataclasses.replace(request["observation"], committed=committed))
        chunks = self._policy.act(observations, [episode.session for episode in asking])
        for episode, chunk in zip(asking, chunks):
            episode.client.replies.append((self.steps, chunk))


class DelayedClient:
    """The connection of a robot's queue to a policy whose answers take a number of steps.

    Attributes:
      metadata: what a server says of its policy.
      request: that was sent in this step; None where none was.
      replies: steps left until each answer is there, and the answer.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        """Takes the metadata that ``ChunkQueue`` reads."""
        self.metadata = dict(metadata)
        self.request: dict[str, Any] | None = None
        self.replies: collections.deque[tuple[int, ActionChunk]] = collections.deque()
        self.last: ActionChunk | None = None
        self._future: concurrent.futures.Future[dict[str, Any]] = concurrent.futures.Future()

    def reset(self, episode_id: str | None = None) -> None:
        """Nothing to do: an episode has a client of its own."""

    def infer_async(self, request: Mapping[str, Any]) -> concurrent.futures.Future[dict[str, Any]]:
        """The reply to a request, as a future."""
        self.request, self._future = dict(request), concurrent.futures.Future()
        return self._future

    def answer_if_due(self) -> bool:
        """Hands over the answer whose time has come; whether there was one."""
        if not self.replies or self.replies[0][0] > 0:
            return False
        self.last = self.replies.popleft()[1]
        reply = {"actions": self.last.actions, "actions_valid": self.last.valid}
        self._future.set_result(reply)
        return True

    def tick(self) -> None:
        """A control step goes by."""
        self.replies = collections.deque((left - 1, chunk) for left, chunk in self.replies)


@dataclasses.dataclass(eq=False)
class DelayedEpisode:
    """One robot: its session of the policy, its connection and its queue.

    Attributes:
      session: of the policy.
      client: its connection.
      queue: of its actions.
      actions: float32 [A] executed in each step, with the number of the answer each is from; 0 for
        a step without one.
      counts: of the policy's answers: chunks, those the grammar overruled, invalid ones.
    """

    session: Any
    client: DelayedClient
    queue: ChunkQueue
    actions: list[tuple[int, np.ndarray]] = dataclasses.field(default_factory=list)
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def answered(self) -> None:
        """Counts an answer of the policy."""
        chunk = self.client.last
        self.counts["chunks"] += 1
        self.counts["num_overridden"] += chunk.num_overridden > 0
        self.counts["invalid"] += not chunk.valid

    def take(self, policy: Policy) -> ActionChunk:
        """The action of this step."""
        action = self.queue.take()
        if action is None:  # before the first answer nothing is known to keep
            action = no_motion(1, policy.statistics.action_dim, None)[0]
        self.client.tick()
        self.actions.append((0 if self.queue.holding else self.queue.answers, action))
        return ActionChunk(np.asarray(action, np.float32)[None])

    def record(self) -> dict[str, Any]:
        """What the record of the episode says of its answers and its motion."""
        answers = [answer for answer, _ in self.actions]
        waiting = next((i for i, answer in enumerate(answers) if answer), len(answers))
        absolute = list(self.client.metadata["absolute_dims"])
        motion = np.delete(np.stack([action for _, action in self.actions]), absolute, axis=1)
        # Actions are displacements per step, velocities: their second difference is the jerk.
        jerk = np.abs(np.diff(motion[waiting:], n=2, axis=0)).sum(1)
        sources = np.array(answers[waiting:])
        joint = np.array([len(set(sources[i : i + 3])) > 1 for i in range(len(jerk))], bool)
        # An episode begins with a long straight motion, whoever drives: only what comes after the
        # first joint is like the joints themselves.
        first = np.cumsum(joint) == 0
        inside = ~joint & ~first
        return {
            **{name: self.counts[name] for name in ("chunks", "num_overridden", "invalid")},
            "waiting_steps": waiting,
            "idle_steps": answers[waiting:].count(0),
            "jerk_at_joints": [round(float(jerk[joint].sum()), 5), int(joint.sum())],
            "jerk_before_joints": [round(float(jerk[first].sum()), 5), int(first.sum())],
            "jerk_inside": [round(float(jerk[inside].sum()), 5), int(inside.sum())],
        }


def latency_figures(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Idle steps and jerk over all episodes of a condition; empty where nothing was delayed."""
    own = [record for record in records if "idle_steps" in record]
    if not own:
        return {}
    figures: dict[str, float] = {}
    for name in ("waiting_steps", "idle_steps"):
        figures[f"{name}_per_episode"] = float(np.mean([record[name] for record in own]))
    for name in ("jerk_at_joints", "jerk_inside"):
        total, count = np.sum([record[name] for record in own], axis=0)
        figures[name] = float(total / max(1, count))
    figures["jerk_at_joints_over_inside"] = figures["jerk_at_joints"] / (
        figures["jerk_inside"] or 1.0
    )
    return {name: round(value, 5) for name, value in figures.items()}
