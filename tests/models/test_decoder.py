from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoders import PARAMETER_AXES, parameter_count, tiny_decoder, tokens_and_positions
from tests.parity import assert_parity
from univla_jax.errors import UserError
from univla_jax.models import decoder_config
from univla_jax.models.decoder import MASKED_LOGIT, Decoder, compute_logits
from univla_jax.models.decoder_config import preset
from univla_jax.models.kv_cache import KVCache


@pytest.fixture(scope="module")
def decoder():
    return tiny_decoder(vocab_size=150, pad_id=3)


def _hidden(model, params, *args, **kwargs):
    run = jax.jit(lambda p, *a: model.apply({"params": p}, *a, **kwargs)[0])
    return run(params, *args)


def test_golden_hidden_states_and_logits(golden_dir):
    assert_parity(golden_dir, "decoder", "hidden states", "logits")


def test_released_size_is_counted_without_allocating():
    assert parameter_count(preset("emu3_8b")) == 8_492_011_520
    assert parameter_count(preset("emu3_8b", vocab_pad_multiple=1)) == 8_492_011_520


def test_every_parameter_has_logical_names():
    model = Decoder(preset("tiny", qkv_bias=True))
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)["params"]
    boxes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    for box in boxes:
        assert isinstance(box, nn.Partitioned)
        assert len(box.names) == len(box.value.shape)
        assert set(box.names) <= PARAMETER_AXES
    stacked = params["stack"]["layers"]["attention"]["key"]["kernel"]
    assert stacked.names == (
        decoder_config.LAYERS,
        decoder_config.EMBED,
        decoder_config.KV_HEADS,
        decoder_config.HEAD_DIM,
    )
    assert stacked.value.shape == (2, 32, 2, 8)


def test_initial_tables_are_zero_in_padding_and_pad_row():
    model = Decoder(preset("tiny", vocab_size=60, pad_id=7))
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = nn.unbox(model.init(jax.random.key(0), tokens, method="embed"))["params"]
    zero = np.flatnonzero(~np.asarray(params["embedding"]).any(axis=1))
    np.testing.assert_array_equal(zero, [7, 60, 61, 62, 63])
    assert abs(float(params["head"][:60].std()) - 0.02) < 2e-3


def _gradient(model, params):
    tokens, positions = tokens_and_positions(model, 2, 9)

    def loss(params):
        return jnp.sum(model.apply({"params": params}, tokens, positions)[0] ** 2)

    return jax.jit(jax.grad(loss))(params)


@pytest.fixture(scope="module")
def gradient(decoder):
    return _gradient(*decoder)


@pytest.mark.parametrize(
    "changes",
    [
        *({"scan_unroll": 2}, {"remat": "full"}, {"remat": "attention"}),
        *({"remat": "projections"}, {"remat": "offload"}),
    ],
    ids=str,
)
def test_execution_options_change_no_number(decoder, gradient, changes):
    other = Decoder(preset("tiny", vocab_size=150, pad_id=3, **changes))
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    jax.tree.map(same, gradient, _gradient(other, decoder[1]))


def test_packed_segments_equal_separate_rows(decoder):
    model, params = decoder
    tokens, _ = tokens_and_positions(model, 1, 12)
    positions = jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]])
    segments = jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0]])
    packed = _hidden(model, params, tokens, positions, segments)
    for part in (slice(0, 5), slice(5, 9)):
        alone = _hidden(model, params, tokens[:, part], positions[:, part])
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-5)


def test_a_cache_changes_no_number(decoder):
    """Three calls over rows of unequal length against one call without a cache."""
    model, params = decoder
    tokens, positions = tokens_and_positions(model, 2, 10)
    whole = _hidden(model, params, tokens, positions)

    @jax.jit
    def read(cache, tokens, starts):
        where = starts[:, None] + jnp.arange(tokens.shape[1])
        return model.apply({"params": params}, tokens, where, cache=cache)

    starts, cache = np.array([0, 0]), KVCache.create(model.config, 2, 16)
    for counts in ([3, 5], [4, 1], [3, 4]):
        rows = [tokens[row, s : s + 5] for row, s in enumerate(starts)]
        part = jnp.stack([jnp.pad(row, (0, 5 - len(row))) for row in rows])
        hidden, cache = read(cache, part, jnp.asarray(starts))
        for row, (start, count) in enumerate(zip(starts, counts)):
            np.testing.assert_allclose(
                hidden[row, :count], whole[row, start : start + count], atol=1e-5
            )
        starts = starts + counts
    assert starts.tolist() == [10, 10]


def test_pad_row_gets_no_gradient(decoder):
    model, params = decoder
    tokens, positions = tokens_and_positions(model, 1, 4)
    tokens = tokens.at[0, 1].set(3)

    def loss(params):
        return jnp.sum(model.apply({"params": params}, tokens, positions)[0] ** 2)

    rows = np.asarray(jax.jit(jax.grad(loss))(params)["embedding"]).any(axis=1)
    assert not rows[3] and rows[int(tokens[0, 0])]


def test_logits_of_some_ids_equal_the_full_head_without_its_padding(decoder):
    model, params = decoder
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 32)), jnp.float32)
    ids = jnp.asarray([149, 0, 7])
    full = model.apply({"params": params}, hidden, method="unembed")
    part = compute_logits(hidden, params["head"][ids])
    assert full.shape == (2, 3, 192) and part.shape == (2, 3, 3)
    np.testing.assert_allclose(part, full[..., ids], atol=1e-5)
    assert (np.asarray(full[..., 150:]) == MASKED_LOGIT).all()


def test_dropout_only_in_training(decoder):
    _, params = decoder
    model = Decoder(preset("tiny", vocab_size=150, pad_id=3, dropout=0.5))
    tokens, positions = tokens_and_positions(model, 1, 6)

    @jax.jit
    def train(key):
        rngs = {"dropout": key}
        return model.apply({"params": params}, tokens, positions, train=True, rngs=rngs)[0]

    one, again, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    still = _hidden(model, params, tokens, positions)
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other) and not np.allclose(one, still)


def test_bfloat16_stays_close(decoder):
    model, params = decoder
    low = Decoder(preset("tiny", vocab_size=150, pad_id=3, dtype="bfloat16"))
    tokens, positions = tokens_and_positions(model, 2, 8)
    exact = np.asarray(_hidden(model, params, tokens, positions))
    close = _hidden(low, params, tokens, positions)
    assert close.dtype == jnp.bfloat16
    assert np.abs(exact - np.asarray(close, np.float32)).mean() < 0.05 * np.abs(exact).mean()


def test_calls_that_do_not_fit_the_cache(decoder):
    model, params = decoder
    tokens, positions = tokens_and_positions(model, 1, 6)
    cache = KVCache.create(model.config, 1, 4)
    with pytest.raises(UserError, match="6 new tokens"):
        model.apply({"params": params}, tokens, positions, cache=cache)
    with pytest.raises(UserError, match="exclude each other"):
        model.apply({"params": params}, tokens, positions, tokens, cache=cache)
