"""Task: what one kind of training sequence looks like, how it is prompted, and what is decoded.

    TokenizedEpisode ── sample ──► SampleSpec ── fill ──► Tokens (ids, roles)        training
    observation      ── prompt ──► ids ── decode (Decoding) ──► ids ── parse ──►     inference

A task lives in one file, ``tasks/NAME.py``, and holds everything that is particular to it: the
drawing of its sequence, ``build`` (which also makes the prompt: the same sequence, cut where
generation starts), the labels it learns by default, what it needs of the data, and how its output
is constrained and parsed. ``tasks/__init__.py`` lists the names.

Axes: S sequence, T time, N chunks, h/w code grid, A action dimensions.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from univla_jax.data.datasets import (
    DATASETS,
    absolute_dims,
    chunk_deltas,
    find_dataset_config,
)
from univla_jax.data.token_record import Codes, TokenizedEpisode
from univla_jax.errors import UserError
from univla_jax.normalization import ActionStatistics, sliding_windows, state_key
from univla_jax.sequences.frames import frame_block, frame_separator
from univla_jax.sequences.tokens import (
    Piece,
    Role,
    TextEncoder,
    Tokens,
    action_block,
    compose,
    encode_chunks,
    encode_states,
    opening,
)
from univla_jax.tokenizers.action import ActionTokenizer
from univla_jax.tokenizers.constrained import CodeGrammar, DecodedActions
from univla_jax.tokenizers.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """The choices of a run that shape a task's sequences.

    Attributes:
      frames: moments per sample: chunks of a video policy, frames of a world model.
      chunk_size: steps of an action chunk.
      frame_spacing: steps between two frames of a world model; 0 takes each corpus' own.
      views: cameras in the order they are written; empty takes the corpus' ``policy_views``.
      views_together: whether a world model shows all cameras at every moment instead of one.
      state: whether the proprioceptive state is written before each chunk.
      aligned_windows: share of the windows that begin a whole number of chunks into their episode.
      max_committed: most committed actions written before a policy's newest chunk, a number drawn
        per sample from 0 on; 0 for none.
      advantage: whether a token behind the instruction says how good the chunks are.
      question_first: whether a question stands before the frames that it is about.
      wordless: whether the instruction is left out, so that frames follow from actions alone.
      state_steps: equal steps of the chunk as which a state is written; more are finer.
    """

    frames: int = 1
    chunk_size: int = 10
    frame_spacing: int = 0
    views: tuple[str, ...] = ()
    views_together: bool = False
    state: bool = False
    aligned_windows: float = 0.0
    max_committed: int = 0
    advantage: bool = False
    question_first: bool = False
    wordless: bool = False
    state_steps: int = 1


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a task needs of its data and of the model.

    Attributes:
      actions: action chunks, and so the statistics that normalize them.
      action_tokens: the chunks as tokens, and so an action tokenizer.
      state: may show the proprioceptive state before each chunk.
      committed: may show the actions that are executed before a chunk can begin.
      advantage: may show how good its chunks are.
      frame_sequence: may show more than one moment.
      single_view: shows one camera: the first, or one drawn among those named.
      frame_spacing: frames are ``TaskSettings.frame_spacing`` steps apart.
      own_row: one sample per row; packing is off.
      action_expert: a flow-matching expert on top of the decoder.
      question: asks a question about frames, which may stand before or behind them.
      wordless: may leave out the instruction.
      groundings: what phrases mean in the frames of an episode (``Episode.groundings``).
      texts: kinds of text that every episode must have (``Episode.texts``).
    """

    actions: bool = False
    action_tokens: bool = False
    state: bool = False
    committed: bool = False
    advantage: bool = False
    frame_sequence: bool = False
    single_view: bool = False
    frame_spacing: bool = False
    own_row: bool = False
    action_expert: bool = False
    question: bool = False
    wordless: bool = False
    groundings: bool = False
    texts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What may follow a prompt.

    Attributes:
      allowed: int32 [n] ids that may be chosen; None for the whole vocabulary.
      stop_id: ends the output; None where its length is fixed.
      max_new_tokens: the most ids chosen, the stop id included.
      grammar: of action codes, whose ids are ``allowed`` without the stop id; None for any order.
      forced_ids: int32 [max_new_tokens], the only id at each position, negative where any allowed
        one may stand; None where nothing is forced.
    """

    allowed: np.ndarray | None
    stop_id: int | None
    max_new_tokens: int
    grammar: CodeGrammar | None = None
    forced_ids: np.ndarray | None = None


ShownFrame = tuple[Codes, int]
"""A frame of a sample: the codes [T, h, w] of its view, and its step."""


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """A sample whose visual codes are not read yet, so that rows can be packed cheaply.

    Attributes:
      tokens: the sequence, every visual id that of code 0.
      shown: its frames in the order of their codes.
      actions: float32 [T, A] normalized chunk for the action expert, else None.
      name: the episode, for messages.
      task_id: position of its task in the run's mixture.
    """

    tokens: Tokens
    shown: Sequence[ShownFrame]
    actions: np.ndarray | None = None
    name: str = ""
    task_id: int = 0

    def __len__(self) -> int:
        """Number of tokens S."""
        return len(self.tokens)

    def fill(self, vocabulary: Vocabulary) -> Tokens:
        """The sequence with its visual codes, which are read from the store now.

        Raises:
          UserError: a code outside the vocabulary, or a damaged record.
        """
        # Only visual roles are placeholders, and ``shown`` is in the order of their positions, so
        # one masked assignment fills all frames. The reads of the codes happen here and nowhere
        # before: packing plans many samples for each one that a row finally takes.
        codes = np.concatenate([codes[step].ravel() for codes, step in self.shown])
        ids = self.tokens.ids.copy()
        ids[np.isin(self.tokens.roles, (Role.VISION, Role.SEEN))] = vocabulary.visual_ids(codes)
        return Tokens(ids, self.tokens.roles)


class Task(abc.ABC):
    """Base class of all tasks; picklable.

    Attributes:
      name: the registered name, which is the name of the module.
      labels: key of ``sequences.tokens.LABELS``: what is learned unless ``data.loss_on`` is set.
      needs: of data and model.
    """

    name: ClassVar[str]
    labels: ClassVar[str]
    needs: ClassVar[Needs] = Needs()

    def __init__(
        self,
        settings: TaskSettings,
        text_encoder: TextEncoder,
        action_tokenizer: ActionTokenizer | None = None,
        statistics: Mapping[str, ActionStatistics] | None = None,
    ) -> None:
        """Binds the task to the tokenizers; ``tasks.make_task`` takes them from assets.

        Args:
          settings: of the run.
          text_encoder: vocabulary and text tokenizer.
          action_tokenizer: of normalized chunks, where actions are written as tokens.
          statistics: of the actions by corpus, and of states by ``state_key``.
        """
        self.settings = settings
        self.text_encoder = text_encoder
        self.vocabulary = text_encoder.vocabulary
        self.action_tokenizer = action_tokenizer
        self.statistics = dict(statistics or {})

    @abc.abstractmethod
    def sample(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        """Draws a window of an episode and writes it.

        Args:
          episode: from a token store.
          instruction: the episode's, or "" for a null prompt.
          rng: draws the window and, where there is a choice, the camera.

        Raises:
          UserError: the episode is too short, or lacks a view, a text or statistics.
        """

    def longest_sample(self, episode: TokenizedEpisode, instruction: str) -> SampleSpec:
        """A sample with as many frames and chunks as any of the episode; raises as ``sample``."""
        return self.sample(episode, instruction, np.random.default_rng(0))

    def steps_needed(self, corpus: str) -> int:
        """The fewest steps of an episode of ``corpus`` that give a sample."""
        return self.settings.chunk_size if self.needs.actions else 1

    def opening(self, text: str) -> np.ndarray:
        """int32 ids of bos and ``text``, with which every sequence begins."""
        return opening(self.text_encoder, text)[1]

    # Frames that a model is to make: between those it chooses, ids are fed.

    def separator(self, grid: tuple[int, int]) -> np.ndarray:
        """int32 ids between the codes of a frame and those of one on ``grid``."""
        return frame_separator(self.text_encoder, *grid)

    def frame_decoding(self, grid: tuple[int, int]) -> Decoding:
        """How one frame is decoded: h*w visual ids."""
        visual = self.vocabulary.visual_ids(np.arange(self.vocabulary.visual_size))
        return Decoding(allowed=visual, stop_id=None, max_new_tokens=grid[0] * grid[1])

    def parse_frames(self, ids: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Codes uint16 [..., h, w] of the visual ids [..., h*w] of frames."""
        codes = self.vocabulary.visual_codes(ids)
        return codes.reshape(*ids.shape[:-1], *grid).astype(np.uint16)

    # Pieces that several tasks write.

    def compose(self, pieces: Sequence[Piece]) -> Tokens:
        """The sequence of some pieces."""
        return compose(self.vocabulary, pieces)

    def frame_pieces(
        self, views: Sequence[np.ndarray], frames_shown: int | None = None
    ) -> list[Piece]:
        """One block per camera with all of its frames; see ``frames.frame_block``."""
        return [
            (Role.MARKUP, frame_block(self.text_encoder, view, shown=frames_shown))
            for view in views
        ]

    # Parts of an episode.

    def draw_window(
        self,
        episode: TokenizedEpisode,
        frames: int,
        spacing: int,
        rng: np.random.Generator,
        *,
        behind: int = 0,
    ) -> range:
        """First steps of up to ``frames`` moments, ``spacing`` steps apart; see ``draw_window``."""
        steps, aligned = len(episode.actions), self.settings.aligned_windows
        return draw_window(steps, frames, spacing, rng, aligned=aligned, behind=behind)

    def view_codes(self, episode: TokenizedEpisode) -> list[Codes]:
        """Codes [T, h, w] of the named cameras, of the corpus' ``policy_views`` when none are.

        Raises:
          UserError: a camera is missing.
        """
        names = self.settings.views or policy_views(episode.corpus, episode.codes)
        missing = [name for name in names if name not in episode.codes]
        if missing or not names:
            raise UserError(f"no view {(*missing, 'at all')[0]!r}, only {sorted(episode.codes)}")
        return [episode.codes[name] for name in names]

    def draw_camera(self, episode: TokenizedEpisode, rng: np.random.Generator) -> Codes:
        """Codes [T, h, w] of the one camera a sample shows.

        Raises:
          UserError: the episode has none of the named ones.
        """
        if not self.settings.views:
            return self.view_codes(episode)[0]
        present = [name for name in self.settings.views if name in episode.codes]
        if not present:
            raise UserError(
                f"none of the views {self.settings.views}, only {sorted(episode.codes)}"
            )
        return episode.codes[present[int(rng.integers(len(present)))]]

    def normalized_chunks(self, episode: TokenizedEpisode, starts: range) -> np.ndarray:
        """float32 [N, T, A] the chunks at ``starts`` in the corpus' convention, normalized.

        Raises:
          UserError: there are no statistics of the corpus.
        """
        # Poses become differences to the first step of their own chunk before they are normalized:
        # the statistics are those of the differences.
        actions = episode.actions[starts.start : starts.stop]
        chunks = actions.reshape(-1, self.settings.chunk_size, actions.shape[-1])
        return self.normalize(episode.corpus, chunks)

    def chunk_lengths(self, episode: TokenizedEpisode) -> np.ndarray:
        """int [T - chunk_size + 1] ids of the chunk, and the state before it, at every step.

        Raises:
          UserError: the episode is shorter than a chunk, or there are no statistics of it.
        """
        chunks = sliding_windows([episode.actions], self.settings.chunk_size)
        ids = self.chunk_ids(self.normalize(episode.corpus, chunks))
        states = self.state_ids(episode, range(len(chunks))) or [()] * len(chunks)
        return np.array([len(chunk) + len(state) for chunk, state in zip(ids, states)])

    def normalize(self, corpus: str, chunks: np.ndarray) -> np.ndarray:
        """float32 [N, T, A] chunks in physical units in the corpus' convention, normalized.

        Raises:
          UserError: there are no statistics of the corpus.
        """
        deltas = chunk_deltas(corpus)
        if deltas is not None:
            chunks = deltas.to_relative(chunks)
        return self.statistics_of(corpus).normalize(chunks)

    def chunk_ids(self, chunks: np.ndarray) -> list[np.ndarray]:
        """int32 ids of normalized chunks, float32 [N, T, A], without boa and eoa."""
        return encode_chunks(self.vocabulary, self.action_tokenizer, chunks)

    def state_ids(self, episode: TokenizedEpisode, steps: Sequence[int]) -> list[np.ndarray] | None:
        """int32 ids of the state at each step; None where states are not shown.

        Raises:
          UserError: the episode has no state, or there are no statistics of it.
        """
        if not self.settings.state:
            return None
        if episode.state is None:
            raise UserError("it has no state; set data.state=False or leave its store out")
        return self.encode_states(episode.corpus, episode.state[np.asarray(steps)])

    def encode_states(self, corpus: str, states: np.ndarray) -> list[Any]:
        """What ``moment_prompt`` takes of each state float32 [N, P]: its int32 ids.

        Training and inference both encode states here, so that a policy is never shown one in
        another form than it was trained on.
        """
        statistics = self.statistics_of(state_key(corpus))
        steps = self.settings.state_steps
        return encode_states(self.vocabulary, self.action_tokenizer, statistics, states, steps)

    def max_state_tokens(self, state_dim: int) -> int:
        """The most ids of a state of ``state_dim`` numbers."""
        steps = self.settings.state_steps
        longest = self.action_tokenizer.max_tokens(steps, state_dim)
        # Equal steps have no frequency but 0; where trailing zeros are dropped no other is written.
        dropped = getattr(self.action_tokenizer, "drop_trailing_zeros", False)
        return longest // steps if dropped else longest

    def statistics_of(self, key: str) -> ActionStatistics:
        """Statistics of a corpus' actions, or by ``state_key`` of its states.

        Raises:
          UserError: there are none.
        """
        if key not in self.statistics:
            raise UserError(
                f"no statistics of {key!r}, only of {sorted(self.statistics)}; compute them when "
                "the assets are made"
            )
        return self.statistics[key]


class ActionTask(Task):
    """A task whose prompt ends where an action chunk begins.

    Its prompt is a history (``tasks/history.py``): frames, state and boa of each moment, and the
    chunks between them.
    """

    @property
    @abc.abstractmethod
    def history_window(self) -> int:
        """Observations in a prompt: the newest and those kept from earlier calls."""

    def moment_prompt(
        self,
        views: Sequence[np.ndarray],
        state: Any = None,
        *,
        instruction: str = "",
        frames_shown: int | None = None,
        committed: Sequence[np.ndarray] = (),
    ) -> np.ndarray:
        """int32 ids of one moment up to its boa, what a call adds to the prompt.

        Args:
          views: per camera integer [T, h, w] codes; one frame in the published policies.
          state: of ``encode_states``, or None where the policy was shown none.
          instruction: for tasks that write it at every moment; most have it in the opening alone.
          frames_shown: frames written of T (``frames.frame_block``).
          committed: of ``committed_ids``: the actions that are executed before the chunk begins.
        """
        del instruction
        frames = self.frame_pieces(views, frames_shown)
        return self.compose(self.moment(frames, state, None, committed)).ids

    def continued(self, episode: TokenizedEpisode) -> TokenizedEpisode:
        """The episode as samples show it: the robot stands still behind its end where some commit.

        A chunk behind committed actions begins up to a chunk and more after what is seen. Were it
        to end within the episode, the last moments before that would never be seen.
        """
        if not self.settings.max_committed:
            return episode
        still = np.repeat(episode.actions[-1:], self.settings.chunk_size - 1, axis=0)
        size = still.shape[1]
        moved = np.setdiff1d(np.arange(size), absolute_dims(episode.corpus, size))
        still[:, moved] = 0
        return dataclasses.replace(episode, actions=np.concatenate([episode.actions, still]))

    def committed_ids(self, corpus: str, actions: np.ndarray) -> list[np.ndarray]:
        """int32 ids of each of the actions float32 [N, A], chunks of one step, without boa and eoa.

        Raises:
          UserError: actions of the corpus are relative to the beginning of their chunk.
        """
        if chunk_deltas(corpus) is not None:
            raise UserError(
                f"corpus {corpus!r} has actions relative to the beginning of their chunk, so that "
                "committed ones cannot stand before another; set data.max_committed=0"
            )
        return self.chunk_ids(self.statistics_of(corpus).normalize(actions[:, None]))

    def max_committed_tokens(self, action_dim: int) -> int:
        """The most ids that committed actions take in a prompt, boa and eoa included."""
        if not self.settings.max_committed:
            return 0
        return self.settings.max_committed * (self.action_tokenizer.max_tokens(1, action_dim) + 2)

    def fallback(self, state: np.ndarray | None, steps: int) -> np.ndarray | None:
        """Actions [steps, A] in physical units in place of ids that do not decode.

        None leaves it to the policy, which stands still.

        Args:
          state: float [P] of the observation, or None.
          steps: of a chunk.
        """
        del state, steps
        return None

    def decoding(
        self, shape: tuple[int, int], *, free_form: bool = False, max_new_tokens: int = 0
    ) -> Decoding:
        """How a chunk is decoded: action ids and eoa, in an order that makes a whole chunk.

        Args:
          shape: steps T and action dimensions A of a chunk.
          free_form: any action ids in any order, as the reference has it.
          max_new_tokens: the most ids of a chunk, its eoa included; by default what the longest
            legal chunk needs.
        """
        tokenizer, vocabulary = self.action_tokenizer, self.vocabulary
        ids = vocabulary.action_ids(np.arange(tokenizer.vocabulary_size))
        return Decoding(
            allowed=np.append(ids, vocabulary.eoa),
            stop_id=vocabulary.eoa,
            max_new_tokens=max_new_tokens or tokenizer.max_tokens(*shape) + 1,
            grammar=None if free_form else tokenizer.grammar(*shape),
        )

    def parse(self, ids: np.ndarray, shape: tuple[int, int]) -> DecodedActions:
        """The normalized chunk [T, A] that generated ids [n] mean, their eoa included."""
        # Without eoa the number of new tokens ran out in the middle of a chunk. What decodes of it
        # might look like a chunk, so it is reported and never executed.
        if not len(ids) or ids[-1] != self.vocabulary.eoa:
            return DecodedActions.invalid(f"no end of action within {len(ids)} tokens", *shape)
        codes = self.vocabulary.action_codes(ids[:-1]).tolist()
        return self.action_tokenizer.decode(codes, *shape)

    def moment(
        self,
        frames: Sequence[Piece],
        state: np.ndarray | None,
        chunk: np.ndarray | None,
        committed: Sequence[np.ndarray] = (),
    ) -> list[Piece]:
        """Frames, state, committed actions and chunk of one moment; without one it ends with boa.

        ::

            fmt(v1) fmt(v2) [state] boa c eoa boa c eoa │ boa a a a eoa
                                    committed, given    │ chunk, learned: it begins after them
        """
        # Training writes a moment with its chunk and a prompt writes it without: the same lines, so
        # that a policy is never prompted with a sequence that it was not trained on. What is
        # committed is given as the state is, never learned, and each action has a block of its
        # own: their number, and so the step at which the chunk begins, can be seen.
        shown = [] if state is None else [(Role.STATE, np.asarray(state, np.int32))]
        given = [(Role.STATE, action_block(self.vocabulary, ids)[1]) for ids in committed]
        return [*frames, *shown, *given, action_block(self.vocabulary, chunk)]


class FrameTask(Task):
    """A task whose prompt ends where the codes of a frame begin."""

    @abc.abstractmethod
    def prompt(self, instruction: str, *context: np.ndarray) -> np.ndarray:
        """int32 ids of the context frames and the header of the next one.

        Args:
          instruction: what happens; "" is the null prompt of classifier-free guidance.
          *context: per camera integer [T, h, w] codes of the frames before it, oldest first.
        """


def draw_window(
    steps: int,
    frames: int,
    spacing: int,
    rng: np.random.Generator,
    *,
    aligned: float = 0.0,
    behind: int = 0,
) -> range:
    """Draws which steps of an episode one sample shows.

        episode        0 1 2 3 4 5 6 7 8 9 …                  n steps
        video policy       |f a a a|f a a a|                  ``frames`` chunks of ``spacing`` steps
          behind = 2         |f a a a|f c c a a a|            committed actions before the newest
        image policy       |f a a a|                          one chunk
        world model        |f . . .|f . . .|f . . .|          ``frames`` frames, ``spacing`` apart

    The start is uniform over every position where the window fits (UniVLA train/datasets.py:97);
    a short episode gives fewer whole chunks (``frames_num``, :175-179).

    Args:
      steps: length of the episode.
      frames: moments wanted.
      spacing: steps from one to the next.
      rng: draws the start.
      aligned: share of the windows whose newest chunk begins on a multiple of ``spacing`` instead.
      behind: steps from the newest moment to the beginning of its chunk.

    Returns:
      the first step of every moment; ``stop`` is the end of the window.

    Raises:
      UserError: the episode is shorter than one chunk.
    """
    size = spacing * window_frames(steps - behind, frames, spacing)
    last = steps - behind - size
    # A policy that executes whole chunks begins them on multiples of ``spacing``; what it sees for
    # one is ``behind`` steps older.
    first = -behind % spacing
    if aligned and first <= last and rng.random() < aligned:
        start = first + spacing * int(rng.integers(0, (last - first) // spacing, endpoint=True))
    else:
        start = int(rng.integers(0, last, endpoint=True))
    return range(start, start + size, spacing)


def window_frames(steps: int, frames: int, spacing: int) -> int:
    """How many whole chunks of ``spacing`` steps a window has, at most ``frames``.

    Raises:
      UserError: the episode is shorter than one chunk.
    """
    whole = min(frames, steps // spacing)
    if not whole:
        raise UserError(f"{steps} steps are fewer than one chunk of {spacing}")
    return whole


def placeholders(codes: Codes, frames: int) -> np.ndarray:
    """Code 0 in the shape [frames, h, w] of a view, until ``SampleSpec.fill``."""
    return np.zeros((frames, *codes.shape[1:]), np.uint16)


def frames_in_order(views: Sequence[Codes], steps: Sequence[int]) -> list[ShownFrame]:
    """The frames as interleaved sequences show them: every view of a moment, then the next."""
    return [(view, int(step)) for step in steps for view in views]


def ordered_views(corpus: str, present: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """The cameras ``present`` in the order of the corpus' configuration, then any others."""
    dataset = DATASETS.get(corpus)
    known = [name for name in (dataset.views if dataset else ()) if name in present]
    return known + [name for name in present if name not in known]


def policy_views(corpus: str, present: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Of the cameras ``present`` those that the corpus' configuration shows to a policy."""
    dataset = DATASETS.get(corpus)
    named = [name for name in (dataset.policy_views if dataset else ()) if name in present]
    return named or ordered_views(corpus, present)


def corpus_frame_spacing(settings: TaskSettings, corpus: str) -> int:
    """Steps between two frames: the run's, else the corpus' own."""
    return settings.frame_spacing or find_dataset_config(corpus).frame_spacing


def text_at(episode: TokenizedEpisode, kind: str, step: int) -> str:
    """The annotation ``kind`` that holds at ``step``.

    Raises:
      UserError: the episode has none of that kind.
    """
    if kind not in episode.texts:
        raise UserError(f"it has no {kind!r} text, only {sorted(episode.texts)}")
    texts = episode.texts[kind]
    return texts[step] if len(texts) > 1 else texts[0]


def count_moments(views: Sequence[np.ndarray]) -> int:
    """Number of frames T, the same in every view.

    Raises:
      UserError: no view, or views of different length.
    """
    counts = {len(view) for view in views}
    if len(counts) != 1:
        raise UserError(f"views hold {sorted(counts)} frames; each needs the same number")
    return counts.pop()
