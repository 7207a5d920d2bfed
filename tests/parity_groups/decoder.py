"""Groups 3, 4 and 13: the decoder, constrained generation and the training recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.decoders import WeightedBatch, golden_decoder
from tests.parity_groups.checks import Check, Golden, close, equal, relative
from univla_jax.inference.sampler import Sampler
from univla_jax.interop.hf_weights import decoder_rules, export_state
from univla_jax.models.decoder import Decoder
from univla_jax.training.losses import Modalities, weighted_cross_entropy

ACTIVATIONS, LOSS, GRADIENTS = 1e-4, 1e-5, 1e-4
IGNORED = -100


def layer_states(
    model: Decoder, params: Any, tokens_BS: jax.Array, positions_BS: jax.Array
) -> jax.Array:
    """Hidden states of every depth [L+1, B, S, D], the reference's ``output_hidden_states``.

    Entry 0 is the embedding, entry i the output of layer i, and the last is after the final norm.
    """
    (last, _), kept = model.apply(
        {"params": params}, tokens_BS, positions_BS, mutable=["intermediates"]
    )
    inputs = kept["intermediates"]["stack"]["layers"]["inputs"][0]
    return jnp.concatenate([inputs, last[None]])


def decoder(golden: Golden) -> Iterator[Check]:
    """Hidden states of every depth, logits, weighted loss and gradients."""
    values, data = golden.json("decoder_config"), golden.arrays("decoder")
    model, params = golden_decoder(golden.folder)
    weights = export_state(decoder_rules(model.config), params)
    for key, value in golden.state("decoder").items():
        yield equal("weights", "weights there and back", weights[key], value)
    yield from _activations(model, params, data)
    loss, gradient = loss_and_gradient(model, params, golden_batch(data, values), values)
    yield close("batch", "loss", loss, data["loss"], LOSS)
    yield from _gradients(golden, export_state(decoder_rules(model.config), gradient), data)


def golden_batch(
    data: Mapping[str, np.ndarray], values: Mapping[str, Any], **rows: Any
) -> WeightedBatch:
    """The reference's labels and per-class weights as loss weights of the tokens.

    Args:
      data: ``input_ids``, ``labels`` and ``attention_mask`` [B, S].
      values: the reference's config.
      **rows: arrays that replace those of ``data``.

    Raises:
      ValueError: a label that is not the token at its place.
    """
    data = {**data, **rows}
    ids, labels = data["input_ids"], data["labels"]
    labeled = labels != IGNORED
    if (labels != ids)[labeled].any():
        raise ValueError("a label differs from the token at its place")
    visual = (ids >= values["bov_token_id"]) & (ids <= values["eov_token_id"])
    weight = np.where(visual, values["vision_loss_weight"], 1.0) * labeled
    weight[:, 0] = 0
    return WeightedBatch(
        tokens=ids.astype(np.int32),
        weights=weight.astype(np.float32),
        positions=np.tile(np.arange(ids.shape[1], dtype=np.int32), (len(ids), 1)),
        segment_ids=data["attention_mask"].astype(np.int32),
    )


def id_ranges(values: Mapping[str, Any]) -> Modalities:
    """The visual ids of a reference config; no action ids."""
    return Modalities((values["bov_token_id"], values["eov_token_id"]), (0, 0))


def loss_and_gradient(
    model: Decoder, params: Any, batch: WeightedBatch, values: Mapping[str, Any], **options: Any
) -> tuple[jax.Array, Any]:
    """The weighted loss of one batch and its gradient by the parameters."""

    @jax.jit
    @jax.value_and_grad
    def run(params: Any) -> jax.Array:
        total, weight, _ = weighted_cross_entropy(
            model, params, batch, batch.weights, id_ranges(values), **options
        )
        return total / weight

    return run(params)


def _activations(model: Decoder, params: Any, data: Mapping[str, np.ndarray]) -> Iterator[Check]:
    tokens = jnp.asarray(data["input_ids"])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    states = jax.jit(lambda p: layer_states(model, p, tokens, positions))(params)
    real = data["attention_mask"] == 1
    yield close(
        "batch", "hidden states", states[:, real], data["hidden_states"][:, real], ACTIVATIONS
    )
    logits = model.apply({"params": params}, states[-1], method="unembed")
    logits = logits[real][:, : model.config.vocab_size]
    yield close("batch", "logits", logits, data["logits"][real], ACTIVATIONS)


def _gradients(golden: Golden, state: Mapping, data: Mapping) -> Iterator[Check]:
    norms = np.array([np.linalg.norm(state[n]) for n in golden.json("decoder_grad_names")])
    whole = np.linalg.norm(norms)
    yield relative("batch", "global norm", whole, data["grad_global_norm"], GRADIENTS)
    theirs = data["grad_norm_per_param"]
    yield close("batch", "norm per parameter / global", norms / whole, theirs / whole, GRADIENTS)
    yield from gradient_slices(state, data, "grad:", "gradients")


def gradient_slices(
    state: Mapping[str, np.ndarray], data: Mapping, prefix: str, what: str, case: str = "batch"
) -> Iterator[Check]:
    """Leading slices of tensors stored as ``<prefix><name>``."""
    for key in (k for k in data if k.startswith(prefix)):
        part = state[key.removeprefix(prefix)][tuple(slice(size) for size in data[key].shape)]
        yield close(case, what, part, data[key], GRADIENTS)


def generate(golden: Golden) -> Iterator[Check]:
    """All prompts in one batch, greedy among the allowed ids."""
    values, data = golden.json("generate"), golden.arrays("generate")
    model, params = golden_decoder(golden.folder)
    eoa = values["eoa_token_id"]
    params["head"] = params["head"].at[eoa].set(data["lm_head_row_eoa"])
    numbers = sorted(int(k.removeprefix("prompt")) for k in data if k.startswith("prompt"))
    prompts = [data[f"prompt{i}"] for i in numbers]
    lengths = np.array([len(p) for p in prompts])
    tokens = np.stack([np.pad(p, (0, lengths.max() - len(p))) for p in prompts])
    sampler = Sampler(model, params)
    generated, _ = sampler.generate(
        sampler.prefill(tokens, lengths),
        max_new_tokens=values["max_new_tokens"],
        allowed=data["allowed_token_ids"],
        stop_id=eoa,
    )
    for row, number in enumerate(numbers):
        ours = np.asarray(generated.tokens)[row, : generated.lengths[row]]
        theirs = data[f"new_tokens{number}"]
        yield equal(f"prompt{number}", "tokens", ours.tolist(), theirs.tolist())
        stopped = bool(generated.stopped[row])
        yield equal(f"prompt{number}", "stopped at eoa", stopped, bool(theirs[-1] == eoa))
