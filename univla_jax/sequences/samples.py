"""One episode in, one token sequence out: window, action codes, layout and labels.

Axes: T steps, A action dimensions, n tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from univla_jax.data.actions import ActionStatistics
from univla_jax.data.corpora import find_corpus
from univla_jax.errors import UserError
from univla_jax.sequences import layouts
from univla_jax.sequences.data_config import DataConfig
from univla_jax.sequences.labels import LABELS, loss_weight
from univla_jax.sequences.lexicon import Lexicon
from univla_jax.sequences.packing import Row
from univla_jax.sequences.sources import TokenizedEpisode
from univla_jax.sequences.tokens import Tokens
from univla_jax.sequences.windows import draw_start, window_steps
from univla_jax.tokenizers.action import ActionTokenizer
from univla_jax.tokenizers.text import TextTokenizer
from univla_jax.tokenizers.vocabulary import Vocabulary


class SequenceAssets(Protocol):
    """The part of a checkpoint's ``Assets`` that sequences are made with."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The ids of the model."""

    @property
    def text(self) -> TextTokenizer:
        """Instructions to ids."""

    @property
    def action(self) -> ActionTokenizer | None:
        """Action chunks to codes; a world model needs none."""

    @property
    def statistics(self) -> Mapping[str, ActionStatistics]:
        """Action statistics per corpus."""


class SampleBuilder:
    """Draws a window of an episode and writes it in the config's layout; picklable."""

    def __init__(self, config: DataConfig, assets: SequenceAssets) -> None:
        """Takes what it needs of the assets.

        Args:
          config: layout, window and labels.
          assets: vocabulary, text and action tokenizer, and action statistics per corpus. The
            world model uses the first two alone.
        """
        self._config = config
        self._lexicon = Lexicon(assets.vocabulary, assets.text)
        self._labelled = LABELS[config.labelled]
        self._layout = getattr(self, f"_{config.layout}")
        acts = config.layout != "world_model"
        self._action = assets.action if acts else None
        self._statistics = dict(assets.statistics) if acts else {}

    def __call__(self, episode: TokenizedEpisode, rng: np.random.Generator) -> Row:
        """One training sample.

        Args:
          episode: from a token store.
          rng: draws the window, the camera of the world model and the null prompt.

        Returns:
          ``tokens`` int32 [n] and ``loss_weight`` float32 [n], n at most ``sequence_length``.

        Raises:
          UserError: names the episode and what is wrong: shorter than one chunk, a view or the
            statistics missing, too long for ``sequence_length``, a code outside the vocabulary.
        """
        try:
            tokens = self.tokens(episode, rng)
            self._check_length(tokens)
        except UserError as error:
            raise UserError(f"episode {episode.corpus}/{episode.episode_id}: {error}") from error
        weight = loss_weight(tokens, self._labelled, self._config.vision_weight)
        return {"tokens": tokens.ids, "loss_weight": weight}

    def tokens(self, episode: TokenizedEpisode, rng: np.random.Generator) -> Tokens:
        """The token sequence of one window with its roles, before labels."""
        instruction = episode.instruction
        if self._config.null_prompt_prob and rng.random() < self._config.null_prompt_prob:
            instruction = ""
        return self._layout(episode, instruction, rng)

    def _policy_video(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> Tokens:
        size = self._config.action_frames
        window = self._draw(episode, self._config.frames, size, rng)
        views = [codes[window][::size] for codes in self._views(episode)]
        chunks = self._chunks(episode, window)
        return layouts.policy_video(self._lexicon, instruction, views, chunks)

    def _policy_image(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> Tokens:
        window = self._draw(episode, 1, self._config.action_frames, rng)
        views = [codes[window][:1] for codes in self._views(episode)]
        (chunk,) = self._chunks(episode, window)
        return layouts.policy_image(self._lexicon, instruction, views, chunk)

    def _world_model(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> Tokens:
        spacing = self._spacing(episode)
        window = self._draw(episode, self._config.frames, spacing, rng)
        views = self._views(episode)
        choices = len(views) if self._config.views else 1
        view = views[int(rng.integers(choices))] if choices > 1 else views[0]
        return layouts.world_model(self._lexicon, instruction, [view[window][::spacing]])

    def _draw(
        self, episode: TokenizedEpisode, frames: int, spacing: int, rng: np.random.Generator
    ) -> slice:
        steps = len(episode.actions)
        size = window_steps(steps, frames, spacing)
        start = draw_start(steps, size, rng)
        return slice(start, start + size)

    def _chunks(self, episode: TokenizedEpisode, window: slice) -> list[np.ndarray]:
        """Action ids of each chunk of the window."""
        if episode.corpus not in self._statistics:
            raise UserError(
                f"no action statistics of its corpus, only of {sorted(self._statistics)}; compute "
                "them when the assets are made"
            )
        actions = self._statistics[episode.corpus].normalise(episode.actions[window])
        chunks = actions.reshape(-1, self._config.action_frames, actions.shape[-1])
        encoded = self._action.encode_batch(chunks)
        return [self._lexicon.vocabulary.action_ids(codes) for codes in encoded]

    def _views(self, episode: TokenizedEpisode) -> list[np.ndarray]:
        """Codes [T, h, w] of the configured cameras, of all when none are named."""
        try:
            views = [episode.codes[name] for name in self._config.views or episode.codes]
        except KeyError as error:
            raise UserError(
                f"no view {error}, only {sorted(episode.codes)}; set data.views"
            ) from error
        if not views:
            raise UserError("it holds no view")
        return views

    def _spacing(self, episode: TokenizedEpisode) -> int:
        """Steps between two frames of the world model."""
        return self._config.frame_spacing or find_corpus(episode.corpus).frame_spacing

    def _check_length(self, tokens: Tokens) -> None:
        if len(tokens) > self._config.sequence_length:
            raise UserError(
                f"its sample has {len(tokens)} tokens, more than "
                f"data.sequence_length={self._config.sequence_length}; raise it, or take fewer "
                "frames, views or a shorter instruction"
            )
