"""One episode in, one token sequence out: window, action codes, layout and labels.

Axes: T steps, A action dimensions, n tokens.
"""

from __future__ import annotations

import numpy as np

from univla_jax.assets import Assets
from univla_jax.data.datasets import DATASETS, find_dataset_config
from univla_jax.data.token_record import Codes, TokenizedEpisode
from univla_jax.errors import UserError
from univla_jax.normalization import ActionStatistics, state_key
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.sequences import layouts
from univla_jax.sequences.chunks import encode_chunks, encode_states
from univla_jax.sequences.drafts import SampleSpec, by_moment, placeholders
from univla_jax.sequences.labels import LABELS, loss_weight
from univla_jax.sequences.text_encoder import TextEncoder
from univla_jax.sequences.windows import draw_start, window_steps

Row = dict[str, np.ndarray]


class SampleBuilder:
    """Draws a window of an episode and writes it in the config's layout; picklable."""

    def __init__(self, config: DataConfig, assets: Assets) -> None:
        """Takes what it needs of the assets.

        Args:
          config: layout, window and labels.
          assets: vocabulary, text and action tokenizer, and action statistics per corpus. Layouts
            without actions use the first two alone.
        """
        self._config = config
        self._text_encoder = TextEncoder(assets.vocabulary, assets.text)
        self._labeled = LABELS[config.labeled]
        self._layout = getattr(self, f"_{config.layout}")
        self._action = assets.require("action") if config.writes_actions else None
        self._statistics = dict(assets.statistics) if config.acts else {}

    def __call__(self, episode: TokenizedEpisode, rng: np.random.Generator) -> Row:
        """One training sample; see ``draft`` and ``row``."""
        return self.row(self.draft(episode, rng))

    def draft(self, episode: TokenizedEpisode, rng: np.random.Generator) -> SampleSpec:
        """A sample of which no code has been read.

        Args:
          episode: from a token store.
          rng: draws the window, the camera of the world model and the null prompt.

        Raises:
          UserError: names the episode and what is wrong: shorter than one chunk, a view, a text
            or the statistics missing, or too long for ``sequence_length``.
        """
        instruction = episode.instruction
        if self._config.null_prompt_prob and rng.random() < self._config.null_prompt_prob:
            instruction = ""
        name = f"episode {episode.corpus}/{episode.episode_id}"
        try:
            draft = self._layout(episode, instruction, rng)
            self._check_length(draft)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        return SampleSpec(draft.tokens, draft.shown, draft.actions, name)

    def row(self, draft: SampleSpec) -> Row:
        """The sample with its codes.

        Returns:
          ``tokens`` int32 [n] and ``loss_weight`` float32 [n], n at most ``sequence_length``; for
          the flow expert also ``actions`` float32 [T, A].

        Raises:
          UserError: names the episode whose record is damaged or has a code outside the vocabulary.
        """
        try:
            tokens = draft.fill(self._text_encoder.vocabulary)
        except UserError as error:
            raise UserError(f"{draft.name}: {error}") from error
        weight = loss_weight(tokens, self._labeled, self._config.vision_weight)
        row = {"tokens": tokens.ids, "loss_weight": weight}
        return row if draft.actions is None else {**row, "actions": draft.actions}

    def _policy_video(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        size = self._config.chunk_size
        window = self._draw(episode, self._config.frames, size, rng)
        views, steps = self._views(episode), range(window.start, window.stop, size)
        tokens = layouts.policy_video(
            self._text_encoder,
            instruction,
            [placeholders(view, len(steps)) for view in views],
            self._chunks(episode, window),
            self._states(episode, steps),
        )
        return SampleSpec(tokens, by_moment(views, steps))

    def _policy_image(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        window = self._draw(episode, 1, self._config.chunk_size, rng)
        views = self._views(episode)
        (chunk,) = self._chunks(episode, window)
        states = self._states(episode, [window.start])
        tokens = layouts.policy_image(
            self._text_encoder, instruction, _one_frame(views), chunk, states and states[0]
        )
        return SampleSpec(tokens, by_moment(views, [window.start]))

    def _policy_flow(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        window = self._draw(episode, 1, self._config.chunk_size, rng)
        views = self._views(episode)
        tokens = layouts.policy_flow(self._text_encoder, instruction, _one_frame(views))
        (actions,) = self._normalized_chunks(episode, window)
        return SampleSpec(tokens, by_moment(views, [window.start]), actions)

    def _chain_of_thought(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        window = self._draw(episode, 1, self._config.chunk_size, rng)
        views, reasoning = self._views(episode), _text(episode, "reasoning", window.start)
        (chunk,) = self._chunks(episode, window)
        tokens = layouts.chain_of_thought(
            self._text_encoder, instruction, _one_frame(views), reasoning, chunk
        )
        return SampleSpec(tokens, by_moment(views, [window.start]))

    def _world_model(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        spacing = self._config.frame_spacing or find_dataset_config(episode.corpus).frame_spacing
        window = self._draw(episode, self._config.frames, spacing, rng)
        view, steps = self._camera(episode, rng), range(window.start, window.stop, spacing)
        tokens = layouts.world_model(
            self._text_encoder, instruction, [placeholders(view, len(steps))]
        )
        return SampleSpec(tokens, by_moment([view], steps))

    def _question(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        views, step = self._views(episode), self._draw(episode, 1, 1, rng).start
        asked = _text(episode, "question", step) if "question" in episode.texts else instruction
        answer = _text(episode, "answer", step)
        tokens = layouts.question(self._text_encoder, asked, _one_frame(views), answer)
        return SampleSpec(tokens, by_moment(views, [step]))

    def _caption(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        views, step = self._views(episode), self._draw(episode, 1, 1, rng).start
        tokens = layouts.caption(self._text_encoder, instruction, _one_frame(views))
        return SampleSpec(tokens, by_moment(views, [step]))

    def _text_to_image(
        self, episode: TokenizedEpisode, instruction: str, rng: np.random.Generator
    ) -> SampleSpec:
        view, step = self._camera(episode, rng), self._draw(episode, 1, 1, rng).start
        tokens = layouts.text_to_image(self._text_encoder, instruction, placeholders(view, 1)[0])
        return SampleSpec(tokens, by_moment([view], [step]))

    def _draw(
        self, episode: TokenizedEpisode, frames: int, spacing: int, rng: np.random.Generator
    ) -> slice:
        steps = len(episode.actions)
        size = window_steps(steps, frames, spacing)
        start = draw_start(steps, size, rng, spacing=spacing, aligned=self._config.aligned_windows)
        return slice(start, start + size)

    def _chunks(self, episode: TokenizedEpisode, window: slice) -> list[np.ndarray]:
        """Action ids of each chunk of the window."""
        return encode_chunks(
            self._text_encoder, self._action, self._normalized_chunks(episode, window)
        )

    def _normalized_chunks(self, episode: TokenizedEpisode, window: slice) -> np.ndarray:
        """float32 [N, T, A] as the corpus' chunks are meant, normalized."""
        actions = episode.actions[window]
        chunks = actions.reshape(-1, self._config.chunk_size, actions.shape[-1])
        row = DATASETS.get(episode.corpus)
        if row is not None and row.chunk_deltas is not None:
            chunks = row.chunk_deltas.to_relative(chunks)
        return self._statistics_of(episode.corpus).normalize(chunks)

    def _states(self, episode: TokenizedEpisode, steps: range | list[int]) -> list | None:
        """Ids of the state at each step as a chunk of one step; None where states are not shown."""
        if not self._config.state:
            return None
        if episode.state is None:
            raise UserError("it has no state; set data.state=False or leave its store out")
        statistics = self._statistics_of(state_key(episode.corpus))
        states = episode.state[np.asarray(steps)]
        return encode_states(self._text_encoder, self._action, statistics, states)

    def _statistics_of(self, key: str) -> ActionStatistics:
        if key not in self._statistics:
            raise UserError(
                f"no statistics of {key!r}, only of {sorted(self._statistics)}; compute them when "
                "the assets are made"
            )
        return self._statistics[key]

    def _views(self, episode: TokenizedEpisode) -> list[Codes]:
        """Codes [T, h, w] of the configured cameras, of all when none are named."""
        names = self._config.views or _all_views(episode)
        missing = [name for name in names if name not in episode.codes]
        if missing or not names:
            raise UserError(f"no view {(*missing, 'at all')[0]!r}, only {sorted(episode.codes)}")
        return [episode.codes[name] for name in names]

    def _camera(self, episode: TokenizedEpisode, rng: np.random.Generator) -> Codes:
        """Codes [T, h, w] of the one camera a world-model sample shows."""
        if not self._config.views:
            return self._views(episode)[0]
        present = [name for name in self._config.views if name in episode.codes]
        if not present:
            raise UserError(f"none of the views {self._config.views}, only {sorted(episode.codes)}")
        return episode.codes[present[int(rng.integers(len(present)))]]

    def _check_length(self, draft: SampleSpec) -> None:
        if len(draft) > self._config.sequence_length:
            raise UserError(
                f"its sample has {len(draft)} tokens, more than "
                f"data.sequence_length={self._config.sequence_length}; raise it, or take fewer "
                "frames, views or a shorter instruction"
            )


def _one_frame(views: list[Codes]) -> list[np.ndarray]:
    return [placeholders(view, 1) for view in views]


def _text(episode: TokenizedEpisode, kind: str, step: int) -> str:
    """The text of a kind that holds at ``step``."""
    if kind not in episode.texts:
        raise UserError(f"it has no {kind!r} text, only {sorted(episode.texts)}")
    texts = episode.texts[kind]
    return texts[step] if len(texts) > 1 else texts[0]


def _all_views(episode: TokenizedEpisode) -> list[str]:
    """The cameras of an episode: in the order of its corpus' row, then any others."""
    row = DATASETS.get(episode.corpus)
    known = [name for name in (row.views if row else ()) if name in episode.codes]
    return known + [name for name in episode.codes if name not in known]
