"""int8 weights."""

from __future__ import annotations

import numpy as np
import pytest

from tests.decoders import tiny_decoder
from tests.inference.uncached import draw_prompts, stack, token_lists
from univla_jax.inference.sampler import Sampler
from univla_jax.models import quantized_weights


def test_int8_decodes_near_the_float_weights():
    """Smaller, near the float logits, and the same whether dequantized at once or in every step."""
    pytest.importorskip("qwix")
    sampler = Sampler(*tiny_decoder(vocab_size=100))
    quantized = Sampler(sampler.model, quantized_weights.quantize_params(sampler.params))
    assert quantized_weights.num_bytes(
        quantized.params["stack"]
    ) < 0.4 * quantized_weights.num_bytes(sampler.params["stack"])
    restored = quantized_weights.dequantize_params(quantized.params, np.float32)
    kernel = lambda p: np.asarray(p["stack"]["layers"]["mlp"]["gate"]["kernel"])  # noqa: E731
    step = np.abs(kernel(sampler.params)).max(1, keepdims=True) / 127
    assert (np.abs(kernel(restored) - kernel(sampler.params)) <= 0.51 * step).all()
    prompts = draw_prompts(5, 3, seed=11)
    floating = Sampler(sampler.model, restored)
    rules = {"max_new_tokens": 6, "allowed": np.arange(20, 60)}
    runs = [
        token_lists(s.generate(s.prefill(*stack(prompts)), **rules)[0])
        for s in (quantized, floating)
    ]
    assert runs[0] == runs[1]
