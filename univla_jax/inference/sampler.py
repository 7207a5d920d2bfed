"""Prefill, extend and generate over one key/value cache, each a jitted function of static shapes.

    state = sampler.prefill(tokens, lengths)        read prompts of unequal length
    ids, state = sampler.generate(state, ...)       let rows continue until each stops
    state = sampler.extend(state, tokens)           add tokens that are given, not chosen
    ids, state = sampler.generate(state, ...)       and on, over the same cache

Nothing is read twice: the last generated token of a row is not in the cache yet ("pending") and is
read together with whatever comes next.

Axes: B rows, S new tokens, N most generated tokens, R ids that may be chosen, D model, L layers,
M cache slots, W window of slots that are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.errors import UserError
from univla_jax.inference import decode_step
from univla_jax.inference.decode_step import NO_TOKEN, DecodeBatch, DecodeState, Generated
from univla_jax.inference.sampling import GREEDY, GrammarMask, Sampling
from univla_jax.inference.speculative import generate_speculative
from univla_jax.models.decoder import Decoder

# ----------------------------------------------------------------------------
# Where the time of a call went.


class Timer:
    """Adds up the milliseconds of named parts; what a part computes is waited for.

    Attributes:
      milliseconds: part -> time so far.
    """

    def __init__(self) -> None:
        """Starts with no parts."""
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
# Few static shapes for inputs of any size, so that nothing is compiled again at every call.


_LEAST_LENGTH = 32
_SMALL_BATCH = 8


def length_bucket(length: int) -> int:
    """The smallest bucket of at least ``length`` tokens.

    Buckets are multiples of 32, and of an eighth of the power of two below: at most an eighth of
    a long row is padding, and each doubling has eight buckets.
    """
    return _up(length, max(_LEAST_LENGTH, _power_below(length) // 8))


def batch_bucket(batch_size: int) -> int:
    """The smallest bucket of at least ``batch_size`` sequences: 1, 2, 4, 8, 16, 24, 32, …"""
    if batch_size <= _SMALL_BATCH:
        return 1 << max(0, batch_size - 1).bit_length()
    return _up(batch_size, _SMALL_BATCH)


def pad_prompts(
    prompts: Sequence[np.ndarray], pad: int, *, batch_size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Stacks prompts of different lengths into one static shape.

    Args:
      prompts: int32 [n] each.
      pad: id that fills up on the right.
      batch_size: at least the number of prompts; a bucket by default. The rows that
        are missing repeat the first prompt.

    Returns:
      tokens int32 [B, S] and lengths int32 [B].
    """
    batch_size = batch_bucket(len(prompts)) if batch_size is None else batch_size
    filled = [*prompts, *[prompts[0]] * (batch_size - len(prompts))]
    lengths = np.array([len(p) for p in filled], np.int32)
    tokens = np.full((batch_size, length_bucket(int(lengths.max()))), pad, np.int32)
    for row, prompt in zip(tokens, filled):
        row[: len(prompt)] = prompt
    return tokens, lengths


def _up(value: int, step: int) -> int:
    return -(-max(value, 1) // step) * step


def _power_below(value: int) -> int:
    return 1 << (max(value, 1).bit_length() - 1)


# ----------------------------------------------------------------------------


class Sampler:
    """A decoder with its parameters, ready to read and continue batches of sequences."""

    def __init__(self, model: Decoder, params: Any, *, unstack_layers: bool | None = None) -> None:
        """Takes a decoder and its parameters (any sharding).

        Args:
          model: the decoder.
          params: its parameters.
          unstack_layers: whether to keep a second copy of the layers, one by one, for the decode
            loop: on a CPU it saves a third of the time per token, and is the default there.
        """
        self.model = model
        self.params = params
        if unstack_layers is None:
            unstack_layers = jax.default_backend() == "cpu"
        keep = unstack_layers and params is not None
        self._layers = (
            decode_step.unstack_layer_params(params, model.config.num_layers) if keep else None
        )

    def prefill(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray | None = None,
        *,
        slots: int | None = None,
        packed: int | None = None,
    ) -> DecodeState:
        """Reads prompts into a new cache.

        Args:
          tokens: int32 [B, S], right-padded with any id.
          lengths: int32 [B] real tokens per row, at least 1; all S by default.
          slots: room per row to reserve now, so that later calls need not move the cache.
          packed: reads the rows one behind the other, as so many tokens, instead of side by side;
            at least the sum of the lengths.

        Raises:
          UserError: ids outside the vocabulary, or lengths that fit neither S nor ``packed``.
        """
        tokens, lengths = self._check(tokens, lengths, at_least=1)
        tokens = _pad_to_bucket(tokens)
        slots = length_bucket(max(slots or 0, tokens.shape[1]))
        if packed is None:
            rows = decode_step.prefill(self.model, self.params, tokens, lengths, slots=slots)
            return DecodeState(rows, bound=int(lengths.max()))
        width = tokens.shape[1]
        real = tokens[np.arange(width) < lengths[:, None]]
        if len(real) > packed:
            raise UserError(f"packed={packed}: the rows have {len(real)} tokens together")
        flat = np.zeros(packed, np.int32)
        flat[: len(real)] = real
        rows = decode_step.prefill_packed(
            self.model, self.params, flat, lengths, width=width, slots=slots
        )
        return DecodeState(rows, bound=int(lengths.max()))

    def extend(
        self,
        state: DecodeState,
        tokens: np.ndarray,
        lengths: np.ndarray | None = None,
        *,
        window: int | None = None,
    ) -> DecodeState:
        """Appends given tokens to every row, after its pending one.

        Args:
          state: consumed.
          tokens: int32 [B, S], right-padded with any id.
          lengths: int32 [B] real tokens per row, 0 leaves a row as it is; all S by default.
          window: slots that are read at least, so that calls share one shape.

        Raises:
          UserError: ids outside the vocabulary, or another number of rows.
        """
        tokens, lengths = self._check(tokens, lengths, batch_size=state.batch.pending.shape[0])
        bound = state.bound + int(lengths.max(initial=0))
        padded = _pad_to_bucket(tokens, extra=int(state.has_pending))
        start = state.bound - int(state.has_pending)
        room = state.bound + padded.shape[1]
        rows, window = _make_room(state.batch, read=max(start, window or 0), write=room)
        append = decode_step.append_pending if state.has_pending else decode_step.append
        rows = append(self.model, self.params, rows, padded, lengths, window=window)
        return DecodeState(rows, bound=bound)

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
    ) -> tuple[Generated, DecodeState]:
        """Lets every row choose tokens until it stops, in one jitted loop.

        Args:
          state: consumed.
          max_new_tokens: N.
          allowed: int [R] ids that may be chosen; only these rows of the head are multiplied,
            which equals masking the full logits. None allows the whole vocabulary.
          stop_id: a row ends after choosing it; it must be allowed. None lets every row choose N.
          sampling: how to choose.
          key: random key, or one per row [B]; by default that of ``sampling.seed``.
          active: bool [B], rows that take part; the others stay as they are. All by default.
          window: slots that are read at least, so that calls share one shape.
          forced_ids: int32 [N], the only id that may stand at each place, or negative where any
            allowed one may (``sequences.frames.video_grammar``); ids it forces need not be
            allowed.
          grammar: what whole outputs look like, over the allowed ids in ascending order.
          guidance: weight of classifier-free guidance. Unless 1, the second half of the rows are
            those of the first without their instruction; both get the ids chosen from
            ``without + guidance * (with - without)``.

        Returns:
          what was chosen, and the state behind it.

        Raises:
          UserError: an id outside the vocabulary, a stop id that is not allowed, a grammar
            of another length, a grammar of other ids, or guidance of an odd number of rows or with
            a grammar.
        """
        if state.has_pending:
            nothing = np.zeros((state.batch.pending.shape[0], 0), np.int32)
            state = self.extend(state, nothing)
        forced = self._forced(forced_ids, max_new_tokens)
        ids = self._allowed(allowed, stop_id, forced)
        _check_grammar(grammar, ids, guidance)
        batch = state.batch.pending.shape[0]
        if guidance != 1 and batch % 2:
            raise UserError(f"guidance needs rows with and without instruction, got {batch} rows")
        bound = state.bound + max_new_tokens
        rows, window = _make_room(state.batch, read=max(bound, window or 0), write=bound)
        rows, tokens, lengths, stopped, num_overridden = decode_step.generate(
            self.model,
            self.params,
            self._layers,
            rows,
            ids,
            np.int32(NO_TOKEN if stop_id is None else stop_id),
            _row_keys(key, batch if guidance == 1 else batch // 2, sampling),
            np.ones(batch, bool) if active is None else np.asarray(active, bool),
            forced,
            grammar,
            count=max_new_tokens,
            sampling=dataclasses.replace(sampling, seed=0),  # static: another seed compiles nothing
            window=window,
            guidance=guidance,
        )
        generated = Generated(tokens, lengths, stopped, num_overridden)
        return generated, DecodeState(rows, bound, has_pending=True)

    def generate_speculative(
        self,
        state: DecodeState,
        *,
        max_new_tokens: int,
        allowed: np.ndarray,
        draft_source: np.ndarray,
        stop_id: int | None = None,
        grammar: GrammarMask | None = None,
        active: np.ndarray | None = None,
        window: int | None = None,
        block: int = 4,
    ) -> tuple[Generated, DecodeState, int]:
        """Greedy ``generate`` that reads several guessed tokens at once; the same tokens.

        Args:
          state: consumed.
          max_new_tokens: N.
          allowed: int [R] ids that may be chosen.
          draft_source: int32 [B, H], H at least 1, what drafts are copied from, for example the
            chunk before; negative where nothing is.
          stop_id: as in ``generate``.
          grammar: as in ``generate``.
          active: as in ``generate``.
          window: as in ``generate``.
          block: tokens read per step, at least 2.

        Returns:
          what was chosen, the state behind it, and the steps it took.

        Raises:
          UserError: as ``generate``; or a block below 2, or nothing to copy from.
        """
        draft_source = np.asarray(draft_source, np.int32)
        batch = state.batch.pending.shape[0]
        if (
            block < 2
            or draft_source.ndim != 2
            or len(draft_source) != batch
            or not draft_source.shape[1]
        ):
            raise UserError(
                f"speculative decoding: block {block} and {list(draft_source.shape)} ids to copy "
                f"from, expected at least 2 and [{batch}, H]"
            )
        if state.has_pending:
            state = self.extend(state, np.zeros((batch, 0), np.int32))
        ids = self._allowed(allowed, stop_id, None)
        _check_grammar(grammar, ids)
        bound = state.bound + max_new_tokens
        need = max(bound + block, window or 0)
        rows, window = _make_room(state.batch, read=need, write=need)
        rows, tokens, lengths, stopped, num_overridden, steps = generate_speculative(
            self.model,
            self.params,
            self._layers,
            rows,
            ids,
            np.int32(NO_TOKEN if stop_id is None else stop_id),
            np.ones(batch, bool) if active is None else np.asarray(active, bool),
            draft_source,
            grammar,
            count=max_new_tokens,
            block=block,
            window=window,
        )
        generated = Generated(tokens, lengths, stopped, num_overridden)
        return generated, DecodeState(rows, bound), int(steps)

    def _check(
        self, tokens: Any, lengths: Any, *, batch_size: int | None = None, at_least: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.asarray(tokens, np.int32)
        width = tokens.shape[1]
        if lengths is None:
            lengths = np.full(tokens.shape[0], width)
        lengths = np.asarray(lengths, np.int32)
        if batch_size not in (None, tokens.shape[0]):
            raise UserError(f"{tokens.shape[0]} rows of tokens for a state of {batch_size} rows")
        fits = (lengths >= at_least) & (lengths <= width)
        if lengths.shape != tokens.shape[:1] or not fits.all():
            raise UserError(
                f"lengths {lengths.tolist()}: expected {tokens.shape[0]} of {at_least} to {width}"
            )
        real = tokens[np.arange(width) < lengths[:, None]]
        _check_ids(real, self.model.config.vocab_size)
        return np.where(np.arange(width) < lengths[:, None], tokens, 0), lengths

    def _allowed(
        self, allowed: np.ndarray | None, stop_id: int | None, forced: np.ndarray | None
    ) -> np.ndarray | None:
        size = self.model.config.vocab_size
        _check_ids(np.array([] if stop_id is None else [stop_id]), size)
        if allowed is None:
            return None
        ids = np.unique(np.asarray(allowed, np.int32))
        _check_ids(ids, size)
        reachable = ids if forced is None else np.union1d(ids, forced)
        if ids.size == 0 or (stop_id is not None and stop_id not in reachable):
            raise UserError(f"stop id {stop_id} is not among the {ids.size} allowed ids; add it")
        return ids

    def _forced(self, forced_ids: np.ndarray | None, count: int) -> np.ndarray | None:
        if forced_ids is None:
            return None
        forced = np.asarray(forced_ids, np.int32)
        if forced.shape != (count,):
            raise UserError(f"forced_ids of shape {forced.shape} for {count} new tokens")
        _check_ids(forced[forced >= 0], self.model.config.vocab_size)
        return forced


def _check_grammar(
    grammar: GrammarMask | None, ids: np.ndarray | None, guidance: float = 1.0
) -> None:
    if grammar is None:
        return
    columns = grammar.finishes.shape[1]
    if ids is None or len(ids) != columns or guidance != 1:
        allowed = "all" if ids is None else len(ids)
        raise UserError(
            f"a grammar over {columns} ids with {allowed} allowed ids and guidance {guidance}: "
            "expected the grammar's own ids and guidance 1"
        )


def _check_ids(ids: np.ndarray, size: int) -> None:
    wrong = ids[(ids < 0) | (ids >= size)]
    if wrong.size:
        raise UserError(f"token id {int(wrong[0])} is outside the vocabulary of {size} ids")


def _row_keys(key: jax.Array | None, batch: int, sampling: Sampling) -> jax.Array | None:
    """One key per row; row i of any batch gets the same one from the same key."""
    if sampling.greedy:
        return None
    key = jax.random.key(sampling.seed) if key is None else key
    if key.ndim:
        return key
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(batch))


def _pad_to_bucket(tokens: np.ndarray, extra: int = 0) -> np.ndarray:
    """Widens [B, S] so that S plus ``extra`` columns is a bucket: a power of two, or from 32 on
    one of ``length_bucket``."""
    width = max(1, tokens.shape[1] + extra)
    bucket = 1 << (width - 1).bit_length() if width <= 32 else length_bucket(width)
    return np.pad(tokens, ((0, 0), (0, bucket - extra - tokens.shape[1])))


def _make_room(rows: DecodeBatch, *, read: int, write: int) -> tuple[DecodeBatch, int]:
    """A cache of at least ``write`` slots, and a window bucket of at least ``read``."""
    if write > rows.cache.slots:
        rows = rows.replace(cache=rows.cache.grow(length_bucket(write)))
    return rows, min(length_bucket(read), rows.cache.slots)
