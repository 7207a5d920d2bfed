"""Prefix caching: key/value caches kept between calls, so that only new tokens are prefilled.

    call 0   bos text │ o0 boa               → a0 eoa
    call 1   bos text │ o0 boa a0 eoa │ o1 boa   → …    only "eoa │ o1 boa" is new
    call 2   bos text │ o1 boa a1 eoa │ o2 boa   → …    o1 moved: prefilled again, maybe ahead

A cached key depends on all ids before it and on its position, so a common prefix can be reused and
nothing else. The ids chosen are those of a fresh prefill.

Axes: B batch, S new tokens, M cache slots, D model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.inference.decode_step import NO_TOKEN, DecodeBatch, DecodeState, Generated
from univla_jax.inference.memory import device_bytes
from univla_jax.inference.sampler import Sampler, Timer, batch_bucket, grow_cache, length_bucket
from univla_jax.inference.sampling import GREEDY, GrammarMask, Sampling
from univla_jax.inference.speculative import Drafts, block_size
from univla_jax.models.kv_cache import KVCache
from univla_jax.models.placement import shard_cache
from univla_jax.tokenizers.continuations import Continuations

_PACK_FROM = 4  # sequences; smaller batches are prefilled padded, to spare a compiled shape
_MIN_ROOM = 32  # slots after the longest usual prompt: the padding of new tokens is below that


@dataclasses.dataclass(frozen=True)
class CachedPrefix:
    """What is kept of one sequence between calls.

    Attributes:
      cache: keys and values of a batch of one.
      ids: int32 [n], the ids in its first n slots.
    """

    cache: KVCache
    ids: np.ndarray

    @property
    def num_bytes(self) -> int:
        """Bytes of the cache on each device that holds a part of it."""
        return device_bytes(self.cache)

    def common_length(self, ids: np.ndarray) -> int:
        """How many of ``ids`` [m] stand in the cache, from the first on."""
        n = min(len(ids), len(self.ids))
        differs = np.flatnonzero(ids[:n] != self.ids[:n])
        return int(differs[0]) if len(differs) else n


@dataclasses.dataclass(frozen=True)
class GenerationRules:
    """How sequences are continued.

    Attributes:
      allowed: int [R] ids that may be chosen.
      stop_id: ends a sequence.
      max_new_tokens: the most ids chosen per sequence.
      sampling: how they are chosen.
      grammar: what whole completions look like, over the allowed ids; None for any order.
      block: tokens decoded per step, of which all but the first are drafts; by default as many as
        cost about as much as one (``speculative.block_size``).
    """

    allowed: np.ndarray
    stop_id: int
    max_new_tokens: int
    sampling: Sampling = GREEDY
    grammar: GrammarMask | None = None
    block: int | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """The continuation of one prompt.

    Attributes:
      ids: int32 [n] chosen, up to and with the stop id where it was reached.
      cached_prefix: keys and values of prompt and completion.
      num_overridden: how often the grammar ruled out the likeliest id.
    """

    ids: np.ndarray
    cached_prefix: CachedPrefix
    num_overridden: int


class PrefixCache:
    """Completes prompts over the caches that earlier calls left of them.

    Few shapes are compiled: new tokens are padded to one of ``usual_lengths`` where they fit,
    batches to a bucket, and caches have one size unless a prompt is too long for it.

    Attributes:
      rules: how prompts are continued.
      continuations: what drafts are looked up in.
    """

    def __init__(
        self,
        sampler: Sampler,
        rules: GenerationRules,
        *,
        usual_lengths: Sequence[int],
        batch_size: int | None = None,
        continuations: Continuations | None = None,
    ) -> None:
        """Fixes the shapes.

        Args:
          sampler: prefills and decodes.
          rules: how prompts are continued.
          usual_lengths: most new tokens of the usual calls, for example of one observation and of
            a whole prompt.
          batch_size: of every call; by default a bucket of the number of prompts.
          continuations: what drafts are looked up in; by default learned from what is chosen.
        """
        self.rules = rules
        self._sampler, self._batch_size = sampler, batch_size
        self.continuations = continuations or Continuations()
        self._widths = sorted({length_bucket(n) for n in usual_lengths})
        room = max(rules.max_new_tokens + self._block(1), _MIN_ROOM)
        self._slots = length_bucket(self._widths[-1] + room)
        self._max_reused = length_bucket(self._widths[-1] - self._widths[0])

    def complete(
        self,
        prompts: Sequence[np.ndarray],
        cached_prefixes: Sequence[CachedPrefix | None],
        *,
        keys: Sequence[jax.Array] | None = None,
        timer: Timer | None = None,
    ) -> list[Completion]:
        """Continues every prompt until it stops.

        Args:
          prompts: int32 [n] each.
          cached_prefixes: of the same sequences, donated; None where there is none.
          keys: random key of each prompt, so that it draws the same in any batch; needed unless
            decoding is greedy.
          timer: gets the sections ``prefill`` and ``decode``.
        """
        with self._sampler.placement.scope():
            return self._complete(prompts, cached_prefixes, keys, timer or Timer())

    def _complete(
        self,
        prompts: Sequence[np.ndarray],
        cached_prefixes: Sequence[CachedPrefix | None],
        keys: Sequence[jax.Array] | None,
        timer: Timer,
    ) -> list[Completion]:
        with timer.section("prefill") as results:
            state = self._prefill(prompts, cached_prefixes)
            results.append(state.batch)
        with timer.section("decode") as results:
            generated, state = self._decode(state, len(prompts), keys)
            results.append(generated.tokens)
        tokens, counts = np.asarray(generated.tokens), np.asarray(generated.lengths)
        num_overridden = np.asarray(generated.num_overridden).tolist()
        chosen = [tokens[i, : counts[i]] for i in range(len(prompts))]
        for ids in chosen:
            self.continuations.learn(ids)
        # The last chosen id is not in the cache: it is prefilled with what comes next.
        cached = [np.append(p, ids[:-1]).astype(np.int32) for p, ids in zip(prompts, chosen)]
        return [Completion(*parts) for parts in zip(chosen, _kept(state, cached), num_overridden)]

    def prefill_ahead(self, prefixes: Sequence[np.ndarray]) -> list[CachedPrefix]:
        """Prefills the beginnings int32 [n] of prompts to come."""
        with self._sampler.placement.scope():
            return _kept(self._prefill(prefixes, [None] * len(prefixes)), prefixes)

    def should_prefill(self, prefix: np.ndarray, cached: CachedPrefix | None) -> bool:
        """Whether prefilling ``prefix`` ahead would spare a later call anything."""
        reused = 0 if cached is None else cached.common_length(prefix)
        return len(prefix) - reused > 1  # the last id chosen is always prefilled with the next call

    def cache_bytes(self, batch_size: int = 1) -> int:
        """Bytes per device of the caches of ``batch_size`` usual prompts."""
        config, placement = self._sampler.model.config, self._sampler.placement
        shape = jax.eval_shape(lambda: KVCache.create(config, batch_size, self._slots))
        return device_bytes(shape) // placement.cache_parts(config.num_kv_heads)

    def reusable_length(self, prompt: np.ndarray, cached: CachedPrefix | None) -> int:
        """How many leading ids of ``prompt`` are taken from its cached prefix.

        None where more remain than the shortest usual length: that would save little, and compile
        one more shape. And of a usual prompt no more than the longest usual length minus the
        shortest, which keeps the window of cache slots small.
        """
        if cached is None:
            return 0
        shared = min(cached.common_length(prompt), len(prompt) - 1)
        shortest, longest = self._widths[0], self._widths[-1]
        if len(prompt) <= longest:
            shared = min(shared, self._max_reused)
        return shared if len(prompt) - shared <= shortest < len(prompt) else 0

    def warmup(self, batch_size: int) -> None:
        """Compiles what calls with ``batch_size`` prompts use, and waits for it.

        That is: a prefill of each usual length, packed and padded; batches of several widths
        merged; an extension of cached prefixes; and the decode loop.
        """
        with self._sampler.placement.scope():
            self._warmup(self._padded_size(batch_size))

    def _warmup(self, size: int) -> None:
        for width in self._widths:
            for length in (width, width // 2) if size >= _PACK_FROM else (width,):
                prompts = [np.zeros(length, np.int32)] * size
                state = self._prefill_group(prompts, [None] * size, [0] * size, width)
        state = self._merge([state], [range(size)], size)
        cache = _split(state.batch)[0].cache
        prompts = [np.zeros(self._widths[0], np.int32)] * size
        caches = [cache, *[None] * (size - 1)]
        state = self._prefill_group(prompts, caches, [1, *[0] * (size - 1)], self._widths[0])
        keys = None if self.rules.sampling.greedy else [jax.random.key(0)]
        _, state = self._decode(state, 0, keys=keys)
        jax.block_until_ready(state.batch)

    # Prompts of one call differ in how much is new: a robot in mid-episode brings one observation,
    # a new one a whole prompt. One batch padded to the longest would waste most of its tokens, so
    # prompts are grouped by the bucket (width) of their new tokens, each group is prefilled as a
    # batch, and the sequences are merged into one batch for the decode loop.

    def _prefill(
        self, prompts: Sequence[np.ndarray], cached_prefixes: Sequence[CachedPrefix | None]
    ) -> DecodeState:
        """All prompts prefilled, in order, the batch filled up with copies of the first."""
        reused = [self.reusable_length(p, c) for p, c in zip(prompts, cached_prefixes)]
        groups = self._group_by_width(prompts, reused)
        states = []
        for width, members in groups.items():
            new_tokens = [prompts[i][reused[i] :] for i in members]
            caches = [cached_prefixes[i].cache if reused[i] else None for i in members]
            starts = [reused[i] for i in members]
            states.append(self._prefill_group(new_tokens, caches, starts, width))
        if len(states) == 1:
            return states[0]
        return self._merge(states, list(groups.values()), len(prompts))

    def _group_by_width(
        self, prompts: Sequence[np.ndarray], reused: list[int]
    ) -> dict[int, list[int]]:
        """Indices of prompts by the width of their new tokens.

        A batch is padded to a bucket of sequences. Where a wider group has room left in its
        bucket, a whole narrower group joins it and is prefilled from the first token (its
        ``reused`` becomes 0): that costs nothing, and spares the narrower group's batch.
        """
        groups: dict[int, list[int]] = {}
        for i, (prompt, n) in enumerate(zip(prompts, reused)):
            groups.setdefault(self._width(len(prompt) - n), []).append(i)
        for width in sorted(groups, reverse=True):
            if width not in groups:
                continue
            for narrower in sorted(w for w in groups if w < width):
                joined = sorted(groups[width] + groups[narrower])
                fits = all(self._width(len(prompts[i])) <= width for i in groups[narrower])
                if fits and self._padded_size(len(joined)) == self._padded_size(len(groups[width])):
                    for i in groups.pop(narrower):
                        reused[i] = 0
                    groups[width] = joined
        return groups

    def _prefill_group(
        self,
        new_tokens: Sequence[np.ndarray],
        caches: Sequence[KVCache | None],
        starts: Sequence[int],
        width: int,
    ) -> DecodeState:
        """One batch of sequences whose new tokens share one width.

        Args:
          new_tokens: int32 [n] each, n at most ``width``.
          caches: of which the first ``starts`` slots count.
          starts: tokens reused per sequence.
          width: S.
        """
        size = self._padded_size(len(new_tokens))
        tokens, lengths = np.zeros((size, width), np.int32), np.ones(size, np.int32)
        for i, new in enumerate(new_tokens):
            tokens[i, : len(new)], lengths[i] = new, len(new)
        if not any(starts):
            slots = max(self._slots, length_bucket(width + self.rules.max_new_tokens))
            # Packing pays where a quarter of the batch is padding; one packed length per shape.
            packed_length: int | None = 3 * size * width // 4
            if size < _PACK_FROM or lengths.sum() > packed_length:
                packed_length = None
            return self._sampler.prefill(tokens, lengths, slots=slots, packed_length=packed_length)
        padded_starts = np.zeros(size, np.int32)
        padded_starts[: len(starts)] = starts
        state = self._batch_caches([*caches, *[None] * (size - len(caches))], padded_starts)
        return self._sampler.extend(state, tokens, lengths, window=self._max_reused)

    def _batch_caches(self, caches: Sequence[KVCache | None], lengths: np.ndarray) -> DecodeState:
        """A batch of cached prefixes, of which the first ``lengths`` slots count.

        A sequence without a cache gets another's, of which nothing counts.
        """
        known = [cache for cache in caches if cache is not None]
        slots = max(self._slots, *(cache.slots for cache in known))
        caches = [grow_cache(known[0] if cache is None else cache, slots) for cache in caches]
        config = self._sampler.model.config
        none = np.full(len(lengths), NO_TOKEN, np.int32)
        hidden = np.zeros((len(lengths), config.hidden_size), config.compute_dtype)
        rest = map(jnp.asarray, (lengths, hidden, none))
        return DecodeState(DecodeBatch(_stack(tuple(caches)), *rest), int(lengths.max()))

    def _merge(
        self, states: Sequence[DecodeState], groups: Sequence[Sequence[int]], count: int
    ) -> DecodeState:
        """One batch of the sequences of several, each back at its index."""
        slots = max(state.batch.cache.slots for state in states)
        placed: list[DecodeBatch | None] = [None] * self._padded_size(count)
        for state, members in zip(states, groups):
            batch = state.batch.replace(cache=grow_cache(state.batch.cache, slots))
            for i, sequence in zip(members, _split(batch)):
                placed[i] = sequence
        filled = tuple(placed[0] if sequence is None else sequence for sequence in placed)
        return DecodeState(_concatenate(filled), max(state.max_length for state in states))

    def _decode(
        self,
        state: DecodeState,
        count: int,
        keys: Sequence[jax.Array] | None = None,
    ) -> tuple[Generated, DecodeState]:
        """Continues the first ``count`` sequences; the others fill the bucket."""
        rules, size = self.rules, state.batch_size
        usual = state.batch.cache.slots == self._slots
        options = {
            "max_new_tokens": rules.max_new_tokens,
            "allowed": rules.allowed,
            "stop_id": rules.stop_id,
            "grammar": rules.grammar,
            "active": np.arange(size) < count,
            "window": self._slots if usual else None,  # one shape for all usual calls
        }
        stacked = None if keys is None else jnp.stack([*keys, *[keys[0]] * (size - len(keys))])
        return self._sampler.generate(
            state,
            sampling=rules.sampling,
            key=stacked,
            drafts=Drafts.none(size, self.continuations.table),
            block=self._block(size),
            **options,
        )

    def _block(self, batch_size: int) -> int:
        """Tokens decoded per step."""
        if self.rules.block is not None:
            return self.rules.block
        return block_size(
            "actions",
            batch_size,
            self.rules.max_new_tokens,
            hidden_size=self._sampler.model.config.hidden_size,
        )

    def _width(self, length: int) -> int:
        """What ``length`` new tokens are padded to."""
        return next((width for width in self._widths if length <= width), length_bucket(length))

    def _padded_size(self, count: int) -> int:
        return max(count, self._batch_size) if self._batch_size else batch_bucket(count)


# ----------------------------------------------------------------------------
# Batches taken apart and put together, each in one jitted call. The batch is the first axis of
# every array of a ``DecodeBatch`` but the cache's, whose first are the layers.


def _kept(state: DecodeState, ids: Sequence[np.ndarray]) -> list[CachedPrefix]:
    return [CachedPrefix(sequence.cache, i) for sequence, i in zip(_split(state.batch), ids)]


@jax.jit
def _split(batch: DecodeBatch) -> list[DecodeBatch]:
    """Each sequence as a batch of its own."""

    def sequence(i: int) -> DecodeBatch:
        cache = jax.tree.map(lambda x: x[:, i : i + 1], batch.cache)
        return DecodeBatch(cache, *(x[i : i + 1] for x in _outside_cache(batch))).sharded()

    return [sequence(i) for i in range(len(batch.lengths))]


@jax.jit
def _concatenate(sequences: tuple[DecodeBatch, ...]) -> DecodeBatch:
    """One batch of sequences with caches of the same slots."""
    cache = _stack(tuple(sequence.cache for sequence in sequences))
    return DecodeBatch(cache, *map(jnp.concatenate, zip(*map(_outside_cache, sequences)))).sharded()


@jax.jit
def _stack(caches: tuple[KVCache, ...]) -> KVCache:
    return jax.tree.map(lambda *x: shard_cache(jnp.concatenate(x, axis=1)), *caches)


def _outside_cache(batch: DecodeBatch) -> tuple[jax.Array, ...]:
    return batch.lengths, batch.last_hidden, batch.pending
