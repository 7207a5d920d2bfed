"""Fused LM head and cross-entropy, chunk by chunk, with gradients computed in the forward pass.

The loss is linear in the cotangent of its sum, so the gradients of hidden states and head are
computed while a chunk's logits exist and only scaled in the backward pass: logits are computed
once, never stored for a whole batch, and the head is multiplied three times per chunk instead of
four.

tokamax has a kernel for this (``linear_softmax_cross_entropy_loss``, 0.0.12), which keeps no logits
on TPU at all. It has no weights of positions, gives no loss of each, knows neither padded ids nor
adapters of the head, multiplies the head once more in its backward pass, and on GPU makes all
logits at once, so it is not used.

On a mesh either the hidden states or the head move, whichever is less: see ``HeadSharding``.

Axes: B batch, P positions, D model, V padded vocabulary, I chunks, J positions per chunk.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from univla_jax.models import decoder_config
from univla_jax.models.decoder import MASKED_LOGIT, HeadAdapter, compute_logits
from univla_jax.models.linear import MeshAxes, fitting_axes

LOGITS_PER_CHUNK = 2**22
MIN_POSITIONS = 256  # per chunk: each also reads and writes the gradient of the whole head


def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    vocab_size: int,
    chunks: int | None = None,
    gradient_dtype: jnp.dtype | None = None,
    adapter: HeadAdapter | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Weighted cross-entropy of hidden states against target ids.

    Args:
      hidden: [B, P, D].
      head: [V, D], ``V >= vocab_size``; entries beyond are padding and take no probability.
      targets: int32 [B, P] ids below ``vocab_size``.
      weights: float32 [B, P].
      vocab_size: number of real ids.
      chunks: number of parts of P; None takes ``default_chunks``.
      gradient_dtype: what the head's gradient is summed over devices in; the head's by default.
      adapter: what is added to the logits of a frozen head, or None.

    Returns:
      float32 sum of w * nll, differentiable in ``hidden``, and in ``head`` or, where there is an
      adapter, in that instead, which saves a gradient of the head's size; and per position, without
      gradient, nll float32 [B, P] and whether the target had the largest logit bool [B, P].
    """
    b, p, _ = hidden.shape
    sharding = HeadSharding.from_context(hidden.shape, head.shape)
    chunks = min(chunks or default_chunks(b, p, head.shape[0]), p)
    # every device cuts its own positions into the same number of chunks
    extra = -p % (chunks * sharding.length_shards)
    if adapter is not None and adapter.low is not None:
        # as wide as the mesh axes that split the head's width want it
        wider = (0, -adapter.low.shape[-1] % sharding.width_shards)
        adapter = adapter.replace(
            low=jnp.pad(adapter.low, ((0, 0), (0, extra), wider)),
            table=jnp.pad(adapter.table, ((0, 0), wider)),
        )
    if extra:
        hidden = jnp.pad(hidden, ((0, 0), (0, extra), (0, 0)))
        targets, weights = (jnp.pad(x, ((0, 0), (0, extra))) for x in (targets, weights))
    options = _Options(vocab_size, chunks, sharding, jnp.dtype(gradient_dtype or head.dtype))
    total, nll, correct = _fused(options, hidden, head, adapter, targets, weights)
    return total, (nll[:, :p], correct[:, :p])


@dataclasses.dataclass(frozen=True)
class HeadSharding:
    """What moves in the loss, over the mesh in scope.

    The head is stored split along the vocabulary (tensor parallel) and along the model width
    (FSDP). Its width has to be made whole, in one of two ways:

    * the head moves: gathered before the first chunk, its gradient reduced and scattered after the
      last one. Twice V x D numbers, whatever the batch.
    * the hidden states move: the head is cut along the vocabulary instead, every device gets the
      positions of all devices that hold other parts of it, and their gradients return. Twice
      B x P x D numbers of those devices.

    Attributes:
      batch: mesh axes of B.
      length: mesh axes of P.
      vocabulary: mesh axes that the head's vocabulary is split over as it is stored.
      width: mesh axes that its width is split over as it is stored.
      moves_head: which of the two.
      length_shards: parts of P.
      width_shards: parts of D as the head is stored.
    """

    batch: MeshAxes = ()
    length: MeshAxes = ()
    vocabulary: MeshAxes = ()
    width: MeshAxes = ()
    moves_head: bool = False
    length_shards: int = 1
    width_shards: int = 1

    @classmethod
    def from_context(cls, hidden: Sequence[int], head: Sequence[int]) -> HeadSharding:
        """The cheaper way for hidden states [B, P, D] and a head [V, D]."""
        mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
        if mesh.empty or not rules:
            return cls()
        taken: set[str] = set()
        batch, vocabulary = (
            fitting_axes(rules[name], size, mesh.shape, set())
            for name, size in ((decoder_config.BATCH, hidden[0]), (decoder_config.VOCAB, head[0]))
        )
        taken.update(vocabulary)
        width = fitting_axes(rules[decoder_config.EMBED], head[1], mesh.shape, taken)
        length = tuple(axis for axis in rules[decoder_config.LENGTH] if mesh.shape[axis] > 1)
        parts = lambda axes: math.prod(mesh.shape[axis] for axis in axes)  # noqa: E731
        here = [axis for axis in batch if axis not in width]
        positions = hidden[0] // parts(here) * hidden[1]
        divides = head[0] % (parts(vocabulary) * parts(width)) == 0
        owned = set(width) <= {*batch, *length}  # else the same positions would be added twice
        moves_head = not divides or not owned or positions > head[0] // parts(vocabulary)
        return cls(batch, length, vocabulary, width, moves_head, parts(length), parts(width))

    @property
    def is_local(self) -> bool:
        """Whether nothing is sharded."""
        return not (self.batch or self.length or self.vocabulary or self.width)

    @property
    def positions(self) -> PartitionSpec:
        """Of arrays [B, P, ...]."""
        return PartitionSpec(self.batch, self.length)

    @property
    def head(self) -> PartitionSpec:
        """Of the head and its gradient [V, D]."""
        return PartitionSpec(self.vocabulary, self.width)

    @property
    def vocabulary_shards(self) -> MeshAxes:
        """Mesh axes over which the logits of a position are split."""
        return self.vocabulary if self.moves_head else (*self.vocabulary, *self.width)

    def load_head(self, head: jax.Array) -> jax.Array:
        """A device's part of the head, whole along the width."""
        if not self.width:
            return head
        if self.moves_head:
            return jax.lax.all_gather(head, self.width, axis=1, tiled=True)
        return jax.lax.all_to_all(head, self.width, 0, 1, tiled=True)

    def store_head(self, d_head: jax.Array) -> jax.Array:
        """Sums the gradient of ``load_head``'s result over all tokens, split as it is stored."""
        axes = {*self.batch, *self.length}
        if self.width and self.moves_head:
            owned = axes & set(self.width)
            if owned == set(self.width):
                d_head = jax.lax.psum_scatter(d_head, self.width, scatter_dimension=1, tiled=True)
            else:  # devices with equal tokens: each cuts out its part of the sum
                d_head = _own_part(_sum_over(d_head, owned), self.width)
        elif self.width:
            d_head = jax.lax.all_to_all(d_head, self.width, 1, 0, tiled=True)
        return _sum_over(d_head, axes - set(self.width))

    def load_positions(self, x: jax.Array) -> jax.Array:
        """[b, j, ...] of this device, or of all devices that hold other parts of the head."""
        if self.moves_head:
            return x
        for dimension, axes in self._moved():
            x = jax.lax.all_gather(x, axes, axis=dimension, tiled=True)
        return x

    def store_positions(self, x: jax.Array) -> jax.Array:
        """Sums [b, j, ...] over the parts of the vocabulary; each device gets its own positions."""
        scattered: set[str] = set()
        if not self.moves_head:
            for dimension, axes in reversed(self._moved()):
                x = jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True)
                scattered.update(axes)
        return _sum_over(x, set(self.vocabulary_shards) - scattered)

    def own_positions(self, x: jax.Array) -> jax.Array:
        """Cuts this device's positions out of what ``load_positions`` gathered."""
        if not self.moves_head:
            for dimension, axes in reversed(self._moved()):
                x = _own_part(x, axes, dimension)
        return x

    def _moved(self) -> list[tuple[int, MeshAxes]]:
        """Dimensions of the positions that are gathered, and over which mesh axes."""
        owners = (self.batch, self.length)
        axes = [tuple(axis for axis in own if axis in self.width) for own in owners]
        return [(dimension, found) for dimension, found in enumerate(axes) if found]


def _sum_over(x: jax.Array, axes: Any) -> jax.Array:
    return jax.lax.psum(x, tuple(sorted(axes))) if axes else x


def _own_part(x: jax.Array, axes: MeshAxes, dimension: int = 1) -> jax.Array:
    size = x.shape[dimension] // jax.lax.axis_size(axes)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * size, size, dimension)


def default_chunks(batch: int, positions: int, vocabulary: int) -> int:
    """Parts of about ``LOGITS_PER_CHUNK`` logits, but of no fewer than ``MIN_POSITIONS``."""
    length = max(MIN_POSITIONS, LOGITS_PER_CHUNK // (batch * vocabulary))
    return -(-positions // length)


@dataclasses.dataclass(frozen=True)
class _Options:
    vocab_size: int
    chunks: int
    sharding: HeadSharding
    gradient_dtype: jnp.dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    options: _Options,
    hidden: jax.Array,
    head: jax.Array,
    adapter: HeadAdapter | None,
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sum of w * nll, nll [B, P] and whether the target was the largest [B, P]."""
    sharding = options.sharding

    def local(
        hidden: jax.Array,
        head: jax.Array,
        adapter: HeadAdapter | None,
        targets: jax.Array,
        weights: jax.Array,
    ) -> tuple[jax.Array, ...]:
        loaded, adapter = sharding.load_head(head), _load_adapter(sharding, adapter)

        def step(total: jax.Array, part: Any) -> tuple[jax.Array, Any]:
            hidden, low, targets, weights = part
            own = adapter and adapter.replace(low=low)
            *_, w_BJ, nll, correct = _chunk(options, loaded, own, (hidden, targets, weights))
            own = sharding.own_positions(nll), sharding.own_positions(correct)
            return total + jnp.sum(sharding.own_positions(w_BJ) * own[0]), own

        parts = _split((hidden, adapter and adapter.low, targets, weights), options.chunks)
        total, kept = jax.lax.scan(step, jnp.zeros((), jnp.float32), parts)
        return _sum_over(total, {*sharding.batch, *sharding.length}), *_join(kept)

    return _run(sharding, local, (hidden, head, adapter, targets, weights), gradients=False)


def _forward(
    options: _Options,
    hidden: jax.Array,
    head: jax.Array,
    adapter: HeadAdapter | None,
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[Any, Any, Any]]:
    """Like ``_fused``, and the gradients of the sum as residuals.

    With an adapter the head is frozen: its gradient is None, and never made.
    """
    sharding = options.sharding

    def local(
        hidden: jax.Array,
        head: jax.Array,
        adapter: HeadAdapter | None,
        targets: jax.Array,
        weights: jax.Array,
    ) -> tuple[Any, ...]:
        loaded, adapter = sharding.load_head(head), _load_adapter(sharding, adapter)
        low = adapter and adapter.low

        def step(carry: Any, part: Any) -> tuple[Any, Any]:
            total, d_tables = carry
            hidden, low, targets, weights = part
            own = adapter and adapter.replace(low=low)
            h_BJD, pull, d_logits, w_BJ, nll, correct = _chunk(
                options, loaded, own, (hidden, targets, weights)
            )
            d_hidden, d_low = jnp.einsum("bjv,vd->bjd", d_logits, loaded), None
            if pull is None:
                d_tables += jnp.einsum(
                    "bjd,bjv->dv", h_BJD, d_logits, preferred_element_type=jnp.float32
                )
            else:
                d_adapter, more = pull(d_logits.astype(jnp.float32))
                d_hidden, d_low = d_hidden + more, d_adapter.low
                d_tables = jax.tree.map(jnp.add, d_tables, (d_adapter.table, d_adapter.rows))
            d_hidden, d_low = (
                None if x is None else sharding.store_positions(x.astype(hidden.dtype))
                for x in (d_hidden, d_low)
            )
            own = sharding.own_positions(nll), sharding.own_positions(correct)
            total += jnp.sum(sharding.own_positions(w_BJ) * own[0])
            return (total, d_tables), (*own, d_hidden, d_low)

        parts = _split((hidden, low, targets, weights), options.chunks)
        d_tables = jnp.zeros(loaded.shape[::-1], jnp.float32)
        if adapter is not None:
            tables = adapter.table, adapter.rows
            d_tables = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tables)
        start = jnp.zeros((), jnp.float32), d_tables
        (total, d_tables), kept = jax.lax.scan(step, start, parts)
        nll, correct, d_hidden, d_low = _join(kept)
        tokens = {*sharding.batch, *sharding.length}
        total = _sum_over(total, tokens)
        # Over chunks the gradients are summed on each device alone; they are exchanged once.
        if adapter is None:
            d_head = sharding.store_head(d_tables.T.astype(options.gradient_dtype))
            return total, nll, correct, d_hidden, d_head.astype(head.dtype), None
        d_table, d_rows = d_tables
        if d_table is not None:
            d_table = sharding.store_head(d_table).astype(adapter.table.dtype)
        if d_rows is not None:
            d_rows = _sum_over(d_rows, {*tokens, *sharding.vocabulary_shards})
            d_rows = d_rows.astype(adapter.rows.dtype)
        d_adapter = adapter.replace(low=d_low, table=d_table, rows=d_rows)
        return total, nll, correct, d_hidden, None, d_adapter

    arrays = hidden, head, adapter, targets, weights
    *results, d_hidden, d_head, d_adapter = _run(sharding, local, arrays, gradients=True)
    return tuple(results), (d_hidden, d_head, d_adapter)


def _load_adapter(sharding: HeadSharding, adapter: HeadAdapter | None) -> HeadAdapter | None:
    """The adapter with a device's part of its table; chunks bring their own part of ``low``."""
    if adapter is None or adapter.table is None:
        return adapter
    return adapter.replace(table=sharding.load_head(adapter.table))


def _run(sharding: HeadSharding, local: Any, arrays: Any, *, gradients: bool) -> Any:
    """Runs ``local`` on every device's part of (hidden, head, adapter, targets, weights)."""
    if sharding.is_local:
        return local(*arrays)
    positions, head = sharding.positions, sharding.head
    adapter = arrays[2]
    if adapter is not None:
        specs = {"low": positions, "table": head, "rows": PartitionSpec()}
        adapter = adapter.replace(
            **{name: spec for name, spec in specs.items() if getattr(adapter, name) is not None}
        )
    out: tuple[Any, ...] = (PartitionSpec(), positions, positions)
    if gradients:
        out += (positions, head, None) if adapter is None else (positions, None, adapter)
    specs = (positions, head, adapter, positions, positions)
    run = jax.shard_map(local, in_specs=specs, out_specs=out, check_vma=False)
    return run(*arrays)


def _backward(
    options: _Options, saved: tuple[Any, Any, Any], cotangents: Any
) -> tuple[Any, Any, Any, None, None]:
    del options
    scale = cotangents[0]
    d_hidden, d_head, d_adapter = jax.tree.map(lambda x: x * scale.astype(x.dtype), saved)
    return d_hidden, d_head, d_adapter, None, None


_fused.defvjp(_forward, _backward)


def _chunk(
    options: _Options,
    head_VD: jax.Array,
    adapter: HeadAdapter | None,
    part: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, Any, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Hidden states; the adapter's pull-back; gradient by the logits; weights; nll; correctness.

    The pull-back maps a gradient by the logits to those by the adapter and by the hidden states; it
    is None without an adapter. The positions are those of ``load_positions``, the logits this
    device's part of the vocabulary.
    """
    sharding = options.sharding
    h_BJD, t_BJ, w_BJ = (sharding.load_positions(x) for x in part)
    shards = sharding.vocabulary_shards
    first = jax.lax.axis_index(shards) * head_VD.shape[0] if shards else 0
    ids = first + jnp.arange(head_VD.shape[0])
    logits, pull = compute_logits(h_BJD, head_VD), None
    if adapter is not None:
        if adapter.low is not None:
            adapter = adapter.replace(low=sharding.load_positions(adapter.low))
        zeros = jnp.zeros_like(logits)
        start = first if shards else None
        added, pull = jax.vjp(lambda a, h: a.add(zeros, h, start), adapter, h_BJD)
        logits += added
    if shards or head_VD.shape[0] > options.vocab_size:
        logits = jnp.where(ids < options.vocab_size, logits, MASKED_LOGIT)
    # log-sum-exp by hand: the row's maximum is needed anyway, to tell whether the target has it.
    top = jnp.max(logits, axis=-1)
    top = jax.lax.pmax(top, shards) if shards else top
    is_target = ids == t_BJ[..., None]
    sums = (
        jnp.sum(jnp.exp(logits - top[..., None]), axis=-1),
        jnp.sum(jnp.where(is_target, logits, 0), axis=-1),
    )
    normalizer, picked = jax.lax.psum(sums, shards) if shards else sums
    normalizer = top + jnp.log(normalizer)
    # The gradient of w * nll by the logits is w * (softmax - one-hot). It is rounded to the head's
    # dtype, as automatic differentiation would; only the sum over chunks is float32.
    d_logits = (jnp.exp(logits - normalizer[..., None]) - is_target) * w_BJ[..., None]
    d_logits = d_logits.astype(head_VD.dtype)
    return h_BJD, pull, d_logits, w_BJ, normalizer - picked, picked >= top


def _split(arrays: Any, chunks: int) -> Any:
    """[B, I*J, ...] to [I, B, J, ...]: chunk i takes positions i, i + I, i + 2I, ...

    Strided, so that a sequence axis sharded over a mesh stays evenly sharded in every chunk.
    """

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], x.shape[1] // chunks, chunks, *x.shape[2:])
        return jnp.moveaxis(x, 2, 0)

    return jax.tree.map(split, arrays)


def _join(arrays: Any) -> Any:
    """Undoes ``_split``."""

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    return jax.tree.map(join, arrays)
