"""Weighted next-token cross-entropy that never holds the logits of a whole batch.

The loss of a micro-batch is returned as two sums, so that micro-batches, devices and hosts combine
exactly: ``loss = sum(w * nll) / sum(w)`` over everything. The reference takes that mean per
micro-batch (UniVLA reference/Emu3/emu3/mllm/modeling_emu3.py:1586-1598).

Axes: B batch, S sequence, P predicted positions (S, or the labeled ones), D model, T steps of an
action chunk, A action dimensions, K tasks, R roles.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.errors import UserError
from univla_jax.models.action_expert import DECODER, EXPERT, ActionExpert
from univla_jax.models.decoder import Decoder
from univla_jax.pipeline.batch import Batch
from univla_jax.sequences.tokens import Role
from univla_jax.tokenizers.vocabulary import Vocabulary
from univla_jax.training.cross_entropy import cross_entropy
from univla_jax.training.frame_noise import misread_frames
from univla_jax.training.metrics import TOKENS

MODALITIES = ("text", "visual", "action")
DROPPED = "dropped_labels"


class TokenBatch(Protocol):
    """What the loss reads of a batch: int32 arrays [B, S]."""

    tokens: Any
    positions: Any
    segment_ids: Any


@dataclasses.dataclass(frozen=True)
class LabelWeights:
    """Loss weight of every token, from its role, its task and the step.

    Attributes:
      labeled: per task of the run bool [R], which roles it learns to predict
        (``sequences.tokens.labeled_roles``).
      vision: per task (start, end, steps): the weight of a visual id goes in a line from ``start``
        at step 0 to ``end`` at step ``steps`` and stays there.
      value: per task the weight of a value; every other labeled id weighs 1.
    """

    labeled: Sequence[np.ndarray]
    vision: Sequence[tuple[float, float, int]]
    value: Sequence[float]

    def __call__(self, batch: Batch, step: jax.Array) -> jax.Array:
        """float32 [B, S]: the weight of predicting each token from what precedes it in its segment.

        The first token of a segment has nothing to be predicted from and weighs 0, as padding does.

        Args:
          batch: tokens with roles and task ids.
          step: int32 number of optimizer steps done.
        """
        start, end, steps = (jnp.asarray(x, jnp.float32) for x in zip(*self.vision))
        progress = jnp.clip(step / jnp.maximum(steps, 1), 0, 1)
        table_KR = jnp.asarray(np.stack(self.labeled), jnp.float32)
        table_KR = table_KR.at[:, Role.VISION].multiply(start + (end - start) * progress)
        table_KR = table_KR.at[:, Role.VALUE].multiply(jnp.asarray(self.value, jnp.float32))
        predicted = (batch.positions > 0) & (batch.segment_ids > 0)
        return jnp.where(predicted, table_KR[batch.task_ids, batch.roles], 0)

    def check_capacity(self, batch: Batch, max_labeled: int) -> None:
        """Checks on the host that no batch element labels more tokens than the loss gathers.

        Args:
          batch: NumPy arrays.
          max_labeled: the static capacity given to ``weighted_cross_entropy``.

        Raises:
          UserError: naming the element with the most labels and the value needed.
        """
        table_KR = np.stack(self.labeled)
        table_KR[:, Role.VISION] &= np.asarray(
            [max(start, end) > 0 for start, end, _ in self.vision]
        )
        table_KR[:, Role.VALUE] &= np.asarray(self.value) > 0
        predicted = (batch.positions > 0) & (batch.segment_ids > 0)
        counts = (table_KR[batch.task_ids, batch.roles] & predicted).sum(axis=1)
        most = int(np.argmax(counts))
        if counts[most] > max_labeled:
            raise UserError(
                f"max_labeled={max_labeled}, but element {most} of the batch labels {counts[most]} "
                f"tokens; set it to at least {counts[most]}, or to 0 to compute every position"
            )


@dataclasses.dataclass(frozen=True)
class Modalities:
    """Static id ranges (inclusive) that say which modality a label belongs to.

    Attributes:
      visual: first and last visual id.
      action: first and last action id.
      action_marks: further ids counted as action (boa, eoa).
    """

    visual: tuple[int, int]
    action: tuple[int, int]
    action_marks: tuple[int, ...] = ()

    @classmethod
    def of(cls, vocabulary: Any) -> Modalities:
        """From a ``tokenizers.vocabulary.Vocabulary``."""
        v = vocabulary
        return cls(
            visual=(v.visual_start, v.visual_start + v.visual_size - 1),
            action=(v.action_last - v.action_size + 1, v.action_last),
            action_marks=(v.boa, v.eoa),
        )

    def index(self, ids: jax.Array) -> jax.Array:
        """Position in ``MODALITIES`` of each id, int32, the shape of ``ids``."""
        visual = (ids >= self.visual[0]) & (ids <= self.visual[1])
        action = (ids >= self.action[0]) & (ids <= self.action[1])
        for mark in self.action_marks:
            action |= ids == mark
        return jnp.where(visual, 1, jnp.where(action, 2, 0))


def weighted_cross_entropy(
    model: Decoder,
    params: Any,
    batch: TokenBatch,
    weights: jax.Array,
    modalities: Modalities,
    *,
    max_labeled: int | None = None,
    chunks: int | None = None,
    tasks: Sequence[str] = (),
    inputs: jax.Array | None = None,
    train: bool = False,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Sums of the weighted negative log-likelihood of one micro-batch.

    Args:
      model: the decoder.
      params: its parameters.
      batch: tokens, positions and segments [B, S].
      weights: float32 [B, S], of predicting each token (``LabelWeights``).
      modalities: id ranges for the metrics.
      max_labeled: the most labeled tokens an element may have; the hidden states are gathered at
        those positions before the head. An element with more makes the loss NaN and counts them in
        ``metrics["dropped_labels"]``; see ``LabelWeights.check_capacity``. None computes every
        position.
      chunks: parts in which the head is applied, see ``cross_entropy.default_chunks``.
      tasks: names of the tasks by their ids in the batch, whose sums are wanted too.
      inputs: int32 [B, S], what the decoder reads in place of the tokens (``misread_frames``).
      train: dropout on.
      dropout_key: random key, needed when the configuration has dropout and ``train``.

    Returns:
      sum of w * nll (float32, differentiable), sum of w (float32), and metrics, all of them sums
      that add up over micro-batches: per modality and per task ``<name>_nll``, ``<name>_correct``,
      ``<name>_tokens`` (unweighted, over labeled tokens) and ``dropped_labels``.
    """
    rngs = {"dropout": dropout_key} if dropout_key is not None else None
    hidden, _ = model.apply(
        {"params": params},
        batch.tokens if inputs is None else inputs,
        batch.positions,
        batch.segment_ids,
        train=train,
        rngs=rngs,
    )
    return loss_of_hidden(
        model,
        params,
        hidden,
        batch.tokens,
        weights,
        modalities,
        max_labeled=max_labeled,
        chunks=chunks,
        tasks=tasks,
        task_ids=batch.task_ids if tasks else None,
        dropout_key=dropout_key if train else None,
    )


def loss_of_hidden(
    model: Decoder,
    params: Any,
    hidden: jax.Array,
    tokens: jax.Array,
    weights: jax.Array,
    modalities: Modalities,
    *,
    max_labeled: int | None = None,
    chunks: int | None = None,
    tasks: Sequence[str] = (),
    task_ids: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """``weighted_cross_entropy`` of hidden states [B, S, D] that are there already."""
    targets, weights = _shift(tokens), _shift(weights).astype(jnp.float32)
    groups = None if task_ids is None else _shift(task_ids.astype(jnp.int32))
    dropped = jnp.zeros((), jnp.float32)
    if max_labeled is not None and max_labeled < targets.shape[1]:
        gathered = gather_labeled(hidden, targets, weights, max_labeled, groups)
        hidden, targets, weights, dropped, groups = gathered
    head = model.apply({"params": params}, method="head_weights")
    adapter = model.apply(
        {"params": params},
        hidden,
        train=dropout_key is not None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        method="head_adapter",
    )
    total, per_token = cross_entropy(
        hidden,
        head,
        targets,
        weights,
        vocab_size=model.config.vocab_size,
        chunks=chunks,
        gradient_dtype=model.config.reduction_dtype,
        adapter=adapter,
    )
    metrics = _named_sums(MODALITIES, modalities.index(targets), weights, *per_token)
    if groups is not None:
        metrics |= _named_sums(tasks, groups, weights, *per_token)
    metrics |= {DROPPED: dropped}
    return jnp.where(dropped > 0, jnp.nan, total), jnp.sum(weights), metrics


def gather_labeled(
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    capacity: int,
    groups: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """The labeled positions of each row, in order, padded with weight 0 to ``capacity``.

    Args:
      hidden: [B, S, D].
      targets: int32 [B, S].
      weights: float32 [B, S]; labeled means not 0.
      capacity: P, static.
      groups: int32 [B, S], gathered as the targets are; or None.

    Returns:
      hidden [B, P, D], targets [B, P], weights [B, P], how many labels did not fit (float32), and
      groups [B, P].
    """
    labeled = weights != 0
    count = jnp.cumsum(labeled, axis=1)  # of labels up to and at each position
    places = jnp.arange(capacity)
    # the p-th label stands behind all positions that count at most p labels
    order = jnp.sum(count[:, None, :] <= places[:, None], axis=2)
    order = jnp.minimum(order, labeled.shape[1] - 1)
    dropped = jnp.sum(jnp.maximum(count[:, -1] - capacity, 0))
    pick = functools.partial(jnp.take_along_axis, indices=order, axis=1)
    picked = jnp.take_along_axis(hidden, order[..., None], axis=1)
    real = places < count[:, -1:]
    weights = jnp.where(real, pick(weights), 0)
    groups = None if groups is None else pick(groups)
    return picked, pick(targets), weights, dropped.astype(jnp.float32), groups


def _shift(x_BS: jax.Array) -> jax.Array:
    """What each position predicts: the next column, and 0 at the end."""
    return jnp.pad(x_BS[:, 1:], ((0, 0), (0, 1)))


def _named_sums(
    names: Sequence[str], index: jax.Array, weights: jax.Array, nll: jax.Array, correct: jax.Array
) -> dict[str, jax.Array]:
    """Sums over the labeled tokens of each name, ``index`` being its position in ``names``."""
    sums, labeled = {}, weights != 0
    for i, name in enumerate(names):
        mine = (labeled & (index == i)).astype(jnp.float32)
        sums[f"{name}_nll"] = jnp.sum(mine * jax.lax.stop_gradient(nll))
        sums[f"{name}_correct"] = jnp.sum(mine * correct)
        sums[f"{name}_tokens"] = jnp.sum(mine)
    return sums


# Flow matching of the action expert beside the decoder's cross-entropy:
#
#     x(tau) = (1 - tau) a + tau noise        the expert predicts  noise - a
#     loss = cross-entropy + weight * mean((velocity - (noise - a)) ** 2)
#
# Source: UniVLA reference/Emu3/emu3/mllm/modeling_emu3.py:1545-1600.


FLOW_WEIGHT = 5.0  # the reference's action_config.vision_loss_weight
FLOW_MSE = "flow_mse"


@flax.struct.dataclass
class FlowTarget:
    """Noisy action chunks and the velocities that the expert is trained to predict.

    Attributes:
      actions: the data, normalized, [B, T, A].
      noise: standard normal, [B, T, A].
      tau: noise levels [B], 1 is pure noise.
    """

    actions: jax.Array
    noise: jax.Array
    tau: jax.Array

    @classmethod
    def draw(cls, key: jax.Array, actions: jax.Array, *, largest: float = 1.0) -> FlowTarget:
        """Draws noise and levels: tau = largest * (1 - Beta(1.5, 1)), whose mean is 0.4.

        Args:
          key: random key.
          actions: [B, T, A].
          largest: upper end of tau.
        """
        for_noise, for_tau = jax.random.split(key)
        noise = jax.random.normal(for_noise, actions.shape, jnp.float32)
        tau = largest * (1 - jax.random.beta(for_tau, 1.5, 1.0, actions.shape[:1], jnp.float32))
        return cls(actions, noise, tau)

    @property
    def noisy(self) -> jax.Array:
        """x(tau) [B, T, A]."""
        tau = self.tau[:, None, None]
        return (1 - tau) * self.actions + tau * self.noise

    @property
    def velocity(self) -> jax.Array:
        """noise - data [B, T, A]."""
        return self.noise - self.actions


def flow_matching(
    expert: ActionExpert,
    params: Any,
    hidden: jax.Array,
    target: FlowTarget,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """Squared error of the velocity, float32 [B]: the mean over each row's chunk.

    Args:
      expert: the expert.
      params: its parameters.
      hidden: [B, S, D] of the decoder.
      target: what to predict.
      lengths: int32 [B] real tokens per row; None takes all as real.
    """
    velocity, _ = expert.apply({"params": params}, target.noisy, target.tau, hidden, lengths)
    return jnp.mean(jnp.square(velocity - target.velocity), axis=(1, 2))


def flow_loss(
    model: Decoder,
    expert: ActionExpert,
    params: Any,
    batch: TokenBatch,
    weights: jax.Array,
    target: FlowTarget,
    modalities: Modalities,
    *,
    flow_weight: float = FLOW_WEIGHT,
    insulate: bool = False,
    reference_padding: bool = False,
    inputs: jax.Array | None = None,
    train: bool = False,
    dropout_key: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """Sums of the weighted cross-entropy and the weighted flow matching of one micro-batch.

    The loss is their quotient. Micro-batches combine by their labeled tokens; a flow policy labels
    one per element (boa), so that is the mean over all elements.

    Args:
      model: the decoder.
      expert: reads its hidden states.
      params: ``{"decoder": ..., "action_expert": ...}``.
      batch: tokens, positions and segments [B, S]; one example per element, right-padded (segment
        ids 1 and 0).
      weights: float32 [B, S], of predicting each token.
      target: the elements' action chunks.
      modalities: id ranges for the metrics.
      flow_weight: of the flow-matching error.
      insulate: no gradient of the flow matching reaches the decoder.
      reference_padding: lets the expert see padding, and padding see the row, as the reference
        with eager or sdpa attention does; by default the padding of a row changes nothing.
      inputs: as ``weighted_cross_entropy`` has it.
      train: dropout on.
      dropout_key: random key, needed when the configuration has dropout and ``train``.
      **options: ``max_labeled`` and ``chunks`` of ``weighted_cross_entropy``.

    Returns:
      what ``weighted_cross_entropy`` returns, the flow matching added to the first sum; its
      metrics have ``flow_mse`` besides: the sum over rows that hold data, and their number.
    """
    segments = batch.segment_ids
    padding: dict[str, Any] = {"segment_ids_BS": segments}
    if reference_padding:
        padding = {"segment_ids_BS": jnp.ones_like(segments), "key_segment_ids_BS": segments}
    hidden, _ = model.apply(
        {"params": params[DECODER]},
        batch.tokens if inputs is None else inputs,
        batch.positions,
        **padding,
        train=train,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    total, weight, metrics = loss_of_hidden(
        model,
        params[DECODER],
        hidden,
        batch.tokens,
        weights,
        modalities,
        dropout_key=dropout_key if train else None,
        **options,
    )
    real = jnp.sum(segments > 0, axis=1)
    seen = jax.lax.stop_gradient(hidden) if insulate else hidden
    errors = flow_matching(
        expert, params[EXPERT], seen, target, None if reference_padding else real
    )
    error, rows = jnp.sum(jnp.where(real > 0, errors, 0)), jnp.sum(real > 0).astype(jnp.float32)
    flow = flow_weight * error / jnp.maximum(rows, 1)
    return total + weight * flow, weight, metrics | {FLOW_MSE: (error, rows)}


# The loss as the jitted steps take it.

LossFn = Callable[
    [Any, Any, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array, Mapping[str, Any]]
]
"""``(params, batch, step, rng) -> (sum of w * nll, sum of w, sums)``, all float32 scalars.

``sums`` maps a metric's name to ``(sum, count)``, logged as their quotient, or to one scalar,
logged as its total. ``rng`` is None in evaluation: no dropout.
"""


def make_loss(
    model: Decoder,
    vocabulary: Vocabulary,
    weights: LabelWeights,
    *,
    max_labeled: int = 0,
    chunks: int = 0,
    flow_weight: float = FLOW_WEIGHT,
    insulate: bool = False,
    vision_noise: float = 0.0,
    expert: ActionExpert | None = None,
    tasks: Sequence[str] = (),
) -> LossFn:
    """The weighted cross-entropy of a run, with an expert its flow matching too.

    Its metrics: ``<modality>_loss`` and ``<modality>_accuracy``, unweighted means over the labeled
    tokens of text, visual and action; ``task/<name>_loss`` and ``task/<name>_accuracy``, the same
    of each task of a mixture; ``tokens``, all but padding; with an expert ``flow_mse``. An
    evaluation draws the same noise for every batch.

    Args:
      model: the decoder.
      vocabulary: whose ids the tokens are.
      weights: loss weights by role, task and step.
      max_labeled: see ``weighted_cross_entropy``; 0 computes every position.
      chunks: parts in which the head is applied; 0 chooses them by memory.
      flow_weight: of the flow-matching error.
      insulate: no gradient of the flow matching reaches the decoder.
      vision_noise: largest fraction of a frame's codes that are misread in training.
      expert: the action expert, or None.
      tasks: names of the tasks of a mixture; no mixture has an expert.
    """
    modalities = Modalities.of(vocabulary)
    tasks = [f"task/{name}" for name in tasks]
    lora = model.config.lora
    dropped = model.config.dropout or (lora is not None and lora.dropout)

    def loss(params: Any, batch: Batch, step: jax.Array, rng: jax.Array | None) -> Any:
        options: dict[str, Any] = {
            "max_labeled": max_labeled or None,
            "chunks": chunks or None,
            "train": rng is not None,
            "dropout_key": rng if dropped else None,
        }
        if vision_noise and rng is not None:
            key = jax.random.fold_in(rng, 2)
            options["inputs"] = misread_frames(key, batch.tokens, modalities.visual, vision_noise)
        by_token = weights(batch, step)
        if expert is None:
            total, weight, sums = weighted_cross_entropy(
                model, params, batch, by_token, modalities, tasks=tasks, **options
            )
            flow = {}
        else:
            key = jax.random.key(0) if rng is None else jax.random.fold_in(rng, 1)
            target = FlowTarget.draw(key, batch.actions)
            total, weight, sums = flow_loss(
                model,
                expert,
                params,
                batch,
                by_token,
                target,
                modalities,
                flow_weight=flow_weight,
                insulate=insulate,
                **options,
            )
            flow = {FLOW_MSE: sums[FLOW_MSE]}
        metrics = {TOKENS: jnp.sum(batch.segment_ids > 0).astype(jnp.float32), **flow}
        for name in (*MODALITIES, *tasks):
            count = sums[f"{name}_tokens"]
            metrics[f"{name}_loss"] = sums[f"{name}_nll"], count
            metrics[f"{name}_accuracy"] = sums[f"{name}_correct"], count
        return total, weight, metrics

    return loss
