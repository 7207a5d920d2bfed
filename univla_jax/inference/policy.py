"""Policy: observations of several robots in, one action chunk for each out, and its execution.

    encode → codes, state ids → history → prompt → action ids, eoa → parse → unnormalize
           → ActionChunk

Reproduces ``EmuVLAModel.step`` of UniVLA reference/RoboVLMs/eval/*/model_wrapper*.py in batch,
except that only whole chunks can be generated (``free_form`` generates as the reference does), that
ids which decode to none are reported instead of turned into actions, and that the history gets
their missing eoa.

Axes: B robots, T steps of a chunk, A action dimensions.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from univla_jax.data.action_conventions import ChunkDeltas
from univla_jax.data.datasets import chunk_deltas
from univla_jax.episode import ActionChunk, Observation
from univla_jax.errors import UserError
from univla_jax.inference.action_decoders import (
    ActionDecoder,
    ActionPrediction,
    Session,
    make_action_decoder,
)
from univla_jax.inference.int8 import quantize_params
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.inference.memory import GIB, SessionLru, device_bytes
from univla_jax.inference.observations import (
    NoStateEncoder,
    ObservationEncoder,
    StateEncoder,
    check_state,
)
from univla_jax.inference.sampler import Timer, batch_bucket
from univla_jax.inference.sampling import GREEDY, Sampling
from univla_jax.sequences.tokens import Role
from univla_jax.tasks.base import ActionTask
from univla_jax.tasks.history import History, close_action

_AHEAD_BATCH = 8  # sessions whose next prompts are prefilled together at most
_CACHE_BUDGET = 4 * GIB
_USUAL_OPENING = 64  # tokens of bos and instruction that the usual shapes have room for


class Policy:
    """Action chunks for many episodes at once.

    Attributes:
      loaded: the model and its assets.
      corpus: whose cameras and action statistics are used.
      statistics: of that corpus' actions.
      action_decoder: turns prompts into normalized actions.
      state_encoder: checks and encodes proprioceptive states, where the policy was shown them.
      chunk_deltas: how the corpus' poses are predicted relative to the robot's current one; None
        where actions are commands as they are.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        corpus: str | None = None,
        batch_size: int | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling = GREEDY,
        speculative_block: int = 0,
        cache_budget: int = _CACHE_BUDGET,
        free_form: bool = False,
        action_decoder: ActionDecoder | None = None,
    ) -> None:
        """Prepares a loaded model; see ``load``.

        ``action_decoder`` turns prompts into actions; by default the one that the checkpoint's task
        needs.
        """
        loaded = loaded.select(ActionTask, Role.ACTION, "acting")
        record = loaded.record
        self.loaded = loaded
        self.corpus = record.find_corpus(corpus)
        self.statistics = loaded.statistics(self.corpus)
        self._encoder = ObservationEncoder(loaded.assets, record, self.corpus)
        self.state_encoder = StateEncoder(loaded, self.corpus) if record.state else NoStateEncoder()
        self.chunk_deltas = chunk_deltas(self.corpus)
        self._batch_size = batch_size
        self.action_decoder = action_decoder or make_action_decoder(
            loaded,
            (self.chunk_size, self.statistics.action_dim),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            speculative_block=speculative_block,
            free_form=free_form,
        )
        self.action_decoder.set_shapes(self._usual_lengths(), batch_size)
        self._seed = sampling.seed
        self._sessions = SessionLru(cache_budget)

    @classmethod
    def load(
        cls,
        checkpoint: str | pathlib.Path,
        *,
        untrained: bool = False,
        seed: int = 0,
        corpus: str | None = None,
        batch_size: int | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling = GREEDY,
        speculative_block: int = 0,
        cache_budget: int = _CACHE_BUDGET,
        int8: bool = False,
        free_form: bool = False,
    ) -> Policy:
        """Loads a checkpoint folder and nothing else.

        Args:
          checkpoint: a folder ``checkpoints/<step>``, or the workdir whose newest one is taken.
          untrained: random parameters instead of the saved ones, as a baseline.
          seed: of the random parameters.
          corpus: whose cameras and statistics are used; the only one by default.
          batch_size: of every call; one with fewer observations is padded to it, one with more is
            split. By default the number of observations, rounded up to a bucket.
          max_new_tokens: the most ids of a chunk, its eoa included; by default what the longest
            legal chunk needs.
          sampling: how tokens are chosen, and the seed of all draws, also of an action expert's.
          speculative_block: tokens verified per speculative decode step; 0 decodes one by one.
            The actions are the same.
          cache_budget: bytes per device that the key/value caches kept between calls may take
            together; sessions that fall out prefill their next prompt anew.
          int8: weights of eight bits (``int8.py``); the actions are nearly the same.
          free_form: action ids in any order, as the reference has it; by default only whole chunks.

        Raises:
          UserError: no complete checkpoint, changed or missing assets, a checkpoint that is no
            policy, or several corpora and none named.
        """
        loaded = LoadedModel.from_checkpoint(checkpoint, untrained=untrained, seed=seed)
        if int8:
            loaded = dataclasses.replace(loaded, params=quantize_params(loaded.params))
        return cls(
            loaded,
            corpus=corpus,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            speculative_block=speculative_block,
            cache_budget=cache_budget,
            free_form=free_form,
        )

    @property
    def chunk_size(self) -> int:
        """Steps T of a chunk."""
        return self.loaded.record.chunk_size

    @property
    def views(self) -> tuple[str, ...]:
        """The cameras an observation must have."""
        return self._encoder.views

    def start(self, seed: int = 0) -> Session:
        """A new episode; ``seed`` fixes what is drawn for it, on top of the policy's own."""
        return Session(History(window=self.loaded.task.history_window), self._seed + seed)

    def act(
        self,
        observations: Sequence[Observation],
        sessions: Sequence[Session],
        *,
        timer: Timer | None = None,
    ) -> list[ActionChunk]:
        """The next chunk of every robot.

        Args:
          observations: one per robot.
          sessions: of the same robots, from ``start``; each gets its observation and action added.
          timer: gets the sections ``encode``, ``prefill`` and ``decode``.

        Returns:
          one chunk per robot, float32 [T, A] in physical units. Ids that decode to no whole chunk
          give ``valid=False``, the reason, and no motion: see ``no_motion``.

        Raises:
          UserError: an observation without a view, with a frame of another dtype or size, or
            without the state that the policy needs; a session given twice; an instruction too
            long. No session is changed then.
        """
        if len(observations) != len(sessions):
            raise UserError(f"{len(observations)} observations for {len(sessions)} sessions")
        if len({id(session) for session in sessions}) != len(sessions):
            raise UserError("a session was given twice; start one per robot")
        for i, observation in enumerate(observations):
            self.check(observation, f"observation {i}")
        size = self._batch_size or max(1, len(observations))
        chunks: list[ActionChunk] = []
        for start in range(0, len(observations), size):
            part = slice(start, start + size)
            chunks += self._act(observations[part], sessions[part], timer or Timer())
        return chunks

    def example(self) -> Observation:
        """A black observation of a size the policy takes."""
        state = self.state_encoder.example()
        if state is None and self.chunk_deltas is not None:
            state = np.zeros(self.statistics.action_dim, np.float32)
        return dataclasses.replace(self._encoder.example(), state=state)

    def warmup(self, batch_size: int) -> None:
        """Compiles what a call with ``batch_size`` robots uses."""
        size = self._batch_size or batch_bucket(batch_size)
        self._encoder.encode([self.example()], size)
        self.action_decoder.warmup(size)

    def check(self, observation: Observation, name: str = "observation") -> None:
        """Checks one observation as ``act`` does.

        Args:
          observation: instruction, frames and state.
          name: what it is called in messages.

        Raises:
          UserError: a view is missing or has another dtype or size; a state is missing or has
            another size; an instruction too long.
        """
        self._encoder.check(observation, name)
        self.state_encoder.check(observation.state, name)
        if self.chunk_deltas is not None:
            why = "the policy predicts poses relative to the current one and needs"
            check_state(observation.state, self.statistics.action_dim, name, why)
        longest = self.loaded.record.sequence_length
        tokens = len(self.loaded.task.opening(observation.instruction))
        if tokens > longest:
            raise UserError(
                f"{name}: the instruction makes {tokens} tokens, the policy was trained on "
                f"sequences of {longest}; shorten it"
            )

    def prefill_ahead(self) -> bool:
        """Prefills, between calls, what the next prompts are known to begin with.

        Once the window is full, the observation that stays moves to another position and must be
        prefilled again; done here, the next ``act`` of the session prefills only what is new.

        Returns:
          whether there was anything to do.
        """
        sessions = self._sessions.take_pending(self._batch_size or _AHEAD_BATCH)
        pending = []
        for session in sessions:
            prefix = session.history.prefix(self.loaded.task.opening(session.instruction or ""))
            if self.action_decoder.should_prefill(prefix, session):
                pending.append((prefix, session))
        if pending:
            prefixes, behind = zip(*pending)
            self.action_decoder.prefill_ahead(prefixes, behind)
        return bool(pending)

    def memory(self, batch_size: int) -> dict[str, int]:
        """Bytes per device of what a server holds, by name.

        Args:
          batch_size: most robots in one call.
        """
        weights, cache, call = self.action_decoder.memory(self._batch_size or batch_size)
        vision = getattr(self.loaded.assets.vision, "variables", {})
        return {
            "weights": weights,
            "vision tokenizer": device_bytes(vision),
            "cache of a robot": cache,
            f"caches of a call with {batch_size}": call,
            "budget of caches kept": self._sessions.budget,
        }

    def set_cache_budget(self, num_bytes: int) -> None:
        """Bytes per device that the caches kept between calls may take from the next call on."""
        self._sessions.budget = num_bytes

    def drop_caches(self) -> None:
        """Frees all caches kept between calls; the next calls prefill their prompts anew."""
        self._sessions.drop()

    def _act(
        self,
        observations: Sequence[Observation],
        sessions: Sequence[Session],
        timer: Timer,
    ) -> list[ActionChunk]:
        task = self.loaded.task
        with timer.section("encode"):
            size = self._batch_size or batch_bucket(len(observations))
            codes = self._encoder.encode(observations, size)
            states = self.state_encoder.encode([observation.state for observation in observations])
        histories = [
            session.observe(observation.instruction, task.moment_prompt(views, state))
            for observation, session, views, state in zip(observations, sessions, codes, states)
        ]
        prompts = [
            history.prompt(task.opening(observation.instruction))
            for observation, history in zip(observations, histories)
        ]
        predictions = self.action_decoder.predict(prompts, sessions, timer)
        chunks = []
        for observation, session, history, prediction in zip(
            observations, sessions, histories, predictions
        ):
            chunk = self._unnormalized(prediction, observation, session)
            history = history.act(close_action(task.vocabulary, prediction.ids))
            session.update(observation.instruction, history, chunk, prediction.cached_prefix)
            chunks.append(chunk)
        self._sessions.touch(sessions)
        return chunks

    def _unnormalized(
        self, prediction: ActionPrediction, observation: Observation, session: Session
    ) -> ActionChunk:
        """A prediction in physical units; no motion where it is not valid."""
        decoded, deltas = prediction.decoded, self.chunk_deltas
        if decoded.valid:
            actions = self.statistics.unnormalize(decoded.actions)
        else:
            pose = None if deltas is None else observation.state
            actions = no_motion(
                self.chunk_size, self.statistics.action_dim, session.last_action, deltas, pose
            )
        if decoded.valid and deltas is not None:
            actions = deltas.to_absolute(actions, np.asarray(observation.state, np.float32))
        return ActionChunk(
            actions,
            valid=decoded.valid,
            reason=decoded.reason,
            num_overridden=prediction.num_overridden,
        )

    def _usual_lengths(self) -> tuple[int, int, int]:
        """New tokens of the usual calls: one observation, with an instruction, a whole prompt."""
        record, task = self.loaded.record, self.loaded.task
        window, grids = task.history_window, record.corpora[self.corpus].grids
        views = record.views_of(self.corpus)
        codes = [np.zeros((1, *grids[view]), np.int32) for view in views]
        moment = len(task.moment_prompt(codes)) + self.state_encoder.max_tokens
        actions = (window - 1) * self.action_decoder.max_action_tokens
        longest = _USUAL_OPENING + window * moment + actions
        first = _USUAL_OPENING + moment
        return moment + 1, first, max(first, min(longest, record.sequence_length))


def no_motion(
    steps: int,
    action_dim: int,
    last_action: np.ndarray | None,
    deltas: ChunkDeltas | None = None,
    pose: np.ndarray | None = None,
) -> np.ndarray:
    """Stand still: float32 [steps, action_dim].

    Actions that are displacements are 0 but for the last dimension, the gripper, which stays as
    last commanded. Actions that are poses (``deltas`` is given) are the current pose, their
    grippers as last commanded. The zeros of the normalized range are no such thing: unnormalized
    they move.

    Args:
      steps: length of the chunk.
      action_dim: dimensions A.
      last_action: [A] of the step before, None at the start: then the gripper of displacements gets
        0 too, and those of a pose stay where they are.
      deltas: of a corpus of poses.
      pose: [A], the current one, where ``deltas`` is given.
    """
    actions = np.zeros((steps, action_dim), np.float32)
    grippers = [action_dim - 1] if deltas is None else list(deltas.absolute)
    if pose is not None:
        actions[:] = pose
    if last_action is not None:
        actions[:, grippers] = last_action[grippers]
    return actions


# ----------------------------------------------------------------------------
# Execution of action chunks: whole, receding horizon, or temporal ensembling.
#
#     chunk       a0 a1 a2 a3 a4 │ b0 b1 …       all of a chunk, then the next
#     receding    a0 a1 │ b0 b1 │ c0 c1 │ …      its first steps only
#     ensemble    a0 │ (a1 b0) │ (a2 b1 c0) │ …  the mean of all chunks that reach a step
#
# The mean weighs the ``i``-th oldest prediction of a step by ``exp(-decay * i)`` (ACT, arXiv
# 2304.13705, algorithm 2; octo-models/octo octo/utils/gym_wrappers.py:154-196).
#
# Axes: T steps of a chunk, A action dimensions.


MODES = ("chunk", "receding", "ensemble")


@dataclasses.dataclass(frozen=True)
class Execution:
    """An execution mode and its parameters.

    Attributes:
      mode: one of ``MODES``.
      steps: steps executed per call in the modes that take fewer than all.
      decay: how fast the weights of an ensemble fall; 0 weighs all alike.
    """

    mode: str = "chunk"
    steps: int = 1
    decay: float = 0.01

    def __post_init__(self) -> None:
        """Raises UserError for an unknown mode or a number out of range."""
        if self.mode not in MODES:
            raise UserError(f"execution mode {self.mode!r}, expected one of {', '.join(MODES)}")
        if self.steps < 1 or self.decay < 0:
            raise UserError(
                f"execution: {self.steps} steps and decay {self.decay}, expected at least 1 and 0"
            )


@dataclasses.dataclass(eq=False)
class ExecutorSession:
    """A policy's session, and the chunks of it that reach beyond the current step.

    Attributes:
      session: the policy's.
      chunks: float32 [n, A] each, the actions of earlier chunks from the current step on, oldest
        first.
    """

    session: Any
    chunks: list[np.ndarray] = dataclasses.field(default_factory=list)

    def ensemble(self, chunk: ActionChunk, execution: Execution) -> np.ndarray:
        """Adds a chunk and advances; returns the averaged actions of the next steps [steps, A].

        A chunk that is not valid is left out, unless there is no other.
        """
        if chunk.valid:
            self.chunks.append(chunk.actions)
        chunks = self.chunks or [chunk.actions]
        steps = min(execution.steps, max(map(len, chunks)))
        actions = []
        for step in range(steps):
            predictions = np.stack([c[step] for c in chunks if len(c) > step])
            weights = np.exp(-execution.decay * np.arange(len(predictions)))
            mean = (weights[:, None] * predictions).sum(0).astype(np.float32)
            actions.append(mean / np.float32(weights.sum()))
        self.chunks = [c[steps:] for c in self.chunks if len(c) > steps]
        return np.stack(actions)


class Executor:
    """A policy whose calls return the actions to execute until the next call."""

    def __init__(self, policy: Policy, execution: Execution) -> None:
        """Wraps a policy.

        Raises:
          UserError: more steps than a chunk has.
        """
        if execution.steps > policy.chunk_size:
            raise UserError(
                f"execution: {execution.steps} steps of chunks of {policy.chunk_size}; take at "
                "most so many"
            )
        self.policy, self.execution = policy, execution

    @property
    def views(self) -> tuple[str, ...]:
        """The cameras an observation must have."""
        return self.policy.views

    @property
    def steps(self) -> int:
        """Actions per call."""
        return self.policy.chunk_size if self.execution.mode == "chunk" else self.execution.steps

    def start(self, seed: int = 0) -> ExecutorSession:
        """The session of a new episode; see ``Policy.start``."""
        return ExecutorSession(self.policy.start(seed))

    def check(self, observation: Observation, name: str = "observation") -> None:
        """Raises UserError for an observation that ``act`` would refuse."""
        self.policy.check(observation, name)

    def prefill_ahead(self) -> bool:
        """See ``Policy.prefill_ahead``."""
        return self.policy.prefill_ahead()

    def drop_caches(self) -> None:
        """See ``Policy.drop_caches``."""
        self.policy.drop_caches()

    def act(
        self,
        observations: Sequence[Observation],
        sessions: Sequence[ExecutorSession],
        *,
        timer: Timer | None = None,
    ) -> list[ActionChunk]:
        """The actions of every robot until its next call; see ``Policy.act``."""
        inner = [session.session for session in sessions]
        chunks = self.policy.act(observations, inner, timer=timer)
        return [self._executed(session, chunk) for session, chunk in zip(sessions, chunks)]

    def _executed(self, session: ExecutorSession, chunk: ActionChunk) -> ActionChunk:
        if self.execution.mode == "ensemble":
            return dataclasses.replace(chunk, actions=session.ensemble(chunk, self.execution))
        return dataclasses.replace(chunk, actions=chunk.actions[: self.steps])
