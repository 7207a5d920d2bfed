"""One episode in, one token sequence out: window, action codes, layout and labels.

Axes: T steps, A action dimensions, n tokens.
"""

from __future__ import annotations

import numpy as np

from univla_jax.data.corpora import CORPORA, find_corpus
from univla_jax.data.token_record import TokenizedEpisode
from univla_jax.errors import UserError
from univla_jax.sequences import layouts
from univla_jax.sequences.data_config import DataConfig
from univla_jax.sequences.labels import LABELS, loss_weight
from univla_jax.sequences.lexicon import Lexicon
from univla_jax.sequences.packing import Row
from univla_jax.sequences.tokens import Tokens
from univla_jax.sequences.windows import draw_start, window_steps
from univla_jax.tokenizers.assets import Assets


class SampleBuilder:
    """Draws a window of an episode and writes it in the config's layout; picklable."""

    def __init__(self, config: DataConfig, assets: Assets) -> None:
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
        self._action = assets.require("action") if acts else None
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
        frames = self._camera(episode, rng)[window][::spacing]
        return layouts.world_model(self._lexicon, instruction, [frames])

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
        ids = self._lexicon.vocabulary.action_ids(np.concatenate(encoded))
        return np.split(ids, np.cumsum([len(codes) for codes in encoded[:-1]]))

    def _views(self, episode: TokenizedEpisode) -> list[np.ndarray]:
        """Codes [T, h, w] of the configured cameras, of all when none are named."""
        names = self._config.views or _all_views(episode)
        missing = [name for name in names if name not in episode.codes]
        if missing or not names:
            raise UserError(f"no view {(*missing, 'at all')[0]!r}, only {sorted(episode.codes)}")
        return [episode.codes[name] for name in names]

    def _camera(self, episode: TokenizedEpisode, rng: np.random.Generator) -> np.ndarray:
        """Codes [T, h, w] of the one camera a world-model sample shows."""
        if not self._config.views:
            return self._views(episode)[0]
        present = [name for name in self._config.views if name in episode.codes]
        if not present:
            raise UserError(f"none of the views {self._config.views}, only {sorted(episode.codes)}")
        return episode.codes[present[int(rng.integers(len(present)))]]

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


def _all_views(episode: TokenizedEpisode) -> list[str]:
    """The cameras of an episode: in the order of its corpus' row, then any others."""
    row = CORPORA.get(episode.corpus)
    known = [name for name in (row.views if row else ()) if name in episode.codes]
    return known + [name for name in episode.codes if name not in known]
