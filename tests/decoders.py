"""Small decoders with random parameters drawn by NumPy, and the golden one."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from tests.interop.state_dicts import import_state
from univla_jax.interop.hf_folder import decoder_config_from_hf
from univla_jax.interop.hf_weights import decoder_rules
from univla_jax.models import decoder_config
from univla_jax.models.decoder import Decoder
from univla_jax.models.decoder_config import DecoderConfig, preset

PARAMETER_AXES = {
    decoder_config.LAYERS,
    decoder_config.EMBED,
    decoder_config.NORM,
    decoder_config.HEADS,
    decoder_config.KV_HEADS,
    decoder_config.HEAD_DIM,
    decoder_config.MLP,
    decoder_config.VOCAB,
}


def tiny_decoder(*, seed: int = 0, scale: float = 0.2, **changes: Any) -> tuple[Decoder, Any]:
    """The ``tiny`` preset with changes, and parameters large enough to make logits differ."""
    model = Decoder(preset("tiny", **changes))
    return model, draw_params(model, seed=seed, scale=scale)


def draw_params(model: Decoder, *, seed: int = 0, scale: float = 0.2) -> Any:
    """Normal parameters, norms around 1; nothing is compiled."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        center = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(center + scale * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(model))


def abstract_params(model: Decoder) -> Any:
    """Shapes of the parameters, without boxes."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens, tokens))["params"]


def tokens_and_positions(
    model: Decoder, batch: int, length: int, seed: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Random ids [B, S] and positions 0 .. S-1 in each row."""
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, (batch, length))
    positions = np.broadcast_to(np.arange(length), (batch, length))
    return jnp.asarray(ids, jnp.int32), jnp.asarray(positions, jnp.int32)


def golden_decoder(folder: pathlib.Path, **changes: Any) -> tuple[Decoder, Any]:
    """The reference's golden decoder, float32, without dropout."""
    values = json.loads((folder / "decoder_config.json").read_text())
    defaults = {"dtype": "float32", "remat": "none", "dropout": 0.0}
    config = dataclasses.replace(decoder_config_from_hf(values), **(defaults | changes))
    params = import_state(decoder_rules(config), load_file(folder / "decoder.safetensors"))
    return Decoder(config), jax.tree.map(jnp.asarray, params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedBatch:
    """Token arrays [B, S] and the loss weight of predicting each token."""

    tokens: Any
    weights: Any
    positions: Any
    segment_ids: Any


def parameter_count(config: DecoderConfig) -> int:
    """Number of parameters without the vocabulary's padding, without allocating any."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens, tokens)
    total = sum(x.size for x in jax.tree.leaves(nn.unbox(shapes)))
    return total - 2 * (config.padded_vocab_size - config.vocab_size) * config.hidden_size
