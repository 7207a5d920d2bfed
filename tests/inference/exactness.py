"""A thousand random prompts and what plain decoding gives for them, to check every shortcut by."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tests.decoders import tiny_decoder
from tests.inference.uncached import draw_prompts, stack
from univla_jax.inference.decode_step import DecodeState
from univla_jax.inference.sampler import Sampler
from univla_jax.inference.sampling import GrammarMask
from univla_jax.tokenizers.constrained import byte_grammar

PROMPTS, BATCH, LONGEST, COUNT = 1000, 50, 24, 8
ALLOWED, STOP, VOCABULARY = np.arange(20, 60), 25, 100
RULES = {"max_new_tokens": COUNT, "allowed": ALLOWED, "stop_id": STOP}
_CHARACTERS = 3
_PREFIX = re.compile(rb"(\xc3[\xa9\xbc]){0,2}\xc3?|(\xc3[\xa9\xbc]){3}")  # of a whole chunk


def _code_bytes() -> dict[int, bytes]:
    """Each allowed id but the stop id stands for some bytes of "é" and "ü", whole or not."""
    rng, single = np.random.default_rng(2), [b"\xc3", b"\xa9", b"\xbc"]
    ids = [int(i) for i in ALLOWED if i != STOP]
    texts = ["".join(rng.choice(["é", "ü"], 3)).encode() for _ in ids[len(single) :]]
    cuts = [sorted(rng.choice(7, 2, replace=False)) for _ in texts]
    return dict(zip(ids, single + [t[i:j] for t, (i, j) in zip(texts, cuts)]))


_BYTES = _code_bytes()
MASK = GrammarMask.from_grammar(
    byte_grammar(list(_BYTES.values()), "éü", _CHARACTERS), np.array(list(_BYTES)), STOP
)


@dataclasses.dataclass(frozen=True)
class Expected:
    """Prompts, and their greedy completions among the allowed ids and under the grammar."""

    sampler: Sampler
    prompts: list[list[int]]
    plain: list[list[int]]
    constrained: list[list[int]]

    def batches(self, size: int = BATCH) -> Iterator[slice]:
        """The prompts in parts of one size."""
        return (slice(start, start + size) for start in range(0, PROMPTS, size))

    def prefill(self, part: slice) -> DecodeState:
        """Some of the prompts in a cache with room for their completions."""
        return self.sampler.prefill(*stack(self.prompts[part], LONGEST), slots=64)


def expect() -> Expected:
    """Decodes all prompts the plain way."""
    sampler = Sampler(*tiny_decoder(vocab_size=VOCABULARY))
    lengths = np.random.default_rng(0).integers(1, LONGEST + 1, PROMPTS)
    prompts = draw_prompts(*lengths, seed=1)
    plain = _uncached(sampler, prompts, lambda ids: ALLOWED)
    return Expected(sampler, prompts, plain, _uncached(sampler, prompts, _allowed_by_text))


def _allowed_by_text(ids: list[int]) -> np.ndarray:
    """The grammar read off the text that the ids stand for."""
    text = b"".join(_BYTES[i] for i in ids)
    codes = [i for i, more in _BYTES.items() if _PREFIX.fullmatch(text + more)]
    return np.array([STOP] if len(text) == 2 * _CHARACTERS else codes)


def _uncached(
    sampler: Sampler, prompts: list[list[int]], allowed: Callable[[list[int]], np.ndarray]
) -> list[list[int]]:
    """No cache, the whole head with all other ids masked, one more token each time."""

    @jax.jit
    def choose(tokens, lengths, mask):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        variables = {"params": sampler.params}
        hidden, _ = sampler.model.apply(variables, tokens, positions)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        logits = sampler.model.apply(variables, last, method="unembed")
        return jnp.argmax(logits[:, :VOCABULARY] + mask, axis=-1)

    completions = []
    for start in range(0, PROMPTS, BATCH):
        tokens, lengths = stack(prompts[start : start + BATCH], LONGEST + COUNT)
        chosen: list[list[int]] = [[] for _ in range(BATCH)]
        for _ in range(COUNT):
            mask = np.full((BATCH, VOCABULARY), -np.inf, np.float32)
            for row, ids in zip(mask, chosen):
                row[ALLOWED if STOP in ids else allowed(ids)] = 0
            for ids, new in zip(chosen, np.asarray(choose(tokens, lengths, mask)).tolist()):
                ids.append(new)
            tokens[np.arange(BATCH), lengths] = [ids[-1] for ids in chosen]
            lengths += 1
        completions += [ids[: ids.index(STOP) + 1] if STOP in ids else ids for ids in chosen]
    return completions
