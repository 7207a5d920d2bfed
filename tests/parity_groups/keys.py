"""Group 14: names and shapes of the full-size state dicts; nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.parity_groups.checks import Check, Golden, equal
from univla_jax.interop.hf_weights import check_params, decoder_rules, expert_rules, vision_rules
from univla_jax.models.action_expert import ActionExpert, ActionExpertConfig
from univla_jax.models.decoder import Decoder
from univla_jax.models.decoder_config import preset
from univla_jax.tokenizers.vision_vq import PRESETS
from univla_jax.training.model_setup import params_init


def full_size(golden: Golden) -> Iterator[Check]:
    """Every key of the released models maps onto ours and agrees in shape."""
    wanted = golden.json("full_size_keys")
    ours = {
        rule.key: ["int64" if rule.is_counter else "float32", list(rule.shape)]
        for rule in vision_rules(PRESETS["emu3"])
    }
    yield from _compare("vq", ours, wanted["vq"])
    model = Decoder(preset("emu3_8b"))
    rules = decoder_rules(model.config)
    check_params(rules, nn.unbox(jax.eval_shape(params_init(model), jax.random.key(0))))
    ours = {rule.key: ["float32", list(rule.shape)] for rule in rules}
    yield from _compare("moe", ours, wanted["moe"])
    yield from _expert(model, wanted["moe_action_experts_extra"])


def _expert(model: Decoder, wanted: Mapping) -> Iterator[Check]:
    """What ``action_experts: true`` adds at the released sizes, the expert's defaults."""
    expert = ActionExpert(ActionExpertConfig(), model.config)
    rules = expert_rules(expert.config, model.config)
    shapes = jax.eval_shape(
        expert.init,
        jax.random.key(0),
        jnp.zeros((1, 1, expert.config.action_dim)),
        jnp.zeros(1),
        jnp.zeros((1, 1, model.config.hidden_size)),
    )
    check_params(rules, nn.unbox(shapes)["params"])
    ours = {rule.key: ["float32", list(rule.shape)] for rule in rules}
    yield from _compare("moe_action_experts_extra", ours, wanted)


def _compare(case: str, ours: Mapping, theirs: Mapping) -> Iterator[Check]:
    differing = {k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)}
    note = f"{len(theirs)} keys" + (f"; first: {min(differing)}" if differing else "")
    yield equal(case, "keys and shapes", len(differing), 0, note=note)
