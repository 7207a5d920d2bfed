"""Observations: camera frames and proprioception, checked and encoded as the training data was.

Axes: N observations, H/W pixels, h/w code grid, P state dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from univla_jax.assets import Assets
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.normalization import state_key
from univla_jax.tasks import TaskRecord


class ObservationEncoder:
    """Checks observations and encodes their frames, one batch per view."""

    def __init__(self, assets: Assets, record: TaskRecord, corpus: str) -> None:
        """Takes the views, image specs and code grids of a checkpoint.

        Args:
          assets: with image specs and a vision tokenizer.
          record: says which views are shown, in which order.
          corpus: whose cameras these are.

        Raises:
          UserError: no vision tokenizer, or no image spec of a view.
        """
        self._vision = assets.require("vision")
        views, grids = record.views_of(corpus), record.corpora[corpus].grids
        self._grids = {view: tuple(grids[view]) for view in views}
        self._specs = {view: assets.image_spec(corpus, view) for view in views}

    @property
    def views(self) -> tuple[str, ...]:
        """The cameras an observation must have."""
        return tuple(self._specs)

    def example(self) -> Observation:
        """A black observation of a size the policy takes."""
        frames = {}
        for view, spec in self._specs.items():
            size = spec.size or tuple(np.array(self._grids[view]) * self._vision.factor)
            frames[view] = np.zeros((*spec.whole_frame(*size), 3), np.uint8)
        return Observation("", frames)

    def check(self, observation: Observation, name: str) -> None:
        """Checks one observation before anything is computed.

        Args:
          observation: instruction and frames.
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
          batch_size: of the vision tokenizer, at least the number of observations; what is missing
            repeats the first, so that shapes stay the same from call to call.

        Returns:
          per observation, per view in order, uint16 [1, h, w].
        """
        by_view = []
        for view, spec in self._specs.items():
            frames = [spec.resize(np.asarray(o.frames[view])[None]) for o in observations]
            frames += frames[:1] * max(0, (batch_size or 0) - len(frames))
            by_view.append(self._vision.encode_frames(np.concatenate(frames)))
        return [[codes[i : i + 1] for codes in by_view] for i in range(len(observations))]

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
    """Checks proprioceptive states and encodes them as the policy was shown them.

    Attributes:
      max_tokens: the most ids of one state.
    """

    def __init__(self, loaded: LoadedModel, corpus: str) -> None:
        """Takes the state statistics of ``corpus``.

        Raises:
          UserError: the checkpoint has none.
        """
        self._task, self._corpus = loaded.task, corpus
        self._size = loaded.statistics(state_key(corpus)).action_dim
        self.max_tokens = self._task.max_state_tokens(self._size)

    def example(self) -> np.ndarray:
        """A state the policy takes: float32 [P] zeros."""
        return np.zeros(self._size, np.float32)

    def check(self, state: np.ndarray | None, name: str) -> None:
        """Raises UserError, which calls the observation ``name``, for a state it cannot encode."""
        check_state(state, self._size, name, "the policy was trained with")

    def encode(self, states: Sequence[np.ndarray]) -> list[Any]:
        """Each of the checked states [P] as the task's prompts take it."""
        stacked = np.asarray(states, np.float32).reshape(-1, self._size)
        return self._task.encode_states(self._corpus, stacked)


class NoStateEncoder:
    """Stands for a ``StateEncoder`` where the policy was shown no states: they are ignored."""

    max_tokens = 0

    def example(self) -> None:
        """No state."""

    def check(self, state: np.ndarray | None, name: str) -> None:
        """Accepts anything."""

    def encode(self, states: Sequence[np.ndarray | None]) -> list[None]:
        """None for each."""
        return [None] * len(states)


def check_state(state: np.ndarray | None, size: int, name: str, why: str) -> None:
    """Checks that a state is ``size`` finite numbers.

    Args:
      state: of an observation.
      size: numbers P expected.
      name: what the observation is called in messages.
      why: who wants them, the beginning of the remedy.

    Raises:
      UserError: it is missing, ragged, of another size or kind, or not finite.
    """
    wanted = f"{why} {size} finite numbers of proprioception"
    if state is None:
        raise UserError(f"{name}: it has no state; {wanted}")
    try:
        numbers = np.asarray(state)
    except ValueError:
        raise UserError(f"{name}: its state is ragged; {wanted}") from None
    if numbers.dtype.kind not in "iuf" or numbers.shape != (size,):
        found = f"{numbers.dtype} {list(numbers.shape)}"
        raise UserError(f"{name}: its state is {found}; {wanted}")
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused as infinite
        broken = np.flatnonzero(~np.isfinite(numbers.astype(np.float32)))
    if len(broken):
        what = f"number {broken[0]} of its state is {numbers[broken[0]]}"
        raise UserError(f"{name}: {what}; {wanted}")
