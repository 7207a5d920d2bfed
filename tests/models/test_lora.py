"""Adapters beside a frozen decoder: what they compute, what gets a gradient, and merging."""

from __future__ import annotations

import dataclasses

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoders import tiny_decoder, tokens_and_positions
from univla_jax.errors import UserError
from univla_jax.models.decoder import Decoder
from univla_jax.models.lora import Adapter, LoraConfig, is_adapter
from univla_jax.models.quantized_weights import dequantize_params, quantize_params

LORA = LoraConfig(rank=3, alpha=6.0, targets="", rows="40:50")


def adapted(lora: LoraConfig = LORA):
    """A decoder with random adapters, its parameters, and the plain one's."""
    model, params = tiny_decoder(vocab_size=100, lora=lora, num_layers=2)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    base = {name: x for name, x in flat.items() if not is_adapter(name)}
    adapter = Adapter(lora, {name: x for name, x in flat.items() if is_adapter(name)})
    return model, params, base, adapter


def logits(model: Decoder, params):
    tokens, positions = tokens_and_positions(model, 2, 7)
    tokens = tokens.at[0, 2].set(44)

    def forward(decoder: Decoder):
        return decoder.unembed(decoder(tokens, positions)[0])

    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, method=forward))(params))


@pytest.mark.slow
def test_merged_weights_compute_the_same():
    model, params, base, adapter = adapted()
    plain = Decoder(dataclasses.replace(model.config, lora=None))
    merged = {name: adapter.merge(name, jnp.array(x)) for name, x in base.items()}
    changed = {name for name, x in merged.items() if (np.asarray(x) != base[name]).any()}
    assert changed == {n for n in base if "kernel" in n} | {"head", "embedding"}
    found = logits(plain, flax.traverse_util.unflatten_dict(merged, sep="/"))
    np.testing.assert_allclose(found, logits(model, params), atol=2e-4)
    for name, whole in merged.items():  # layer by layer and in blocks of rows, as exports do it
        stacked = name.startswith("stack/")
        for index in (0, 1) if stacked else (slice(0, 45), slice(45, 128)):
            part = adapter.merge_part(name, (index,), np.asarray(base[name][index]))
            np.testing.assert_allclose(part, whole[index], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_a_quantized_base_is_what_it_was_rounded_to(kind):
    pytest.importorskip("qwix")
    lora = dataclasses.replace(LORA, base=kind, targets="mlp", rows="")
    model, params, base, adapter = adapted(lora)
    quantized = quantize_params(params, kind)
    rounded = dequantize_params(quantized, jnp.float32)
    found = logits(model, quantized)
    np.testing.assert_allclose(found, logits(model, rounded), atol=1e-4)
    name = "stack/layers/mlp/up/kernel"
    merged = adapter.merge(name, jnp.array(base[name]))
    a, b = (np.asarray(adapter.params[f"stack/layers/mlp/up/lora_{part}"]) for part in "ab")
    expected = np.asarray(rounded["stack"]["layers"]["mlp"]["up"]["kernel"]) + 2 * a @ b
    np.testing.assert_allclose(merged, expected, atol=1e-5)
    assert adapter.merge_part(name, (1,), np.asarray(base[name][1])) == pytest.approx(
        expected[1], abs=1e-5
    )


def test_only_what_the_expression_finds_is_adapted():
    _, params, *_ = adapted(LoraConfig(rank=2, targets="attention/(query|out)$"))
    names = flax.traverse_util.flatten_dict(params, sep="/")
    found = {name.rpartition("/")[0] for name in names if is_adapter(name)}
    assert found == {"stack/layers/attention/query", "stack/layers/attention/out"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "model.lora.rank: -1"),
        ({"rank": 2, "targets": "("}, "no regular expression"),
        ({"rank": 2, "base": "int3"}, "model.lora.base: 'int3'"),
        ({"base": "int8"}, "nothing is adapted"),
        ({"rank": 2, "dropout": 1.0}, "model.lora.dropout"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(UserError, match=message):
        LoraConfig(**settings)


def test_rows_by_name():
    blocks = {"action": (10, 20), "visual": (20, 30), "far": (40, 41)}
    for rows, expected in {
        "action": (10, 20),
        "visual+action": (10, 30),
        "3:5": (3, 5),
        "": (0, 0),
    }.items():
        assert LoraConfig(rows=rows).with_rows(blocks, 50).row_range == expected
    for rows, message in {
        "text": "expected FIRST:STOP",
        "action+far": "adjoin",
        "9:99": "no part",
    }.items():
        with pytest.raises(UserError, match=message):
            LoraConfig(rows=rows).with_rows(blocks, 50)
