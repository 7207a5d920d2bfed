"""What cameras and joints deliver, checked and turned into tokens as the training data was.

Axes: N observations, H/W pixels, h/w code grid, P state dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from univla_jax.assets import Assets
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.inference.loaded_model import Layout, LoadedModel
from univla_jax.normalization import state_key
from univla_jax.sequences.chunks import encode_states


class ObservationEncoder:
    """Checks observations and encodes their frames, one batch per view."""

    def __init__(self, assets: Assets, layout: Layout, corpus: str) -> None:
        """Takes the views, image specs and code grids of a checkpoint.

        Args:
          assets: with image specs and a vision tokenizer.
          layout: says which views are written, in which order.
          corpus: row whose cameras these are.

        Raises:
          UserError: no vision tokenizer, or no image spec of a view.
        """
        self._vision = assets.require("vision")
        self._grids = {v: tuple(layout.corpora[corpus].grids[v]) for v in layout.views}
        missing = sorted(set(layout.views) - set(assets.image_specs))
        if missing:
            raise UserError(f"the checkpoint's assets hold no image spec of view {missing[0]!r}")
        self._specs = {view: assets.image_specs[view] for view in layout.views}

    @property
    def views(self) -> tuple[str, ...]:
        """The cameras an observation must have."""
        return tuple(self._specs)

    def example(self) -> Observation:
        """A black observation of a size the policy takes."""
        frames = {}
        for view, spec in self._specs.items():
            grid = np.array(self._grids[view])
            size = spec.size or tuple(grid * self._vision.factor)
            frames[view] = np.zeros((*size, 3), np.uint8)
        return Observation("", frames)

    def check(self, observation: Observation, name: str) -> None:
        """Checks one observation before anything is computed.

        Args:
          observation: what is looked at.
          name: what it is called in messages.

        Raises:
          UserError: a view that is missing, or a frame of another dtype, shape or size; an
            instruction that is no text.
        """
        if not isinstance(observation.instruction, str):
            kind = type(observation.instruction).__name__
            raise UserError(f"{name}: instruction is a {kind}, expected text")
        for view in self._specs:
            if view not in observation.frames:
                has = ", ".join(sorted(observation.frames)) or "none"
                raise UserError(
                    f"{name}: view {view!r} is missing; it has {has}, the policy sees "
                    f"{', '.join(self.views)}"
                )
            self._check_frame(np.asarray(observation.frames[view]), view, name)

    def encode(
        self, observations: Sequence[Observation], batch_size: int | None = None
    ) -> list[list[np.ndarray]]:
        """Codes of every view of every observation.

        Args:
          observations: checked ones.
          batch_size: size of the encoded batches, at least the number of observations; missing rows
            repeat the first, so that shapes stay the same from call to call.

        Returns:
          per observation, per view in order, uint16 [1, h, w].
        """
        by_view = [self._encode_view(view, observations, batch_size) for view in self._specs]
        return [[codes[i : i + 1] for codes in by_view] for i in range(len(observations))]

    def _encode_view(
        self, view: str, observations: Sequence[Observation], batch_size: int | None
    ) -> np.ndarray:
        spec = self._specs[view]
        frames = [spec.resize(np.asarray(o.frames[view])[None]) for o in observations]
        frames += frames[:1] * max(0, (batch_size or 0) - len(frames))
        return self._vision.encode_frames(np.concatenate(frames))

    def _check_frame(self, frame: np.ndarray, view: str, name: str) -> None:
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
            found = f"{frame.dtype} {list(frame.shape)}"
            raise UserError(f"{name}: view {view!r} is {found}, expected uint8 [H, W, 3], RGB")
        height, width = frame.shape[:2]
        try:
            grid = self._specs[view].grid_size(height, width)
        except UserError as error:
            raise UserError(f"{name}: view {view!r} cannot be resized: {error}") from error
        if grid != self._grids[view]:
            raise UserError(
                f"{name}: view {view!r} has {height} x {width} pixels, which make a grid of "
                f"{grid} codes; the policy was trained on {self._grids[view]}: send frames of the "
                "size of the training data"
            )


class StateEncoder:
    """Checks proprioceptive states and writes them as the policy was shown them.

    Attributes:
      max_tokens: the most ids of one state.
    """

    def __init__(self, trained: LoadedModel, corpus: str) -> None:
        """Takes the state statistics of ``corpus``.

        Raises:
          UserError: the checkpoint has none.
        """
        self._text_encoder, self._tokenizer = trained.text_encoder, trained.assets.require("action")
        self._statistics = trained.statistics(state_key(corpus))
        self._size = self._statistics.action_dim
        self.max_tokens = self._tokenizer.max_tokens(1, self._size)

    def example(self) -> np.ndarray:
        """A state the policy takes: float32 [P] zeros."""
        return np.zeros(self._size, np.float32)

    def check(self, state: np.ndarray | None, name: str) -> None:
        """Raises UserError, which calls the observation ``name``, for a state it cannot write."""
        wanted = f"the policy was trained with {self._size} finite numbers of proprioception"
        if state is None:
            raise UserError(f"{name}: it has no state; {wanted}")
        try:
            numbers = np.asarray(state)
        except ValueError:
            raise UserError(f"{name}: its state is ragged; {wanted}") from None
        if numbers.dtype.kind not in "iuf" or numbers.shape != (self._size,):
            found = f"{numbers.dtype} {list(numbers.shape)}"
            raise UserError(f"{name}: its state is {found}; {wanted}")
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused as infinite
            broken = np.flatnonzero(~np.isfinite(numbers.astype(np.float32)))
        if len(broken):
            what = f"number {broken[0]} of its state is {numbers[broken[0]]}"
            raise UserError(f"{name}: {what}; {wanted}")

    def encode(self, states: Sequence[np.ndarray]) -> list[np.ndarray]:
        """int32 ids of each of the checked states, [P]."""
        stacked = np.asarray(states, np.float32).reshape(-1, self._size)
        return encode_states(self._text_encoder, self._tokenizer, self._statistics, stacked)


class NoStates:
    """In its place where a policy was shown no states: what an observation brings is left out."""

    max_tokens = 0

    def example(self) -> None:
        """No state."""

    def check(self, state: np.ndarray | None, name: str) -> None:
        """Anything will do."""

    def encode(self, states: Sequence[np.ndarray | None]) -> list[None]:
        """None for each."""
        return [None] * len(states)
