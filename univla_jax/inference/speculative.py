"""Drafts of speculative decoding: looked up, copied from before, corrected by Jacobi iteration.

    draft source, or chosen before    5 5 2 9 │ 5 6 2 9 │ 5 6 . .
    draft, one period earlier                               2 9

The decode loop (``decode_loop.py``) verifies a block of drafts per call. A good draft costs no call
of the model, so it is copied: a frame repeats most of the frame before it. What the model chose at
a position after a wrong draft replaces the copy there: it was chosen with nearly everything before
it right, and each call corrects it further. Action ids repeat differently: a table of what follows
the last few ids (``tokenizers/continuations.py``) drafts those, one id after the other. A
checkpoint has one of its training set; a policy without learns one from its own chunks.

Sources: Jacobi decoding (Santilli et al., arXiv 2305.10427; for images Teng et al., arXiv
2410.01699); several tokens of a frame per call, exactly (SCD, arXiv 2510.24211).

Axes: B batch, H tokens of the draft source, Q drafts, N orders of n-grams, S slots of their table.
"""

from __future__ import annotations

from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.tokenizers.continuations import LONGEST, ORDERS, slots_of


@flax.struct.dataclass
class Drafts:
    """What drafts are copied from.

    Attributes:
      source: int32 [B, H], tokens before the first that is chosen, H may be 0; negative where there
        is none.
      table: int32 [N, S] of ``Continuations``, tried first; None for none.
      period: a draft is what stands so many positions before; 0 for none.
    """

    source: jax.Array
    table: jax.Array | None = None
    period: int = flax.struct.field(pytree_node=False, default=0)

    @classmethod
    def none(cls, batch_size: int, table: np.ndarray | None = None) -> Drafts:
        """Nothing to copy from, and a table where there is one."""
        return cls(np.zeros((batch_size, 0), np.int32), table)

    def propose(self, history: jax.Array, counts: jax.Array, count: int) -> jax.Array:
        """Drafts of the next tokens.

        Args:
          history: int32 [B, H + max_new_tokens]: source, chosen tokens, then guesses; negative
            where there is nothing.
          counts: int32 [B], tokens chosen.
          count: Q.

        Returns:
          int32 [B, Q], -1 where there is nothing to copy.
        """
        if not count:
            return jnp.zeros((len(counts), 0), jnp.int32)
        length = history.shape[1]
        place = self.source.shape[1] + counts[:, None] + jnp.arange(count)
        # A guess first, then the copy from one period before; that may lie in the block itself,
        # where it is a guess or a copy from two periods before, and so on.
        draft = jnp.full_like(place, -1)
        steps_back = range(count // self.period + 2) if self.period else range(1)
        for n in steps_back:
            earlier = place - n * self.period
            found = jnp.take_along_axis(history, jnp.clip(earlier, 0, length - 1), axis=1)
            found = jnp.where((earlier >= 0) & (earlier < length), found, -1)
            draft = jnp.where(draft < 0, found, draft)
        return draft if self.table is None else self._look_up(history, counts, draft)

    def _look_up(self, history: jax.Array, counts: jax.Array, otherwise: jax.Array) -> jax.Array:
        """Drafts [B, Q] by the table, each behind those before it; else ``otherwise``."""
        num_source = self.source.shape[1]
        place = num_source + counts[:, None] + jnp.arange(-LONGEST, 0)
        window = jnp.take_along_axis(history, jnp.maximum(place, 0), axis=1)
        window = jnp.where(place >= num_source, window, -1)
        drafts = []
        for q in range(otherwise.shape[1]):
            found = self.table[jnp.arange(len(ORDERS)), slots_of(window, jnp)]
            draft = otherwise[:, q]
            for n in reversed(range(len(ORDERS))):
                draft = jnp.where(found[:, n] < 0, draft, found[:, n])
            drafts.append(draft)
            window = jnp.concatenate([window[:, 1:], draft[:, None]], axis=1)
        return jnp.stack(drafts, axis=1)


# Tokens that a call decodes, drafts included, as measured (`benchmarks/README.md`). On a CPU core a
# call of 16 tokens of one sequence takes 2.7 times as long as one of a single token at the width of
# the preset quickstart, 2.3 times at that of small, and decides 4.6 codes: that pays for frames. At
# quickstart's width an action chunk takes a quarter of the calls and as much time, most of which is
# not decoding; at small's it is, and 8 tokens decide 3.7 ids in 1.7 times as long. From two
# sequences on arithmetic grows with the tokens, and the slowest sequence decides: it does not pay.
_ON_CPU = {  # by the least width from which on it holds
    "frames": ((0, 16),),
    "actions": ((0, 1), (512, 8)),
}
# On accelerators a call reads all weights for any number of tokens up to peak operations /
# bandwidth, 240 on the least (TPU v5e, bfloat16); a quarter of that leaves room for what attention
# adds.
_ON_ACCELERATORS = 64
_LONGEST = {"actions": 16}  # drafts are looked up one by one: of the later ones hardly any is right


def block_size(
    kind: Literal["frames", "actions"],
    batch_size: int,
    longest: int,
    *,
    hidden_size: int,
    platform: str | None = None,
) -> int:
    """Tokens to decode per step and sequence, drafts included; 1 where drafts do not pay.

    Args:
      kind: what is decoded.
      batch_size: sequences decoded together.
      longest: a block is never longer.
      hidden_size: width of the decoder.
      platform: of JAX; by default the one in use.
    """
    if (platform or jax.default_backend()) != "cpu":
        tokens = _ON_ACCELERATORS // batch_size
    elif batch_size > 1:
        tokens = 1
    else:
        tokens = [size for width, size in _ON_CPU[kind] if width <= hidden_size][-1]
    return max(1, min(tokens, longest, _LONGEST.get(kind, longest)))
