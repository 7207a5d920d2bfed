"""Group 5: the action expert, with causal attention as configured and with full attention."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.interop.state_dicts import import_state
from tests.parity_groups.checks import Check, Golden, close, equal, relative
from tests.parity_groups.decoder import golden_batch, gradient_slices, id_ranges
from univla_jax.inference.action_decoders import sample_actions
from univla_jax.interop.hf_folder import decoder_config_from_hf, expert_config_from_hf
from univla_jax.interop.hf_weights import export_state, joint_rules
from univla_jax.models.action_expert import ActionExpert, embed_tau
from univla_jax.models.decoder import Decoder
from univla_jax.training.losses import FLOW_MSE, FlowTarget, flow_loss

VELOCITY, LOSS, GRADIENTS = 1e-4, 1e-5, 1e-4


class Models:
    """Decoder, expert and their parameters, for one kind of attention."""

    def __init__(self, golden: Golden, *, causal: bool) -> None:
        """Reads config and weights of the golden folder."""
        self.values = golden.json("action_expert_config")
        config = decoder_config_from_hf(self.values)
        config = dataclasses.replace(config, dtype="float32", remat="none", dropout=0.0)
        settings = expert_config_from_hf(self.values, config)
        settings = dataclasses.replace(settings, causal=causal)
        self.decoder, self.expert = Decoder(config), ActionExpert(settings, config)
        self.rules = joint_rules(settings, config)
        self.state = golden.state("action_expert")
        self.params = jax.tree.map(jnp.asarray, import_state(self.rules, self.state))
        self.name = "causal" if causal else "full"


def action_expert(golden: Golden) -> Iterator[Check]:
    """Weights, embedding of tau, velocity, hidden states, flow loss, gradients, sampling."""
    data = golden.arrays("action_expert")
    for causal in (True, False):
        models = Models(golden, causal=causal)
        if causal:
            yield from _once(models, data)
        yield from _forward(models, data)
        yield from _flow(models, data)
        yield from _sampling(models, data)


def _once(models: Models, data: Mapping[str, np.ndarray]) -> Iterator[Check]:
    """What does not depend on the kind of attention."""
    back = export_state(models.rules, models.params)
    for key, value in models.state.items():
        yield equal("weights", "weights there and back", back[key], value)
    for key in (k for k in data if k.endswith("_tau_emb")):
        case = key.removesuffix("_tau_emb")
        theirs = data[key].reshape(-1, data[key].shape[-1])
        ours = embed_tau(jnp.asarray(data[f"{case}_t"]).reshape(-1), theirs.shape[-1])
        yield close(case, "tau embedding", ours, theirs, VELOCITY)
    for key in (k for k in data if re.fullmatch(r"ga\d*_cond", k)):
        case = key.removesuffix("_cond")
        hidden = _hidden(models, data[f"{case}_input_ids"])
        yield close(case, "decoder's hidden states", hidden, data[key], VELOCITY)


def _hidden(models: Models, ids: np.ndarray) -> jax.Array:
    """Hidden states with every token real."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    variables = {"params": models.params["decoder"]}
    return jax.jit(models.decoder.apply)(variables, jnp.asarray(ids), positions)[0]


def _forward(models: Models, data: Mapping[str, np.ndarray]) -> Iterator[Check]:
    run = jax.jit(models.expert.apply)
    variables = {"params": models.params["action_expert"]}
    for key in (k for k in data if re.fullmatch(rf"fa\d*_{models.name}_velo", k)):
        case = key.partition("_")[0]
        velocity, hidden = run(
            variables, data[f"{case}_z"], data[f"{case}_t"].reshape(-1), data[f"{case}_cond"]
        )
        kind = f"{case} {models.name}"
        yield close(kind, f"velocity, {models.name}", velocity, data[key], VELOCITY)
        theirs = data[f"{case}_{models.name}_hidden"]
        yield close(kind, f"hidden states, {models.name}", hidden, theirs, VELOCITY)


def _flow(models: Models, data: Mapping[str, np.ndarray]) -> Iterator[Check]:
    for key in (k for k in data if re.fullmatch(rf"fm\d*_{models.name}_total_loss", k)):
        case, prefix = key.partition("_")[0], key.removesuffix("total_loss")
        (total, metrics), gradient = flow_gradient(models, data, case)
        kind = f"{case} {models.name}"
        yield relative(kind, f"total loss, {models.name}", total, data[key], LOSS)
        yield relative(
            kind, f"flow error, {models.name}", metrics[FLOW_MSE], data[f"{prefix}mse"], LOSS
        )
        state = export_state(models.rules, gradient)
        norm = np.linalg.norm([np.linalg.norm(value) for value in state.values()])
        yield relative(
            kind, f"gradient norm, {models.name}", norm, data[f"{prefix}grad_norm"], GRADIENTS
        )
        yield from gradient_slices(state, data, f"{prefix}grad:", f"gradients, {models.name}", kind)


def flow_gradient(models: Models, data: Mapping[str, np.ndarray], case: str) -> Any:
    """((loss, metrics), gradient) of one recorded training forward.

    ``action_config.vision_loss_weight`` weighs both the flow matching and the visual tokens
    (golden fact 13).
    """
    values = models.values
    weight = values["action_config"].get("vision_loss_weight", values["vision_loss_weight"])
    names = ("input_ids", "attention_mask", "labels")
    rows = {name: data[f"{case}_{name}"] for name in names}
    batch = golden_batch(rows, {**values, "vision_loss_weight": weight})
    target = FlowTarget(
        *(jnp.asarray(data[f"{case}_{name}"]) for name in ("action", "noise")),
        jnp.asarray(data[f"{case}_tau"]).reshape(-1),
    )

    def loss(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        total, weights, metrics = flow_loss(
            models.decoder,
            models.expert,
            params,
            batch,
            batch.weights,
            target,
            id_ranges(values),
            flow_weight=weight,
            reference_padding=True,
            train=True,
        )
        error, rows = metrics[FLOW_MSE]
        return total / weights, {FLOW_MSE: error / rows}

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(models.params)


def _sampling(models: Models, data: Mapping[str, np.ndarray]) -> Iterator[Check]:
    for key in data:
        found = re.fullmatch(rf"(ga\d*)_{models.name}_steps(\d+)", key)
        if not found:
            continue
        case, steps = found[1], int(found[2])
        actions = sample_actions(
            models.expert,
            models.params["action_expert"],
            _hidden(models, data[f"{case}_input_ids"]),
            data[f"{case}_noise"],
            steps=steps,
        )
        kind = f"{case} {models.name} {steps} steps"
        yield close(kind, f"sampled actions, {models.name}", actions, data[key], VELOCITY)
