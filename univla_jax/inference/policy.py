"""Policy: observations of several robots in, one action chunk for each out.

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

from univla_jax.data.datasets import absolute_dims, chunk_deltas
from univla_jax.episode import ActionChunk, Observation
from univla_jax.errors import UserError
from univla_jax.inference.action_decoders import (
    ActionDecoder,
    ActionPrediction,
    Session,
    make_action_decoder,
)
from univla_jax.inference.loaded_model import LoadedModel, MakePlacement
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
from univla_jax.tasks.history import EpisodeLog, close_action

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
      absolute_dims: dimensions of an action that command a value; the others are displacements.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        corpus: str | None = None,
        batch_size: int | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling = GREEDY,
        block: int | None = None,
        cache_budget: int = _CACHE_BUDGET,
        max_instruction_tokens: int = 0,
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
        self.absolute_dims = absolute_dims(self.corpus, self.statistics.action_dim)
        self._batch_size = batch_size
        self.action_decoder = action_decoder or make_action_decoder(
            loaded,
            (self.chunk_size, self.statistics.action_dim),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            block=block,
            free_form=free_form,
        )
        self._max_instruction_tokens = max_instruction_tokens
        self.action_decoder.set_shapes(self._usual_lengths(), batch_size)
        self._seed = sampling.seed
        self._sessions = SessionLru(cache_budget)

    @classmethod
    def load(
        cls,
        checkpoint: str | pathlib.Path,
        *,
        untrained: bool = False,
        averaged: bool = True,
        seed: int = 0,
        corpus: str | None = None,
        batch_size: int | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling = GREEDY,
        block: int | None = None,
        cache_budget: int = _CACHE_BUDGET,
        max_instruction_tokens: int = 0,
        int8: bool = False,
        place: MakePlacement | None = None,
        free_form: bool = False,
    ) -> Policy:
        """Loads a checkpoint folder and nothing else.

        Args:
          checkpoint: a folder ``checkpoints/<step>``, or the workdir whose newest one is taken.
          untrained: random parameters instead of the saved ones, as a baseline.
          averaged: the moving averages where the run kept some; False takes its last parameters.
          seed: of the random parameters.
          corpus: whose cameras and statistics are used; the only one by default.
          batch_size: of every call; one with fewer observations is padded to it, one with more is
            split. By default the number of observations, rounded up to a bucket.
          max_new_tokens: the most ids of a chunk, its eoa included; by default what the longest
            legal chunk needs.
          sampling: how tokens are chosen, and the seed of all draws, also of an action expert's.
          block: tokens decoded per step, of which all but the first are drafts that are verified;
            the actions are the same. By default as many as pay on this platform, 1 for none.
          cache_budget: bytes per device that the key/value caches kept between calls may take
            together; sessions that fall out prefill their next prompt anew.
          max_instruction_tokens: longer instructions are refused, and ``warmup`` compiles all that
            the others need; 0 takes any that the model has room for, and compiles when one comes.
          int8: weights of eight bits (``quantized_weights.py``); the actions are nearly the same.
          place: makes the placement of a model that is split over devices.
          free_form: action ids in any order, as the reference has it; by default only whole chunks.

        Raises:
          UserError: no complete checkpoint, changed or missing assets, a checkpoint that is no
            policy, or several corpora and none named.
        """
        loaded = LoadedModel.from_checkpoint(
            checkpoint,
            untrained=untrained,
            averaged=averaged,
            seed=seed,
            int8=int8,
            place=place,
        )
        return cls(
            loaded,
            corpus=corpus,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            block=block,
            cache_budget=cache_budget,
            max_instruction_tokens=max_instruction_tokens,
            free_form=free_form,
        )

    @property
    def chunk_size(self) -> int:
        """Steps T of a chunk."""
        return self.loaded.record.chunk_size

    @property
    def history_window(self) -> int:
        """Observations in a prompt; 1 where a policy needs no history."""
        return self.loaded.task.history_window

    @property
    def max_committed(self) -> int:
        """The most committed actions of an observation; 0 where it may have none."""
        return self.loaded.record.max_committed

    @property
    def views(self) -> tuple[str, ...]:
        """The cameras an observation must have."""
        return self._encoder.views

    @property
    def frame_sizes(self) -> dict[str, tuple[int, int]]:
        """Height and width in pixels at which the policy sees each camera."""
        return {view: f.shape[:2] for view, f in self._encoder.example().frames.items()}

    def start(self, seed: int = 0) -> Session:
        """A new episode; ``seed`` fixes what is drawn for it, on top of the policy's own."""
        return Session(EpisodeLog(self.history_window, self.chunk_size), self._seed + seed)

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
            The actions of its last call count as executed unless ``Session.set_executed`` said
            otherwise.
          timer: gets the sections ``encode``, ``prefill`` and ``decode``.

        Returns:
          one chunk per robot, float32 [T, A] in physical units, behind the committed actions of its
          observation. Ids that decode to no whole chunk
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
            another size; an instruction too long; committed actions of another shape, or more than
            the policy was trained with.
        """
        self._encoder.check(observation, name)
        if observation.committed is not None:
            self._check_committed(observation.committed, name)
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
        limit = self._max_instruction_tokens
        if limit and tokens > limit:
            raise UserError(
                f"{name}: the instruction makes {tokens} tokens, at most {limit} are answered; "
                "shorten it, or raise --max_instruction_tokens"
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
            history = session.present_log().history(self._encode_executed)
            prefix = history.prefix(self.loaded.task.opening(session.instruction or ""))
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
        logs = [s.present_log(o.instruction) for s, o in zip(sessions, observations)]
        moments = [
            task.moment_prompt(views, state, instruction=observation.instruction)
            for observation, views, state in zip(observations, codes, states)
        ]
        earlier = [log.history(self._encode_executed) for log in logs]
        histories = [history.observe(moment) for history, moment in zip(earlier, moments)]
        # What is committed stands before the boa of this prompt alone: a later one shows what was
        # executed behind this moment as one chunk, as it does behind any other.
        asked = [
            self._with_committed(moment, observation, views, state)
            for moment, observation, views, state in zip(moments, observations, codes, states)
        ]
        prompts = [
            history.observe(moment).prompt(task.opening(observation.instruction))
            for observation, history, moment in zip(observations, earlier, asked)
        ]
        predictions = self.action_decoder.predict(prompts, sessions, timer)
        chunks = []
        for observation, session, log, history, prediction in zip(
            observations, sessions, logs, histories, predictions
        ):
            chunk = self._unnormalized(prediction, observation, session)
            ids = close_action(task.vocabulary, prediction.ids)
            session.update(
                observation.instruction,
                log.call(history.moments[-1], ids, chunk.actions),
                history.act(ids),
                chunk,
                prediction.cached_prefix,
            )
            chunks.append(chunk)
        self._sessions.touch(sessions)
        return chunks

    def _check_committed(self, committed: np.ndarray, name: str) -> None:
        most, size = self.max_committed, self.statistics.action_dim
        actions = np.asarray(committed)
        if not most:
            raise UserError(
                f"{name}: it has committed actions, but the policy was trained without any; train "
                "with data.max_committed, or wait for each answer"
            )
        if actions.ndim != 2 or actions.shape[1] != size or len(actions) > most:
            raise UserError(
                f"{name}: committed actions of shape {list(actions.shape)}, expected up to {most} "
                f"of {size} numbers: [N, {size}]"
            )
        if not np.isfinite(actions).all():
            raise UserError(f"{name}: committed actions contain a value that is not finite")

    def _with_committed(
        self, moment: np.ndarray, observation: Observation, views: Sequence[np.ndarray], state: Any
    ) -> np.ndarray:
        """The newest moment of a prompt: ``moment``, with the committed actions there are."""
        if not _committed_steps(observation):
            return moment
        actions = np.asarray(observation.committed, np.float32)
        return self.loaded.task.moment_prompt(
            views,
            state,
            instruction=observation.instruction,
            committed=self.loaded.task.committed_ids(self.corpus, actions),
        )

    def _encode_executed(self, actions: np.ndarray) -> np.ndarray:
        """int32 ids, with eoa, of executed actions float32 [T, A], as training writes them."""
        if self.chunk_deltas is not None:
            actions = self.chunk_deltas.to_relative(actions)
        (ids,) = self.loaded.task.chunk_ids(self.statistics.normalize(actions)[None])
        return np.append(ids, self.loaded.task.vocabulary.eoa).astype(np.int32)

    def _unnormalized(
        self, prediction: ActionPrediction, observation: Observation, session: Session
    ) -> ActionChunk:
        """A prediction in physical units; the task's fallback or no motion where it is invalid."""
        decoded, deltas = prediction.decoded, self.chunk_deltas
        fallback = self.loaded.task.fallback(observation.state, self.chunk_size)
        if decoded.valid:
            actions = self.statistics.unnormalize(decoded.actions)
        elif fallback is not None:
            actions = fallback
        else:
            actions = self._no_motion(observation, session)
        if decoded.valid and deltas is not None:
            actions = deltas.to_absolute(actions, np.asarray(observation.state, np.float32))
        if _committed_steps(observation):
            actions = np.concatenate([np.asarray(observation.committed, np.float32), actions])
        return ActionChunk(
            actions,
            valid=decoded.valid,
            reason=decoded.reason,
            num_overridden=prediction.num_overridden,
        )

    def _no_motion(self, observation: Observation, session: Session) -> np.ndarray:
        """No motion of a robot, float32 [T, A]; [0, A] where its pose is not known."""
        size, last, pose = self.statistics.action_dim, session.last_action, None
        if _committed_steps(observation):
            last = np.asarray(observation.committed[-1], np.float32)
        if self.chunk_deltas is not None:
            # Arms are where they are, whatever they were told; grippers hold what they were told.
            pose = np.array(observation.state, np.float32)
            if last is not None:
                grippers = list(self.chunk_deltas.absolute)
                pose[grippers] = last[grippers]
            last = None
        return no_motion(self.chunk_size, size, last, self.absolute_dims, pose)

    def _usual_lengths(self) -> tuple[int, int, int]:
        """New tokens of the usual calls: one observation, with an instruction, a whole prompt."""
        record, task = self.loaded.record, self.loaded.task
        window, grids = task.history_window, record.corpora[self.corpus].grids
        views = record.views_of(self.corpus)
        codes = [np.zeros((1, *grids[view]), np.int32) for view in views]
        moment = len(task.moment_prompt(codes)) + self.state_encoder.max_tokens
        # Committed actions stand in the newest moment alone, which they make longer.
        committed = task.max_committed_tokens(self.statistics.action_dim)
        actions = (window - 1) * self.action_decoder.max_action_tokens
        # Where instructions are limited, no prompt is longer than what is compiled beforehand.
        opening = self._max_instruction_tokens or _USUAL_OPENING
        longest = opening + window * moment + actions + committed
        first = opening + moment + committed
        if not self._max_instruction_tokens:
            longest = max(first, min(longest, record.sequence_length))
        return moment + committed + 1, first, longest


def _committed_steps(observation: Observation) -> int:
    return 0 if observation.committed is None else len(observation.committed)


def no_motion(
    steps: int,
    action_dim: int,
    last_action: np.ndarray | None,
    absolute: Sequence[int] | None = None,
    pose: np.ndarray | None = None,
) -> np.ndarray:
    """Stand still: float32 [steps, action_dim], or [0, action_dim] where that is not known.

    Displacements are 0; what commands a value keeps its last command, or the present value. The
    zeros of the normalized range are no such thing: unnormalized they move.

    Args:
      steps: length of the chunk.
      action_dim: dimensions A.
      last_action: [A] of the step before, None at the start: a gripper beside displacements is 0
        then.
      absolute: dimensions that command a value; the last one, the gripper, by default.
      pose: [A], the present values, where they are known.
    """
    absolute = [action_dim - 1] if absolute is None else list(absolute)
    known = pose if last_action is None else last_action
    actions = np.zeros((steps, action_dim), np.float32)
    if known is not None:
        actions[:, absolute] = known[absolute]
    elif absolute != [action_dim - 1]:
        return actions[:0]
    return actions
