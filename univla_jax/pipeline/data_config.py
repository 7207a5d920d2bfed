"""The data part of a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from univla_jax.errors import UserError
from univla_jax.sequences.labels import LABELS

LAYOUTS: Mapping[str, str] = {
    "policy_video": "action",
    "policy_image": "action",
    "policy_flow": "action",
    "chain_of_thought": "thought_and_action",
    "world_model": "vision",
    "question": "answer",
    "caption": "both",
    "text_to_image": "both",
}
"""The layouts of ``layouts.py``, and what each learns unless ``loss_on`` says otherwise."""

WITH_STATE = ("policy_video", "policy_image")
"""Those that have a place for the proprioceptive state."""

_MOMENTS = ("policy_video", "world_model")
_UNITS = ("episode", "store")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What the training batches are made of; built with ``univla_jax.config.build_config``.

    Attributes:
      stores: folders of token stores, one per corpus or suite.
      layout: key of ``LAYOUTS``.
      sequence_length: tokens S of a row.
      batch_size: rows B of a step over all hosts.
      weights: one per store, all 1 when empty.
      weight_unit: "episode": a store is drawn in proportion to weight x its episodes, so equal
        weights make an epoch of everything, as the reference's sampler does; "store": in
        proportion to its weight alone.
      frames: moments per sample: chunks of the video policy, frames of the world model; 1 for all
        other layouts.
      chunk_size: steps of an action chunk.
      state: whether policies see the proprioceptive state, written before each chunk.
      views: cameras in the order they are written; empty takes all, in the order of the corpus'
        row. The world model shows one: the first when empty, else by chance one of those named
        that the episode has.
      frame_spacing: steps between two frames of the world model; 0 takes each corpus' own.
      aligned_windows: share of the windows that begin a whole number of chunks into their episode,
        where a policy that executes whole chunks is asked; the rest begins anywhere. In short
        episodes the first chunk, which only the instruction decides, would else be rare.
      loss_on: key of ``labels.LABELS``; empty takes the layout's own. "both" with a vision weight
        is the composite loss of the action's accuracy and the predicted frames' consistency.
      vision_weight: loss weight of a visual id; other labeled ids weigh 1.
      null_prompt_prob: share of samples with an empty instruction, for guidance.
      packing: True packs samples first-fit; False pads each to a row of its own.
      packing_bins: rows packed together for each row of the batch; more fill better and hold more
        samples in memory.
      seed: of the order and the windows.
      workers: processes that build rows; 0 builds in this one. Best a divisor of a host's rows.
      read_threads: threads per process that read and build; 0 does it when asked.
      prefetch_batches: batches made ahead on a thread; 0 makes them when asked.
      held_out_every: each so many-th episode of a store is for evaluation and never trained on; 0
        holds none out, and evaluation then reads whole stores.
    """

    stores: tuple[str, ...]
    layout: str
    sequence_length: int
    batch_size: int
    weights: tuple[float, ...] = ()
    weight_unit: str = "episode"
    frames: int = 2
    chunk_size: int = dataclasses.field(default=10, metadata={"formerly": "action_frames"})
    state: bool = False
    views: tuple[str, ...] = ()
    frame_spacing: int = 0
    aligned_windows: float = 0.0
    loss_on: str = ""
    vision_weight: float = 0.5
    null_prompt_prob: float = 0.0
    packing: bool = True
    packing_bins: int = 16
    seed: int = 42
    workers: int = 0
    read_threads: int = 2
    prefetch_batches: int = 2
    held_out_every: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for a value outside its range."""
        _one_of("layout", self.layout, tuple(LAYOUTS))
        _one_of("loss_on", self.loss_on, ("", *LABELS))
        _one_of("weight_unit", self.weight_unit, _UNITS)
        for name in ("sequence_length", "batch_size", "frames", "chunk_size", "packing_bins"):
            _at_least(name, getattr(self, name), 1)
        for name in ("frame_spacing", "workers", "read_threads", "prefetch_batches", "seed"):
            _at_least(name, getattr(self, name), 0)
        self._check_weights()
        if not 0 <= self.null_prompt_prob <= 1:
            raise UserError(f"data.null_prompt_prob: {self.null_prompt_prob}, expected 0…1")
        if not 0 <= self.aligned_windows <= 1:
            raise UserError(f"data.aligned_windows: {self.aligned_windows}, expected 0…1")
        if self.vision_weight < 0:
            raise UserError(f"data.vision_weight: {self.vision_weight}, expected at least 0")
        if self.held_out_every < 0 or self.held_out_every == 1:
            raise UserError(
                f"data.held_out_every: {self.held_out_every}, expected 0 or at least 2 (1 would "
                "leave nothing to train on)"
            )
        self._check_layout()

    @property
    def labeled(self) -> str:
        """The label choice, with the default of the layout filled in."""
        return self.loss_on or LAYOUTS[self.layout]

    @property
    def acts(self) -> bool:
        """Whether the layout holds actions."""
        return self.layout.startswith("policy_") or self.layout == "chain_of_thought"

    @property
    def writes_actions(self) -> bool:
        """Whether actions stand in the sequence as tokens."""
        return self.acts and self.layout != "policy_flow"

    def proportions(self, episodes: list[int]) -> list[float]:
        """Share of each store in the stream, unnormalized.

        Args:
          episodes: training episodes per store.
        """
        weights = self.weights or (1.0,) * len(episodes)
        per_episode = self.weight_unit == "episode"
        return [w * (n if per_episode else 1) for w, n in zip(weights, episodes)]

    def _check_layout(self) -> None:
        if self.layout not in _MOMENTS and self.frames != 1:
            raise UserError(
                f"data.frames: {self.frames}, but {self.layout!r} shows one moment; set frames=1 "
                "or layout='policy_video'"
            )
        if self.state and self.layout not in WITH_STATE:
            raise UserError(f"data.state: the layout {self.layout!r} has no place for it")
        if self.layout == "policy_flow" and self.packing:
            raise UserError(
                "data.packing: the flow expert reads one sample per row; set packing=False"
            )

    def _check_weights(self) -> None:
        if self.weights and len(self.weights) != len(self.stores):
            raise UserError(
                f"data.weights: {len(self.weights)} weights for {len(self.stores)} stores; give "
                "one per store, or none for equal ones"
            )
        for store, weight in zip(self.stores, self.weights):
            if not weight > 0:
                raise UserError(
                    f"data.weights: {weight} for {store!r}; weights are positive: leave the store "
                    "out of data.stores to skip it"
                )


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        names = ", ".join(repr(k) for k in known)
        raise UserError(f"data.{name}: {value!r} is not one of {names}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"data.{name}: {value}, expected at least {least}")
