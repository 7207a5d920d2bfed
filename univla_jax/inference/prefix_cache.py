"""Sequences that grow from call to call: what a call shares with the one before is not read again.

    call 0   bos text │ o0 boa               → a0 eoa
    call 1   bos text │ o0 boa a0 eoa │ o1 boa   → …    only "eoa │ o1 boa" is read
    call 2   bos text │ o1 boa a1 eoa │ o2 boa   → …    o1 moved: read again, maybe ahead

Every position of the cache depends on all ids before it, so a shared beginning may stay and
nothing else. The ids chosen are those of a fresh prefill.

Axes: B rows, S new tokens, M cache slots, W window of slots that are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.errors import UserError
from univla_jax.inference.decode_step import NO_TOKEN, DecodeBatch, DecodeState, Generated
from univla_jax.inference.sampler import Sampler, Timer, batch_bucket, length_bucket
from univla_jax.inference.sampling import GREEDY, GrammarMask, Sampling
from univla_jax.models.kv_cache import KVCache

# ----------------------------------------------------------------------------
# What is kept of sequences between calls: caches of single rows, and batches of them.
#
# Axes: B rows, D model, M cache slots.


@dataclasses.dataclass(frozen=True)
class CachedPrefix:
    """What is left of one sequence.

    Attributes:
      cache: keys and values of one row.
      ids: int32 [n], the ids read into its first n slots.
    """

    cache: KVCache
    ids: np.ndarray


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning of two id lists."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def grow_cache(cache: KVCache, slots: int) -> KVCache:
    """The cache with room for at least ``slots`` tokens per row."""
    return cache if cache.slots >= slots else cache.grow(slots)


@jax.jit
def split_batch(rows: DecodeBatch) -> list[DecodeBatch]:
    """Each row by itself."""
    caches = [jax.tree.map(lambda x, i=i: x[:, i : i + 1], rows.cache) for i in _each(rows)]
    cut = lambda x: [x[i : i + 1] for i in _each(rows)]  # noqa: E731
    return [DecodeBatch(*row) for row in zip(caches, *map(cut, _outside(rows)))]


@jax.jit
def concat_batches(rows: tuple[DecodeBatch, ...]) -> DecodeBatch:
    """One batch of single rows with caches of the same slots."""
    rest = zip(*map(_outside, rows))
    cache = _stack(tuple(row.cache for row in rows))
    return DecodeBatch(cache, *(jnp.concatenate(parts) for parts in rest))


def stack_caches(caches: Sequence[KVCache], lengths: np.ndarray, hidden: np.ndarray) -> DecodeState:
    """One batch of caches of one row each, and what else they need.

    Args:
      caches: of one row and M slots each.
      lengths: int32 [B], tokens that each holds.
      hidden: [B, D], final hidden state of the last of them.
    """
    none = jnp.asarray(np.full(len(lengths), NO_TOKEN, np.int32))
    rows = DecodeBatch(_stack(tuple(caches)), jnp.asarray(lengths), jnp.asarray(hidden), none)
    return DecodeState(rows, bound=int(lengths.max()))


@jax.jit
def _stack(caches: tuple[KVCache, ...]) -> KVCache:
    return jax.tree.map(lambda *rows: jnp.concatenate(rows, axis=1), *caches)


def _each(rows: DecodeBatch) -> range:
    return range(len(rows.lengths))


def _outside(rows: DecodeBatch) -> tuple[jax.Array, ...]:
    """All but the cache; their first axis is that of the rows."""
    return rows.lengths, rows.hidden, rows.pending


# ----------------------------------------------------------------------------


_PACKED_ROWS = 4  # so many rows are worth a shape of their own without padding
_ROUNDING = 32  # new tokens are padded by less behind a prompt of the greatest usual length


@dataclasses.dataclass(frozen=True)
class GenerationRules:
    """What a continuation may be.

    Attributes:
      allowed: ids that may be chosen.
      stop_id: ends it.
      max_new_tokens: the most ids chosen.
      sampling: how.
      grammar: what whole continuations look like, over the allowed ids; None for any grammar.
      speculative_block: tokens verified per speculative decode step, 0 for one at a time; only
        for greedy choice.
    """

    allowed: np.ndarray
    stop_id: int
    max_new_tokens: int
    sampling: Sampling = GREEDY
    grammar: GrammarMask | None = None
    speculative_block: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for drafts that could not be verified."""
        if self.speculative_block and not self.sampling.greedy:
            raise UserError(
                f"speculative_block={self.speculative_block} with temperature="
                f"{self.sampling.temperature}: drafts are verified against greedy decoding; set "
                "one of both to 0"
            )


@dataclasses.dataclass(frozen=True)
class Completion:
    """How one sequence went on.

    Attributes:
      ids: int32 [n] chosen, up to and with the stop id where it was reached.
      cached_prefix: what is left of the sequence.
      num_overridden: ids that the grammar forced away from the likeliest one.
    """

    ids: np.ndarray
    cached_prefix: CachedPrefix
    num_overridden: int


class PrefixCache:
    """Reads prompts over what is remembered of them, and continues each until it stops.

    Shapes are few: new tokens are padded to one of ``lengths`` where they fit, rows to a bucket,
    and caches have one size unless a prompt is too long for it.
    """

    def __init__(
        self,
        sampler: Sampler,
        rules: GenerationRules,
        *,
        lengths: Sequence[int],
        batch_size: int | None = None,
    ) -> None:
        """Fixes the shapes.

        Args:
          sampler: reads and chooses.
          rules: what may follow.
          lengths: most new tokens of the usual calls, for example of one observation and of a
            whole prompt.
          rows: size of every batch; by default a bucket of what is asked.
        """
        self.rules = rules
        self._sampler, self._batch_size = sampler, batch_size
        self._lengths = sorted({length_bucket(n) for n in lengths})
        room = max(rules.max_new_tokens + rules.speculative_block, _ROUNDING)
        self._slots = length_bucket(self._lengths[-1] + room)
        self._behind = length_bucket(self._lengths[-1] - self._lengths[0])

    def bucket(self, length: int) -> int:
        """What ``length`` new tokens are padded to."""
        return next((n for n in self._lengths if length <= n), length_bucket(length))

    def complete(
        self,
        prompts: Sequence[np.ndarray],
        cached_prefixes: Sequence[CachedPrefix | None],
        *,
        draft_sources: Sequence[np.ndarray] | None = None,
        keys: Sequence[jax.Array] | None = None,
        timer: Timer | None = None,
    ) -> list[Completion]:
        """Continues every prompt.

        Args:
          prompts: int32 [n] each.
          cached_prefixes: what is left of the call before, consumed; None where there is nothing.
          draft_sources: per prompt what drafts are copied from, int32 [h]; nothing by default.
          keys: random key of each prompt, so that it draws the same in any batch; needed unless
            decoding is greedy.
          timer: gets the sections ``prefill`` and ``decode``.

        Returns:
          one continuation per prompt.
        """
        timer = timer or Timer()
        with timer.section("prefill") as results:
            state = self._read(prompts, cached_prefixes)
            results.append(state.batch)
        with timer.section("decode") as results:
            generated, state = self._write(state, len(prompts), draft_sources or [], keys)
            results.append(generated.tokens)
        tokens, counts = np.asarray(generated.tokens), np.asarray(generated.lengths)
        num_overridden = np.asarray(generated.num_overridden).tolist()
        chosen = [tokens[i, : counts[i]] for i in range(len(prompts))]
        read = [np.append(p, ids[:-1]).astype(np.int32) for p, ids in zip(prompts, chosen)]
        cached_prefixes = [
            CachedPrefix(row.cache, ids) for row, ids in zip(split_batch(state.batch), read)
        ]
        return [Completion(*parts) for parts in zip(chosen, cached_prefixes, num_overridden)]

    def prefill_ahead(self, prefixes: Sequence[np.ndarray]) -> list[CachedPrefix]:
        """Reads the beginnings of prompts that will be asked for later."""
        state = self._read(prefixes, [None] * len(prefixes))
        return [
            CachedPrefix(row.cache, ids) for row, ids in zip(split_batch(state.batch), prefixes)
        ]

    def warmup(self, batch_size: int) -> None:
        """Compiles what a call with ``batch_size`` prompts uses, and waits for it."""
        size = self._size(batch_size)
        for width in self._lengths:
            for length in (width, width // 2) if size >= _PACKED_ROWS else (width,):
                rests = [np.zeros(length, np.int32)] * size
                state = self._read_group(rests, [None] * size, [0] * size, width)
        state = self._merge([state], [range(size)], size)
        cache = split_batch(state.batch)[0].cache
        rests = [np.zeros(self._lengths[0], np.int32)] * size
        kept = [cache, *[None] * (size - 1)]
        state = self._read_group(rests, kept, [1, *[0] * (size - 1)], self._lengths[0])
        keys = None if self.rules.sampling.greedy else [jax.random.key(0)]
        _, state = self._write(state, 0, keys=keys)
        jax.block_until_ready(state.batch)

    def should_prefill(self, prefix: np.ndarray, cached: CachedPrefix | None) -> bool:
        """Whether reading ``prefix`` ahead would spare a later call anything."""
        held = 0 if cached is None else common_prefix_length(prefix, cached.ids)
        return len(prefix) - held > 1  # the last id chosen is always read with what comes next

    def reusable_length(self, prompt: np.ndarray, cached: CachedPrefix | None) -> int:
        """How many ids of ``prompt`` need not be read again.

        None where the rest is longer than the shortest of the usual lengths: that would save
        little, and be one shape more to compile. Of a usual prompt no more than what stands before
        such a rest, so that few slots need be seen.
        """
        if cached is None:
            return 0
        shared = min(common_prefix_length(prompt, cached.ids), len(prompt) - 1)
        shortest, longest = self._lengths[0], self._lengths[-1]
        if len(prompt) <= longest:
            shared = min(shared, self._behind)
        return shared if len(prompt) - shared <= shortest < len(prompt) else 0

    def _read(
        self, prompts: Sequence[np.ndarray], cached_prefixes: Sequence[CachedPrefix | None]
    ) -> DecodeState:
        """All prompts read, in order, the batch filled up with repetitions of the first rows."""
        known = [self.reusable_length(p, m) for p, m in zip(prompts, cached_prefixes)]
        groups = self._grouped(prompts, known)
        states = []
        for width, members in groups.items():
            rests = [prompts[i][known[i] :] for i in members]
            kept = [cached_prefixes[i].cache if known[i] else None for i in members]
            states.append(self._read_group(rests, kept, [known[i] for i in members], width))
        if len(states) == 1:
            return states[0]
        return self._merge(states, list(groups.values()), len(prompts))

    def _grouped(self, prompts: Sequence[np.ndarray], known: list[int]) -> dict[int, list[int]]:
        """Rows by the width of what they read.

        A batch is padded to a bucket of rows. Where it has places left, rows of a shorter group
        are read there, as a whole: their ``known`` becomes 0, and their group costs nothing.
        """
        groups: dict[int, list[int]] = {}
        for i, (prompt, n) in enumerate(zip(prompts, known)):
            groups.setdefault(self.bucket(len(prompt) - n), []).append(i)
        for width in sorted(groups, reverse=True):
            if width not in groups:
                continue
            for shorter in sorted(w for w in groups if w < width):
                joined = sorted(groups[width] + groups[shorter])
                fits = all(self.bucket(len(prompts[i])) <= width for i in groups[shorter])
                if fits and self._size(len(joined)) == self._size(len(groups[width])):
                    for i in groups.pop(shorter):
                        known[i] = 0
                    groups[width] = joined
        return groups

    def _write(
        self,
        state: DecodeState,
        count: int,
        draft_sources: Sequence[np.ndarray] = (),
        keys: Sequence[jax.Array] | None = None,
    ) -> tuple[Generated, DecodeState]:
        """Continues the first ``count`` rows."""
        rules, rows = self.rules, len(state.batch.pending)
        settings = {
            "max_new_tokens": rules.max_new_tokens,
            "allowed": rules.allowed,
            "stop_id": rules.stop_id,
            "grammar": rules.grammar,
            "active": np.arange(rows) < count,
            "window": self._window(state),
        }
        if not rules.speculative_block:
            stacked = None if keys is None else jnp.stack([*keys, *[keys[0]] * (rows - len(keys))])
            return self._sampler.generate(state, sampling=rules.sampling, key=stacked, **settings)
        held = np.full((rows, rules.max_new_tokens), NO_TOKEN, np.int32)
        for row, ids in zip(held, draft_sources):
            row[: len(ids)] = ids[: len(row)]
        settings |= {"draft_source": held, "block": rules.speculative_block}
        generated, state, _ = self._sampler.generate_speculative(state, **settings)
        return generated, state

    def _read_group(
        self,
        rests: Sequence[np.ndarray],
        kept: Sequence[KVCache | None],
        known: Sequence[int],
        width: int,
    ) -> DecodeState:
        """Rows whose new tokens share one width."""
        size = self._size(len(rests))
        tokens, lengths = np.zeros((size, width), np.int32), np.ones(size, np.int32)
        for row, (rest, n) in enumerate(zip(rests, map(len, rests))):
            tokens[row, :n], lengths[row] = rest, n
        if not any(known):
            slots = max(self._slots, length_bucket(width + self.rules.max_new_tokens))
            packed = _packed(size, width, int(lengths.sum()))
            return self._sampler.prefill(tokens, lengths, slots=slots, packed=packed)
        starts = np.zeros(size, np.int32)
        starts[: len(known)] = known
        state = self._join([*kept, *[None] * (size - len(kept))], starts)
        return self._sampler.extend(state, tokens, lengths, window=self._behind)

    def _merge(
        self, states: Sequence[DecodeState], groups: Sequence[Sequence[int]], count: int
    ) -> DecodeState:
        """One batch of the rows of several, each back at its place."""
        slots = max(state.batch.cache.slots for state in states)
        placed: list[DecodeBatch | None] = [None] * self._size(count)
        for state, members in zip(states, groups):
            rows = state.batch.replace(cache=grow_cache(state.batch.cache, slots))
            for i, row in zip(members, split_batch(rows)):
                placed[i] = row
        filled = tuple(placed[0] if row is None else row for row in placed)
        return DecodeState(concat_batches(filled), bound=max(state.bound for state in states))

    def _join(self, kept: Sequence[KVCache | None], starts: np.ndarray) -> DecodeState:
        """One batch of single rows, of which the first ``starts`` slots count.

        Rows without a cache get another's, of which nothing counts.
        """
        known = [cache for cache in kept if cache is not None]
        slots = max(self._slots, *(cache.slots for cache in known))
        caches = [grow_cache(known[0] if cache is None else cache, slots) for cache in kept]
        config = self._sampler.model.config
        hidden = np.zeros((len(starts), config.hidden_size), config.compute_dtype)
        return stack_caches(caches, starts, hidden)

    def _window(self, state: DecodeState) -> int | None:
        """One window for every call, as long as the cache has its usual size."""
        return self._slots if state.batch.cache.slots == self._slots else None

    def _size(self, rows: int) -> int:
        return max(rows, self._batch_size) if self._batch_size else batch_bucket(rows)


def _packed(size: int, width: int, total: int) -> int | None:
    """The tokens as which a batch is read where a quarter of it is padding, else None."""
    fewer = 3 * size * width // 4
    return fewer if size >= _PACKED_ROWS and total <= fewer else None
