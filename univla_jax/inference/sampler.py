"""Prefill, extend and generate over one key/value cache, each a jitted function of static shapes.

    state = sampler.prefill(tokens, lengths)        prompts of unequal length
    ids, state = sampler.generate(state, ...)       every sequence continues until it stops
    state = sampler.extend(state, tokens)           tokens that are given, not chosen
    ids, state = sampler.generate(state, ...)       and on, over the same cache

Nothing is computed twice: the last generated token of a sequence is not in the cache yet
("pending") and is decoded together with whatever comes next.

Axes: B batch, S new tokens, P tokens of a packed batch, R ids that may be chosen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.errors import UserError
from univla_jax.inference import decode_loop, decode_step
from univla_jax.inference.decode_step import NO_TOKEN, DecodeBatch, DecodeState, Generated
from univla_jax.inference.memory import device_bytes
from univla_jax.inference.sampling import GREEDY, GrammarMask, Sampling
from univla_jax.inference.speculative import Drafts
from univla_jax.models.decoder import Decoder
from univla_jax.models.kv_cache import KVCache
from univla_jax.models.placement import LOCAL, Placement, shard_cache


class Timer:
    """Adds up the wall time of named sections of a call.

    Attributes:
      milliseconds: section -> time so far.
    """

    def __init__(self) -> None:
        """Starts without sections."""
        self.milliseconds: dict[str, float] = {}

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[list[Any]]:
        """Times a block; arrays put into the yielded list are waited for."""
        begin, results = time.perf_counter(), []
        yield results
        jax.block_until_ready(results)
        spent = 1e3 * (time.perf_counter() - begin)
        self.milliseconds[name] = self.milliseconds.get(name, 0.0) + spent


# ----------------------------------------------------------------------------
# Buckets: few static shapes for inputs of any size, so that hardly any call compiles.


_MIN_LENGTH = 32
_SMALL_BATCH = 8


def length_bucket(length: int) -> int:
    """The smallest bucket of at least ``length`` tokens.

    Buckets are multiples of 32, and of an eighth of the power of two below: at most an eighth of
    a long sequence is padding, and each doubling has eight buckets.
    """
    power_below = 1 << (max(length, 1).bit_length() - 1)
    return _round_up(length, max(_MIN_LENGTH, power_below // 8))


def batch_bucket(batch_size: int) -> int:
    """The smallest bucket of at least ``batch_size`` sequences: 1, 2, 4, 8, 16, 24, 32, …"""
    if batch_size <= _SMALL_BATCH:
        return 1 << max(0, batch_size - 1).bit_length()
    return _round_up(batch_size, _SMALL_BATCH)


def pad_prompts(
    prompts: Sequence[np.ndarray], pad: int, *, batch_size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Stacks prompts of different lengths into one static shape.

    Args:
      prompts: int32 [n] each.
      pad: id that fills up on the right.
      batch_size: at least the number of prompts; a bucket by default. Sequences that are missing
        repeat the first prompt.

    Returns:
      tokens int32 [B, S] and lengths int32 [B].
    """
    batch_size = batch_bucket(len(prompts)) if batch_size is None else batch_size
    # Copies of a real prompt, not empty ones: every sequence of a prefill has a last token.
    filled = [*prompts, *[prompts[0]] * (batch_size - len(prompts))]
    lengths = np.array([len(p) for p in filled], np.int32)
    tokens = np.full((batch_size, length_bucket(int(lengths.max()))), pad, np.int32)
    for row, prompt in zip(tokens, filled):
        row[: len(prompt)] = prompt
    return tokens, lengths


def _round_up(value: int, step: int) -> int:
    return -(-max(value, 1) // step) * step


def _pad_to_bucket(tokens: np.ndarray, extra: int = 0) -> np.ndarray:
    """Widens [B, S] so that S plus ``extra`` columns is a power of two or ``length_bucket``."""
    width = max(1, tokens.shape[1] + extra)
    # Few new tokens, as between two frames, would pay for 32: below that, powers of two.
    bucket = 1 << (width - 1).bit_length() if width <= _MIN_LENGTH else length_bucket(width)
    return np.pad(tokens, ((0, 0), (0, bucket - extra - tokens.shape[1])))


# ----------------------------------------------------------------------------


def _in_placement(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of ``Sampler`` that runs over the mesh of its placement."""

    @functools.wraps(method)
    def call(self: Sampler, *arguments: Any, **options: Any) -> Any:
        with self.placement.scope():
            return method(self, *arguments, **options)

    return call


class Sampler:
    """A decoder with its parameters that prefills and continues batches of sequences."""

    def __init__(
        self,
        model: Decoder,
        params: Any,
        *,
        unstack_layers: bool | None = None,
        placement: Placement = LOCAL,
    ) -> None:
        """Takes a decoder and its parameters.

        Args:
          model: the decoder.
          params: its parameters.
          unstack_layers: whether to hold a second copy of the layers, one by one, for the decode
            loop: on a CPU it saves a third of the time per token, and is the default there.
          placement: of the parameters.
        """
        self.model = model
        self.params = params
        self.placement = placement
        if unstack_layers is None:
            unstack_layers = jax.default_backend() == "cpu"
        unstack_layers = unstack_layers and params is not None
        self._layers = (
            decode_step.unstack_layer_params(params, model.config.num_layers)
            if unstack_layers
            else None
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the parameters on each device, a second copy of the layers included."""
        return device_bytes((self.params, self._layers))

    @_in_placement
    def prefill(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray | None = None,
        *,
        slots: int | None = None,
        packed_length: int | None = None,
    ) -> DecodeState:
        """Prefills prompts into a new cache.

        Args:
          tokens: int32 [B, S], right-padded with any id.
          lengths: int32 [B] real tokens per sequence, at least 1; all S by default.
          slots: cache slots per sequence to reserve now, so that later calls need not grow it.
          packed_length: P, to compute the prompts one after another instead of side by side; at
            least the sum of the lengths.

        Raises:
          UserError: ids outside the vocabulary, or lengths that fit neither S nor
            ``packed_length``.
        """
        tokens, lengths = self._check_tokens(tokens, lengths, min_length=1)
        tokens = _pad_to_bucket(tokens)
        width, max_length = tokens.shape[1], int(lengths.max())
        slots = length_bucket(max(slots or 0, width))
        if packed_length is None:
            batch = decode_step.prefill(self.model, self.params, tokens, lengths, slots=slots)
            return DecodeState(batch, max_length)
        # Boolean indexing goes through the batch in order: the real tokens, one prompt behind the
        # other. What is left of ``packed_length`` counts to the last prompt and is never read.
        real = tokens[np.arange(width) < lengths[:, None]]
        if len(real) > packed_length:
            raise UserError(f"packed_length={packed_length}: the prompts have {len(real)} tokens")
        packed = np.zeros(packed_length, np.int32)
        packed[: len(real)] = real
        batch = decode_step.prefill_packed(
            self.model, self.params, packed, lengths, width=width, slots=slots
        )
        return DecodeState(batch, max_length)

    @_in_placement
    def extend(
        self,
        state: DecodeState,
        tokens: np.ndarray,
        lengths: np.ndarray | None = None,
        *,
        window: int | None = None,
    ) -> DecodeState:
        """Appends given tokens to every sequence, after its pending one.

        Args:
          state: donated.
          tokens: int32 [B, S], right-padded with any id.
          lengths: int32 [B] real tokens per sequence, 0 leaves it as it is; all S by default.
          window: cache slots that are attended at least, so that calls share one shape.

        Raises:
          UserError: ids outside the vocabulary, or another number of sequences.
        """
        tokens, lengths = self._check_tokens(tokens, lengths, batch_size=state.batch_size)
        pending = int(state.has_pending)
        padded = _pad_to_bucket(tokens, extra=pending)
        # The call attends what is cached (all but a pending token), and writes the padding too:
        # it needs slots for it, though the next call overwrites them.
        batch, window = _make_room(
            state.batch,
            window=max(state.max_length - pending, window or 0),
            slots=state.max_length + padded.shape[1],
        )
        batch = decode_step.append(
            self.model,
            self.params,
            batch,
            padded,
            lengths,
            window=window,
            has_pending=state.has_pending,
        )
        return DecodeState(batch, state.max_length + int(lengths.max(initial=0)))

    @_in_placement
    def generate(
        self,
        state: DecodeState,
        *,
        max_new_tokens: int,
        allowed: np.ndarray | None = None,
        stop_id: int | None = None,
        sampling: Sampling = GREEDY,
        key: jax.Array | None = None,
        active: np.ndarray | None = None,
        window: int | None = None,
        forced_ids: np.ndarray | None = None,
        grammar: GrammarMask | None = None,
        guidance: float = 1.0,
        drafts: Drafts | None = None,
        block: int = 1,
        num_drawn: int = 0,
    ) -> tuple[Generated, DecodeState]:
        """Continues every sequence until it stops, in one jitted loop.

        Args:
          state: donated.
          max_new_tokens: the most tokens chosen per sequence.
          allowed: int [R] ids that may be chosen; only these rows of the head are multiplied,
            which equals masking the full logits. None allows the whole vocabulary.
          stop_id: a sequence ends after choosing it; it must be allowed. None lets every sequence
            choose ``max_new_tokens``.
          sampling: how to choose.
          key: random key, or one per sequence [B]; by default that of ``sampling.seed``.
          active: bool [B], sequences that take part; the others stay as they are. All by default.
          window: cache slots that are attended at least, so that calls share one shape.
          forced_ids: int32 [max_new_tokens], the only id that may stand at each position, negative
            where any allowed one may (``sequences.frames.video_grammar``); they need not be
            allowed.
          grammar: what whole outputs look like, over the allowed ids in ascending order.
          guidance: weight of classifier-free guidance. Unless 1, the second half of the batch are
            the sequences of the first without their instruction; both get the ids chosen from
            ``without + guidance * (with - without)``.
          drafts: what drafts of the next tokens are copied from; the tokens are the same.
          block: tokens decoded per step, of which all but the first are drafts.
          num_drawn: positions that earlier calls have drawn from the same key.

        Returns:
          what was chosen, and the state after it.

        Raises:
          UserError: an id outside the vocabulary, a stop id that is not allowed, forced ids of
            another length, a grammar of other ids, guidance of an odd number of sequences or with a
            grammar, a block below 1, or drafts of another number of sequences.
        """
        drafts = Drafts.none(state.batch_size) if drafts is None else drafts
        if block < 1 or len(drafts.source) != state.batch_size:
            raise UserError(
                f"a block of {block} and drafts of {len(drafts.source)} sequences, expected at "
                f"least 1 and {state.batch_size}"
            )
        forced_ids = self._check_forced(forced_ids, max_new_tokens)
        ids = self._check_allowed(allowed, stop_id, forced_ids)
        _check_grammar(grammar, ids, guidance)
        state, num_keys = self._append_pending(state), state.batch_size
        if guidance != 1:
            if num_keys % 2:
                raise UserError(
                    f"guidance needs sequences with and without instruction, got {num_keys}"
                )
            num_keys //= 2
        # The loop runs inside one jitted call, where no array can grow: the cache must have slots
        # for all new tokens, and the window spans them from the first step on. Drafts that are
        # rejected are written as well.
        max_length = state.max_length + max_new_tokens
        slots = max_length + block - 1
        batch, window = _make_room(state.batch, window=max(slots, window or 0), slots=slots)
        batch, generated = decode_loop.generate(
            self.model,
            self.params,
            self._layers,
            batch,
            ids,
            np.int32(NO_TOKEN if stop_id is None else stop_id),
            _sequence_keys(key, num_keys, sampling),
            _active(active, state.batch_size),
            forced_ids,
            grammar,
            drafts,
            np.int32(num_drawn),
            max_new_tokens=max_new_tokens,
            sampling=dataclasses.replace(sampling, seed=0),  # static: another seed compiles nothing
            window=window,
            guidance=guidance,
            block=block,
        )
        return generated, DecodeState(batch, max_length, has_pending=True)

    def next_log_probs(self, state: DecodeState, ids: np.ndarray) -> np.ndarray:
        """Log-probabilities float32 [B, R] of what comes next among ``ids``, in their order.

        Args:
          state: without pending tokens, as ``prefill`` and ``extend`` return it; not donated.
          ids: int [R].

        Raises:
          UserError: an id outside the vocabulary, or a state whose last tokens are pending.
        """
        if state.has_pending:
            raise UserError("log-probabilities after generated tokens: extend the state first")
        ids = np.asarray(ids, np.int32)
        self._check_ids(ids)
        hidden = state.batch.last_hidden
        return np.asarray(decode_step.next_log_probs(self.model, self.params, hidden, ids))

    def _append_pending(self, state: DecodeState) -> DecodeState:
        if not state.has_pending:
            return state
        return self.extend(state, np.zeros((state.batch_size, 0), np.int32))

    def _check_tokens(
        self, tokens: Any, lengths: Any, *, batch_size: int | None = None, min_length: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [B, S] with zeros after each sequence's end, and lengths [B]."""
        tokens = np.asarray(tokens, np.int32)
        found, width = tokens.shape
        lengths = np.asarray(np.full(found, width) if lengths is None else lengths, np.int32)
        if batch_size not in (None, found):
            raise UserError(f"tokens of {found} sequences for a state of {batch_size}")
        fits = (lengths >= min_length) & (lengths <= width)
        if lengths.shape != (found,) or not fits.all():
            raise UserError(
                f"lengths {lengths.tolist()}: expected {found} of {min_length} to {width}"
            )
        is_real = np.arange(width) < lengths[:, None]
        self._check_ids(tokens[is_real])
        return np.where(is_real, tokens, 0), lengths

    def _check_allowed(
        self,
        allowed: np.ndarray | None,
        stop_id: int | None,
        forced_ids: np.ndarray | None = None,
    ) -> np.ndarray | None:
        """Ascending int32 [R] of the allowed ids."""
        self._check_ids(np.array([] if stop_id is None else [stop_id]))
        if allowed is None:
            return None
        ids = np.unique(np.asarray(allowed, np.int32))
        self._check_ids(ids)
        reachable = ids if forced_ids is None else np.union1d(ids, forced_ids)
        if ids.size == 0 or (stop_id is not None and stop_id not in reachable):
            raise UserError(f"stop id {stop_id} is not among the {ids.size} allowed ids; add it")
        return ids

    def _check_forced(self, forced_ids: np.ndarray | None, count: int) -> np.ndarray | None:
        if forced_ids is None:
            return None
        forced_ids = np.asarray(forced_ids, np.int32)
        if forced_ids.shape != (count,):
            raise UserError(f"forced_ids of shape {forced_ids.shape} for {count} new tokens")
        self._check_ids(forced_ids[forced_ids >= 0])
        return forced_ids

    def _check_ids(self, ids: np.ndarray) -> None:
        size = self.model.config.vocab_size
        wrong = ids[(ids < 0) | (ids >= size)]
        if wrong.size:
            raise UserError(f"token id {int(wrong[0])} is outside the vocabulary of {size} ids")


def _check_grammar(
    grammar: GrammarMask | None, ids: np.ndarray | None, guidance: float = 1.0
) -> None:
    if grammar is None:
        return
    columns = grammar.num_completed.shape[1]
    if ids is None or len(ids) != columns or guidance != 1:
        allowed = "all" if ids is None else len(ids)
        raise UserError(
            f"a grammar over {columns} ids with {allowed} allowed ids and guidance {guidance}: "
            "expected the grammar's own ids and guidance 1"
        )


def _active(active: np.ndarray | None, batch_size: int) -> np.ndarray:
    return np.ones(batch_size, bool) if active is None else np.asarray(active, bool)


def _sequence_keys(key: jax.Array | None, batch_size: int, sampling: Sampling) -> jax.Array | None:
    """One key per sequence; sequence i of any batch gets the same one from the same key."""
    if sampling.greedy:
        return None
    key = jax.random.key(sampling.seed) if key is None else key
    if key.ndim:
        return key
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(batch_size))


@functools.partial(jax.jit, static_argnames="slots")
def grow_cache(cache: KVCache, slots: int) -> KVCache:
    """The same content with at least ``slots`` slots per sequence, on the same devices."""
    return jax.tree.map(shard_cache, cache.grow(slots))


def _make_room(batch: DecodeBatch, *, window: int, slots: int) -> tuple[DecodeBatch, int]:
    """A cache of at least ``slots`` slots, and a bucket of at least ``window`` of them."""
    if slots > batch.cache.slots:
        batch = batch.replace(cache=grow_cache(batch.cache, length_bucket(slots)))
    return batch, min(length_bucket(window), batch.cache.slots)
