"""The policy: observations of several robots in, one action chunk for each out.

    observe → codes, state ids → history → prompt → action ids, eoa → decode → unnormalize
            → ActionChunk

Reproduces ``EmuVLAModel.step`` of UniVLA reference/RoboVLMs/eval/*/model_wrapper*.py in batch,
except that only whole chunks can be generated (``free_form`` generates as the reference does), that
ids which decode to none are reported instead of turned into actions, and that the history gets
their missing eoa.

Axes: B robots, T steps of a chunk, A action dimensions, R ids that may be generated.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from univla_jax.episode import ActionChunk, Observation
from univla_jax.errors import UserError
from univla_jax.inference.action_decoders import (
    ActionDecoder,
    ActionPrediction,
    Session,
    SessionLru,
    TokenActionDecoder,
    make_action_decoder,
)
from univla_jax.inference.int8 import quantize_params
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.inference.observations import NoStates, ObservationEncoder, StateEncoder
from univla_jax.inference.sampler import Timer, batch_bucket
from univla_jax.inference.sampling import GREEDY, Sampling
from univla_jax.sequences.history import History, closed
from univla_jax.sequences.prompts import opening, turn_prompt

_LAYOUTS = ("policy_video", "policy_image", "policy_flow")
_AHEAD_ROWS = 8  # sessions whose next prompts are begun together at most
_MAX_CACHED_SESSIONS = 64
_USUAL_OPENING = 64  # tokens of bos and instruction that the usual shapes have room for


class Policy:
    """Decodes action chunks for many episodes at once.

    Attributes:
      trained: the model and its assets.
      corpus: row whose cameras and action statistics are used.
      statistics: of that corpus' actions.
      head: turns prompts into normalized actions.
      states: checks and writes proprioceptive states, where the policy was shown them.
    """

    def __init__(
        self,
        trained: LoadedModel,
        *,
        corpus: str | None = None,
        batch_size: int | None = None,
        max_new_tokens: int | None = None,
        speculative_block: int = 0,
        sampling: Sampling = GREEDY,
        max_cached_sessions: int = _MAX_CACHED_SESSIONS,
        free_form: bool = False,
        head: ActionDecoder | None = None,
    ) -> None:
        """Prepares a loaded model; see ``load``.

        ``head`` turns prompts into actions; by default the action expert in the layout
        ``policy_flow``, else the tokens of the checkpoint's action tokenizer.
        """
        trained.require_layout(_LAYOUTS, "acting")
        assets, layout = trained.assets, trained.layout
        self.trained = trained
        self.corpus = layout.corpus(corpus)
        self.statistics = trained.statistics(self.corpus)
        self._encoder = ObservationEncoder(assets, layout, self.corpus)
        self.states = StateEncoder(trained, self.corpus) if layout.state else NoStates()
        self._batch_size = batch_size
        shape = self.chunk, self.statistics.action_dim
        self.head = head or make_action_decoder(
            trained,
            shape,
            max_new_tokens=max_new_tokens,
            speculative_block=speculative_block,
            sampling=sampling,
            free_form=free_form,
        )
        self._seed = sampling.seed
        self.head.prepare(self._lengths(), batch_size)
        self._holders = SessionLru(max_cached_sessions)

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
        speculative_block: int = 0,
        sampling: Sampling = GREEDY,
        max_cached_sessions: int = _MAX_CACHED_SESSIONS,
        int8: bool = False,
        free_form: bool = False,
    ) -> Policy:
        """Loads a checkpoint folder and nothing else.

        Args:
          checkpoint: a folder ``checkpoints/<step>``, or the workdir whose newest one is taken.
          untrained: random parameters instead of the saved ones, as a baseline.
          seed: of the random parameters.
          corpus: row whose cameras and statistics are used; the only one by default.
          batch_size: of every call; one with fewer observations is padded to it, one with more is
            split. By default the number of observations, rounded up to a bucket.
          max_new_tokens: the most ids of a chunk, its eoa included; by default what the longest
            legal chunk needs.
          speculative_block: tokens verified per speculative decode step; 0 decodes one by one.
            The actions are the same.
          sampling: how tokens are chosen, and the seed of all draws, also of an action expert's.
          max_cached_sessions: sessions whose key/value caches are kept between calls, each as large
            as the cache of a whole prompt; the others prefill their prompts anew.
          int8: weights of eight bits (``int8.py``); the actions are nearly the same.
          free_form: action ids in any order, as the reference has it; by default only whole chunks.

        Raises:
          UserError: no complete checkpoint, changed or missing assets, a checkpoint that is no
            policy, or several corpora and none named.
        """
        trained = LoadedModel.from_checkpoint(checkpoint, untrained=untrained, seed=seed)
        if int8:
            trained = dataclasses.replace(trained, params=quantize_params(trained.params))
        return cls(
            trained,
            corpus=corpus,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            speculative_block=speculative_block,
            sampling=sampling,
            max_cached_sessions=max_cached_sessions,
            free_form=free_form,
        )

    @property
    def chunk(self) -> int:
        """Steps T of a chunk."""
        return self.trained.layout.chunk_size

    @property
    def views(self) -> tuple[str, ...]:
        """The cameras an observation must have."""
        return self._encoder.views

    def start(self, seed: int = 0) -> Session:
        """A new episode; ``seed`` fixes what is drawn for it, on top of the policy's own."""
        layout = self.trained.layout
        window = layout.frames if layout.layout == "policy_video" else 1
        return Session(History(window=window), self._seed + seed)

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
          give ``valid=False``, the reason, and no motion: 0 in every dimension but the last, the
          gripper, which stays as it was last commanded.

        Raises:
          UserError: an observation without a view, with a frame of another dtype or size, or
            without the state that the policy was trained with; a session given twice; an
            instruction too long. No session is changed then.
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
        return dataclasses.replace(self._encoder.example(), state=self.states.example())

    def warmup(self, batch_size: int) -> None:
        """Compiles what a call with ``batch_size`` robots uses."""
        size = self._batch_size or batch_bucket(batch_size)
        self._encoder.encode([self.example()], size)
        self.head.warmup(size)

    def check(self, observation: Observation, name: str = "observation") -> None:
        """Checks one observation as ``act`` does.

        Args:
          observation: what is looked at.
          name: what it is called in messages.

        Raises:
          UserError: a view is missing or has another dtype or size; a state is missing or has
            another size; an instruction too long.
        """
        self._encoder.check(observation, name)
        self.states.check(observation.state, name)
        self._check_instruction(observation.instruction, name)

    def prefill_ahead(self) -> bool:
        """Reads what the next prompts are known to begin with, between calls.

        Once the window is full, the observation that stays moves to another position and must be
        read again; done here, the next ``act`` of the session reads only what is new.

        Returns:
          whether there was anything to do.
        """
        sessions = self._holders.take(self._batch_size or _AHEAD_ROWS)
        prefixes = [self._prefix(session) for session in sessions]
        wanted = [
            (session, prefix)
            for session, prefix in zip(sessions, prefixes)
            if self.head.should_prefill(prefix, session)
        ]
        if wanted:
            behind, known = zip(*wanted)
            self.head.prefill_ahead(known, behind)
        return bool(wanted)

    def _prefix(self, session: Session) -> np.ndarray:
        return session.history.prefix(opening(self.trained.text_encoder, session.instruction or ""))

    def _act(
        self,
        observations: Sequence[Observation],
        sessions: Sequence[Session],
        timer: Timer,
    ) -> list[ActionChunk]:
        text_encoder = self.trained.text_encoder
        with timer.section("encode"):
            seen = self._encoder.encode(
                observations, self._batch_size or batch_bucket(len(observations))
            )
            states = self.states.encode([observation.state for observation in observations])
        histories = [
            session.seeing(observation.instruction, turn_prompt(text_encoder, views, state))
            for observation, session, views, state in zip(observations, sessions, seen, states)
        ]
        prompts = [
            history.prompt(opening(text_encoder, observation.instruction))
            for observation, history in zip(observations, histories)
        ]
        answers = self.head.answer(prompts, sessions, timer)
        chunks = []
        for i, (session, answer) in enumerate(zip(sessions, answers)):
            chunk = self._chunk(answer, session.last_action)
            history = histories[i].act(closed(text_encoder.vocabulary, answer.ids))
            session.keep(observations[i].instruction, history, chunk, answer.cached_prefix)
            chunks.append(chunk)
        self._holders.called(sessions)
        return chunks

    def _chunk(self, answer: ActionPrediction, last_action: np.ndarray | None) -> ActionChunk:
        """The chunk of a head's answer in physical units; no motion where it is not valid."""
        decoded, num_overridden = answer.decoded, answer.num_overridden
        if decoded.valid:
            return ActionChunk(
                self.statistics.unnormalize(decoded.actions), num_overridden=num_overridden
            )
        actions = no_motion(self.chunk, self.statistics.action_dim, last_action)
        return ActionChunk(
            actions, valid=False, reason=decoded.reason, num_overridden=num_overridden
        )

    def _lengths(self) -> tuple[int, int, int]:
        """New tokens of the usual calls: one observation, with an instruction, a whole prompt."""
        layout, window = self.trained.layout, self.start().history.window
        grids = layout.corpora[self.corpus].grids
        codes = [np.zeros((1, *grids[view]), np.int32) for view in layout.views]
        turn = len(turn_prompt(self.trained.text_encoder, codes)) + self.states.max_tokens
        longest = _USUAL_OPENING + window * turn + (window - 1) * _action_tokens(self.head)
        first = _USUAL_OPENING + turn
        return turn + 1, first, max(first, min(longest, layout.sequence_length))

    def _check_instruction(self, instruction: str, name: str) -> None:
        longest = self.trained.layout.sequence_length
        words = len(opening(self.trained.text_encoder, instruction))
        if words > longest:
            raise UserError(
                f"{name}: the instruction makes {words} tokens, the policy was trained on "
                f"sequences of {longest}; shorten it"
            )


def _action_tokens(head: ActionDecoder) -> int:
    return head.rules.max_new_tokens if isinstance(head, TokenActionDecoder) else 1


def no_motion(steps: int, action_dim: int, last_action: np.ndarray | None) -> np.ndarray:
    """Stand still: float32 [steps, action_dim] zeros; the gripper stays as last commanded.

    Holds for actions that are displacements with the gripper last, as in every corpus here. The
    zeros of the normalized range are no such thing: unnormalized they move.

    Args:
      steps: length of the chunk.
      action_dim: dimensions A.
      last_action: [A] of the step before, None at the start: then the gripper gets 0 too.
    """
    actions = np.zeros((steps, action_dim), np.float32)
    if last_action is not None:
        actions[:, -1] = last_action[-1]
    return actions
