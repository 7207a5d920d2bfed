"""The config of ``python -m univla_jax.train``: any stage of the decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from univla_jax.checkpoints import CheckpointConfig
from univla_jax.errors import UserError
from univla_jax.models.action_expert import ActionExpertConfig
from univla_jax.models.decoder_config import DecoderConfig
from univla_jax.models.lora import LoraConfig
from univla_jax.pipeline.data_config import DataConfig
from univla_jax.training.losses import FLOW_WEIGHT
from univla_jax.training.optimizer import OptimizerConfig
from univla_jax.training.sharding import MeshConfig
from univla_jax.training.train_step import NORMALIZATIONS

VOCABULARIES = ("from_scratch", "emu3")
WARM_STARTS = ("exact", "partial")
VISUAL_INITS = ("random", "codebook")
STATISTICS = ("stores", "init_from")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder and its action expert.

    Attributes:
      preset: a name of ``models/decoder_config.py``.
      overrides: fields of ``DecoderConfig`` to change; vocabulary size and pad id come from the
        vocabulary.
      visual_init: how the embeddings of visual ids start where no earlier stage gives them:
        ``"random"``, as the reference, or ``"codebook"`` (``init_visual_embeddings``).
      action_expert: fields of ``ActionExpertConfig`` to change; only tasks that need an expert
        have one.
      lora: adapters that are trained instead of the decoder, which ``init_from`` gives.
    """

    preset: str
    overrides: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, metadata={"changes": DecoderConfig}
    )
    visual_init: str = dataclasses.field(default="random", metadata={"formerly": "visual_rows"})
    action_expert: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, metadata={"changes": ActionExpertConfig}
    )
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        """Raises UserError for an unknown start of the visual embeddings."""
        if self.visual_init not in VISUAL_INITS:
            raise UserError(
                f"model.visual_init: {self.visual_init!r}; expected one of {VISUAL_INITS}"
            )


@dataclasses.dataclass(frozen=True)
class TokenizersConfig:
    """Folders of the fitted tokenizers; those of ``init_from`` where empty.

    Attributes:
      vocabulary: ``"from_scratch"``, sized by the tokenizers, or ``"emu3"``, the 184,622 ids of the
        published checkpoints.
      text: folder of the text tokenizer.
      vision: folder of the vision tokenizer which the token stores were made with.
      action: folder of the action tokenizer.
      statistics: which ones normalize actions and states: ``"stores"``, those of the run's token
        stores, or ``"init_from"``, those of the earlier stage for every corpus that it has. What a
        policy learned before keeps its meaning only with its own statistics.
    """

    vocabulary: str = "from_scratch"
    text: str = ""
    vision: str = ""
    action: str = ""
    statistics: str = "stores"

    def __post_init__(self) -> None:
        """Raises UserError for an unknown vocabulary, or statistics of nothing."""
        if self.statistics not in STATISTICS:
            raise UserError(
                f"tokenizers.statistics: {self.statistics!r}; expected one of {STATISTICS}"
            )
        if self.vocabulary not in VOCABULARIES:
            raise UserError(
                f"tokenizers.vocabulary: {self.vocabulary!r}; expected one of {VOCABULARIES}"
            )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How the cross-entropy is computed; what is labeled, and its weights, belong to the data.

    Attributes:
      normalization: ``"global"`` divides by the weight of all labeled tokens of the step;
        ``"per_micro_batch"`` averages the micro-batches' own means, as the reference.
      max_labeled: the most labeled tokens of a batch element; the head then runs on that many
        positions only, which saves most of its cost where few tokens are labeled (policies). 0 runs
        it on every position.
      chunks: parts in which the head runs; 0 chooses them by memory.
      flow_weight: of the action expert's flow matching beside the cross-entropy.
      insulate: the flow matching trains the expert alone, and leaves the decoder's knowledge as the
        cross-entropy makes it (knowledge insulation; Driess et al., arXiv 2505.23705).
      vision_noise: largest fraction of a frame's codes that training misreads (``frame_noise.py``),
        so that few frames are not learned by heart; 0 misreads none.
    """

    normalization: str = dataclasses.field(default="global", metadata={"formerly": "normalisation"})
    max_labeled: int = dataclasses.field(default=0, metadata={"formerly": "max_labelled"})
    chunks: int = 0
    flow_weight: float = FLOW_WEIGHT
    insulate: bool = False
    vision_noise: float = 0.0

    def __post_init__(self) -> None:
        """Raises UserError for values that cannot work."""
        if self.normalization not in NORMALIZATIONS:
            raise UserError(
                f"loss.normalization: {self.normalization!r}; expected one of {NORMALIZATIONS}"
            )
        for name in ("max_labeled", "chunks", "flow_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"loss.{name}: {getattr(self, name)}; expected at least 0")
        if not 0 <= self.vision_noise <= 1:
            raise UserError(f"loss.vision_noise: {self.vision_noise}; expected 0 to 1")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The loss on held-out episodes during training.

    Attributes:
      every: steps between two evaluations, and one at the end; 0 for none.
      batches: batches per evaluation; 0 takes every held-out episode.
      stores: token stores held out as a whole; empty takes the episodes that
        ``data.held_out_every`` holds out of the training stores.
    """

    every: int = 0
    batches: int = 0
    stores: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run, built strictly from an ml_collections config.

    Attributes:
      total_steps: optimizer steps, also the length of the learning-rate schedule.
      model: the decoder.
      data: token stores, task, batch.
      tokenizers: what the token ids mean.
      init_from: workdir or checkpoint folder of an earlier stage whose parameters this one starts
        from; empty starts from random ones.
      warm_start: ``"exact"`` refuses a stage of another model; ``"partial"`` takes what fits, and
        says in ``warm_start.txt`` what was taken, what is new and what was dropped.
      seed: of parameters and dropout; the data has its own.
      optimizer: AdamW and its schedule.
      loss: how the loss is computed and normalized.
      accumulation: micro-batches per step; ``data.batch_size`` elements are split into them.
      mesh: devices per axis.
      checkpoint: when to save and what to keep.
      evaluation: held-out loss.
      log_every: steps between two lines of metrics.
      data_timeout_seconds: the longest wait for a batch before the run stops.
      hang_seconds: the longest time without a step, compilation, evaluation or save that moves on
        before the run stops with the stacks of its threads; 0 waits for ever.
      sample_tokens: length of a usual sample, from which ``plan`` says how many tokens of a step
        are useful; 0 counts batch elements as full.
    """

    total_steps: int
    model: ModelConfig
    data: DataConfig
    tokenizers: TokenizersConfig = dataclasses.field(default_factory=TokenizersConfig)
    init_from: str = ""
    warm_start: str = "exact"
    seed: int = 42
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    accumulation: int = 1
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    log_every: int = 1
    data_timeout_seconds: float = 600.0
    hang_seconds: float = 1800.0
    sample_tokens: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for settings that cannot work together."""
        for name in ("total_steps", "accumulation", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"config.{name}: {getattr(self, name)}; expected at least 1")
        if self.warm_start not in WARM_STARTS:
            raise UserError(
                f"config.warm_start: {self.warm_start!r}; expected one of {WARM_STARTS}"
            )
        if self.warm_start == "partial" and (not self.init_from or self.model.lora.enabled):
            raise UserError(
                "config.warm_start: 'partial' needs config.init_from, and a run without adapters"
            )
        if self.tokenizers.statistics == "init_from" and not self.init_from:
            raise UserError(
                "config.tokenizers.statistics: 'init_from', but config.init_from names no earlier "
                "stage; name it, or take those of the stores"
            )
        if self.model.action_expert and not self.has_expert:
            raise UserError(
                f"config.model.action_expert is set, but the task {self.data.task!r} has no action "
                "expert; choose one that has, or leave it empty"
            )
        held_out = self.evaluation.stores or self.data.held_out_every
        if self.evaluation.every and not held_out:
            raise UserError(
                "config.evaluation.every is set but nothing is held out; set "
                "config.data.held_out_every or config.evaluation.stores"
            )

    @property
    def has_expert(self) -> bool:
        """Whether an action expert is trained on top of the decoder."""
        return self.data.needs.action_expert


FREE_MODEL_SETTINGS = ("remat", "attention", "scan_unroll")
"""Fields of ``DecoderConfig`` that say how, not what is computed."""

FREE = (
    "total_steps",
    "log_every",
    "checkpoint",
    "evaluation",
    "mesh",
    "sample_tokens",
    "data_timeout_seconds",
    "hang_seconds",
    "data.too_long",
    "data.loss_on",
    "data.vision_weight",
    "data.value_weight",
    "data.mixture.*.loss_on",
    "data.mixture.*.vision_weight",
    "data.mixture.*.value_weight",
    "data.mixture.*.evaluation_stores",
    "data.workers",
    "data.read_threads",
    "data.prefetch_batches",
    "data.stores",
    "evaluation.stores",
    "init_from",
    "warm_start",
    "loss.max_labeled",
    "loss.chunks",
    "optimizer.offload",
    *(f"model.overrides.{name}" for name in FREE_MODEL_SETTINGS),
)
"""Keys that may change when a run is resumed. None changes the batches; ``total_steps`` stretches
the schedule of the steps to come, ``loss_on`` and weights of labels set their loss; ``too_long``
decides about samples that a run has not met. Stores may be moved: the saved data position knows
their contents. ``init_from`` did its part at step 0."""


def free_keys(config: TrainConfig) -> tuple[str, ...]:
    """The keys of a run that may change when it is resumed."""
    return (*FREE, "accumulation") if config.loss.normalization == "global" else FREE
