"""The policy: observations of several robots in, one action chunk for each out.

    observe → codes → history → prompt → action ids, eoa → decode → unnormalise → ActionChunk

Reproduces ``EmuVLAModel.step`` of UniVLA reference/RoboVLMs/eval/*/model_wrapper*.py in batch,
except that ids which decode to no whole chunk are reported instead of turned into actions, and
that the history gets their missing eoa.

Axes: B robots, T steps of a chunk, A action dimensions, R ids that may be generated.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from univla_jax.data.actions import ActionStatistics
from univla_jax.episode import ActionChunk, Observation
from univla_jax.errors import UserError
from univla_jax.inference.buckets import pad_prompts
from univla_jax.inference.observations import ObservationEncoder
from univla_jax.inference.sampler import Sampler
from univla_jax.inference.trained import TrainedModel
from univla_jax.sequences.history import History, closed
from univla_jax.sequences.prompts import opening, turn_prompt

_LAYOUTS = ("policy_video", "policy_image")


@dataclasses.dataclass
class Session:
    """What a policy remembers of one episode; made by ``Policy.start``, changed by ``act``.

    Attributes:
      history: observations and actions still in the window.
      instruction: the task so far; another one empties the history.
      chunks: chunks given out.
      invalid: how many of them did not decode.
      last_action: float32 [A], the end of the last chunk given out.
    """

    history: History
    instruction: str | None = None
    chunks: int = 0
    invalid: int = 0
    last_action: np.ndarray | None = None

    def seeing(self, instruction: str, turn: np.ndarray) -> History:
        """The history with a new observation; the session itself stays as it is."""
        same = self.instruction in (None, instruction)
        history = self.history if same else History(window=self.history.window)
        return history.observe(turn)

    def keep(self, instruction: str, history: History, chunk: ActionChunk) -> None:
        """Remembers a call that succeeded."""
        self.history, self.instruction = history, instruction
        self.chunks += 1
        self.invalid += not chunk.valid
        self.last_action = chunk.actions[-1]


class Policy:
    """Greedy decoding of action chunks for many episodes at once.

    Attributes:
      trained: the model and its assets.
      corpus: row whose cameras and action statistics are used.
      statistics: of that corpus' actions.
    """

    def __init__(
        self, trained: TrainedModel, *, corpus: str | None = None, rows: int | None = None
    ) -> None:
        """Prepares a loaded model; see ``load``."""
        trained.require_layout(_LAYOUTS, "acting")
        assets, layout = trained.assets, trained.layout
        self.trained = trained
        self.corpus = layout.corpus(corpus)
        self.statistics = _statistics(trained, self.corpus)
        self._action = assets.require("action")
        self._encoder = ObservationEncoder(assets, layout, self.corpus)
        self._sampler = Sampler(trained.model, trained.params)
        self._rows = rows
        codes = assets.vocabulary.action_ids(np.arange(self._action.vocabulary_size))
        self._allowed = np.append(codes, assets.vocabulary.eoa)
        longest = self._action.max_tokens(self.chunk, self.statistics.action_dim)
        self._new_tokens = longest + 1

    @classmethod
    def load(
        cls,
        checkpoint: str | pathlib.Path,
        *,
        untrained: bool = False,
        seed: int = 0,
        corpus: str | None = None,
        rows: int | None = None,
    ) -> Policy:
        """Loads a checkpoint folder and nothing else.

        Args:
          checkpoint: a folder ``checkpoints/<step>``, or the workdir whose newest one is taken.
          untrained: random parameters instead of the saved ones, as a baseline.
          seed: of the random parameters.
          corpus: row whose cameras and statistics are used; the only one by default.
          rows: size of every batch; a call with fewer observations is padded to it, one with more
            is split. By default the number of observations, rounded up to a bucket.

        Raises:
          UserError: no complete checkpoint, changed or missing assets, a checkpoint that is no
            policy, or several corpora and none named.
        """
        trained = TrainedModel.load(checkpoint, untrained=untrained, seed=seed)
        return cls(trained, corpus=corpus, rows=rows)

    @property
    def chunk(self) -> int:
        """Steps T of a chunk."""
        return self.trained.layout.action_frames

    @property
    def views(self) -> tuple[str, ...]:
        """The cameras an observation must have."""
        return self._encoder.views

    def start(self, seed: int = 0) -> Session:
        """The memory of a new episode; greedy decoding draws nothing, so ``seed`` has no effect."""
        del seed
        layout = self.trained.layout
        return Session(History(window=layout.frames if layout.layout == "policy_video" else 1))

    def act(
        self, observations: Sequence[Observation], sessions: Sequence[Session]
    ) -> list[ActionChunk]:
        """The next chunk of every robot.

        Args:
          observations: one per robot.
          sessions: of the same robots, from ``start``; each gets its observation and action added.

        Returns:
          one chunk per robot, float32 [T, A] in physical units. Ids that decode to no whole chunk
          give ``valid=False``, the reason, and no motion: 0 in every dimension but the last, the
          gripper, which stays as it was last commanded.

        Raises:
          UserError: an observation without a view, or with a frame of another dtype or size; a
            session given twice; an instruction too long. No session is changed then.
        """
        if len(observations) != len(sessions):
            raise UserError(f"{len(observations)} observations for {len(sessions)} sessions")
        if len({id(session) for session in sessions}) != len(sessions):
            raise UserError("a session was given twice; start one per robot")
        for i, observation in enumerate(observations):
            self._encoder.check(observation, f"observation {i}")
            self._check_instruction(observation.instruction, f"observation {i}")
        size = self._rows or max(1, len(observations))
        chunks: list[ActionChunk] = []
        for start in range(0, len(observations), size):
            part = slice(start, start + size)
            chunks += self._act(observations[part], sessions[part])
        return chunks

    def _act(
        self, observations: Sequence[Observation], sessions: Sequence[Session]
    ) -> list[ActionChunk]:
        lexicon = self.trained.lexicon
        seen = self._encoder.encode(observations, self._rows)
        histories = [
            session.seeing(observation.instruction, turn_prompt(lexicon, views))
            for observation, session, views in zip(observations, sessions, seen)
        ]
        prompts = [
            history.prompt(opening(lexicon, observation.instruction))
            for observation, history in zip(observations, histories)
        ]
        chunks = []
        generated = self._generate(prompts)
        for observation, session, history, ids in zip(observations, sessions, histories, generated):
            chunk = self._decode(ids, session.last_action)
            history = history.act(closed(lexicon.vocabulary, ids))
            session.keep(observation.instruction, history, chunk)
            chunks.append(chunk)
        return chunks

    def _generate(self, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Ids after each prompt, int32 [n], up to and with eoa where it was reached."""
        vocabulary = self.trained.assets.vocabulary
        tokens, lengths = pad_prompts(prompts, vocabulary.pad, rows=self._rows)
        slots = tokens.shape[1] + self._new_tokens
        generated, _ = self._sampler.generate(
            self._sampler.prefill(tokens, lengths, slots=slots),
            max_new_tokens=self._new_tokens,
            allowed=self._allowed,
            stop_id=vocabulary.eoa,
            active=np.arange(len(tokens)) < len(prompts),
        )
        ids, counts = np.asarray(generated.tokens), np.asarray(generated.lengths)
        return [ids[i, : counts[i]] for i in range(len(prompts))]

    def _decode(self, ids: np.ndarray, last_action: np.ndarray | None) -> ActionChunk:
        """The chunk that generated ids [n] mean, their eoa included."""
        vocabulary = self.trained.assets.vocabulary
        shape = self.chunk, self.statistics.action_dim
        if not len(ids) or ids[-1] != vocabulary.eoa:
            reason = f"no end of action within {len(ids)} tokens"
            return ActionChunk(no_motion(*shape, last_action), valid=False, reason=reason)
        decoded = self._action.decode(vocabulary.action_codes(ids[:-1]).tolist(), *shape)
        if not decoded.valid:
            return ActionChunk(no_motion(*shape, last_action), valid=False, reason=decoded.reason)
        return ActionChunk(self.statistics.unnormalise(decoded.actions))

    def _check_instruction(self, instruction: str, name: str) -> None:
        longest = self.trained.layout.sequence_length
        words = len(opening(self.trained.lexicon, instruction))
        if words > longest:
            raise UserError(
                f"{name}: the instruction makes {words} tokens, the policy was trained on "
                f"sequences of {longest}; shorten it"
            )


def no_motion(steps: int, action_dim: int, last_action: np.ndarray | None) -> np.ndarray:
    """Stand still: float32 [steps, action_dim] zeros; the gripper stays as last commanded.

    Holds for actions that are displacements with the gripper last, as in every corpus here. The
    zeros of the normalised range are no such thing: unnormalised they move.

    Args:
      steps: length of the chunk.
      action_dim: dimensions A.
      last_action: [A] of the step before, None at the start: then the gripper gets 0 too.
    """
    actions = np.zeros((steps, action_dim), np.float32)
    if last_action is not None:
        actions[:, -1] = last_action[-1]
    return actions


def _statistics(trained: TrainedModel, corpus: str) -> ActionStatistics:
    known = trained.assets.statistics
    if corpus not in known:
        raise UserError(
            f"{trained.folder}: the assets hold no action statistics of corpus {corpus!r}, only "
            f"of {', '.join(sorted(known)) or 'none'}"
        )
    return known[corpus]
