"""Which codes make whole chunks: a written-out case, bins, and FAST of any fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from univla_jax.tokenizers.action import NumberTextTokenizer, UniformBinTokenizer
from univla_jax.tokenizers.constrained import FORBIDDEN, CodeGrammar, byte_grammar
from univla_jax.tokenizers.fast import FastTokenizer

HORIZON, DIMENSIONS = 5, 3
NO = FORBIDDEN


def _fit(scale: float, seed: int = 0, **options: bool) -> FastTokenizer:
    chunks = np.random.default_rng(seed).uniform(-1, 1, (200, HORIZON, DIMENSIONS))
    return FastTokenizer.fit(chunks, scale, 400, **options)


def _allowed(grammar: CodeGrammar, left: int, part: int) -> np.ndarray:
    completed, left_over = grammar.num_completed[part], grammar.next_prefix[part]
    whole = (left - completed > 0) | ((left == completed) & (left_over == 0))
    return np.flatnonzero((completed != FORBIDDEN) & whole)


def test_codes_that_split_characters():
    """é is C3 A9, ü is C3 BC; a byte of no character in the alphabet is never allowed."""
    written = ["é".encode(), "é".encode() + b"\xc3", b"\xbc", b"A", None, b""]
    grammar = byte_grammar(written, "éü", 3)
    assert grammar.num_completed.tolist() == [[1, 1, NO, NO, NO, NO], [NO, NO, 1, NO, NO, NO]]
    assert grammar.next_prefix.tolist() == [[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    assert _allowed(grammar, 3, 0).tolist() == [0, 1]
    assert _allowed(grammar, 1, 0).tolist() == [0]  # what begins another one would not end
    assert _allowed(grammar, 1, 1).tolist() == [2]


def test_bins_are_one_number_each():
    grammar = UniformBinTokenizer(4).grammar(2, 3)
    assert grammar.num_characters == 6 and grammar.num_completed.tolist() == [[NO, 1, 1, 1, 1]]
    assert NumberTextTokenizer().grammar(2, 3) is None


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1.5, 10.0, 60.0]))
def test_any_allowed_walk_decodes_and_any_chunk_is_an_allowed_walk(seed, scale):
    rng = np.random.default_rng(seed)
    _check_walks(_fit(scale), HORIZON, DIMENSIONS, rng, rng.uniform(-1, 1, (HORIZON, DIMENSIONS)))


def test_a_chunk_may_end_behind_any_coefficient_where_zeros_are_dropped():
    fast, rng = _fit(1.5, drop_trailing_zeros=True), np.random.default_rng(0)
    assert fast.grammar(HORIZON, DIMENSIONS).may_end_early
    for _ in range(50):
        chunk = np.repeat(rng.uniform(-1, 1, (1, DIMENSIONS)), HORIZON, axis=0)
        _check_walks(fast, HORIZON, DIMENSIONS, rng, chunk)


@pytest.mark.parametrize(
    ("name", "horizon"),
    [("fast", 10), ("fast_calvin_norm_a10_s50", 10), ("fast_bridge_t5_s50", 5)],
)
def test_the_published_tokenizers(shared_dir, name, horizon):
    tokenizer = FastTokenizer.load(shared_dir / "fast_tokenizers" / name)
    rng = np.random.default_rng(0)
    for _ in range(20):
        chunk = np.clip(rng.normal(size=(horizon, 7)) * 0.5, -1, 1)
        _check_walks(tokenizer, horizon, 7, rng, chunk)


def _check_walks(tokenizer, horizon, dimensions, rng, chunk):
    grammar = tokenizer.grammar(horizon, dimensions)
    left, part, codes = grammar.num_characters, 0, []
    early = grammar.may_end_early
    # One that may end early ends behind a random code, where none is unfinished.
    while left or part:
        if early and codes and not part and rng.random() < 0.1:
            break
        code = int(rng.choice(_allowed(grammar, left, part)))
        codes.append(code)
        left, part = left - grammar.num_completed[part, code], grammar.next_prefix[part, code]
    decoded = tokenizer.decode(codes, horizon, dimensions)
    assert decoded.valid, decoded.reason
    left, part = grammar.num_characters, 0
    for code in tokenizer.encode(chunk):
        assert code in _allowed(grammar, left, part)
        left, part = left - grammar.num_completed[part, code], grammar.next_prefix[part, code]
    assert part == 0 and (left < grammar.num_characters if early else left == 0)
