"""Group 13: learning-rate schedules, the decay mask and a run of AdamW steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.decoders import golden_decoder
from tests.parity_groups.checks import Check, Golden, close, equal, relative
from tests.parity_groups.decoder import golden_batch, id_ranges
from univla_jax.interop.hf_weights import decoder_rules, export_state
from univla_jax.models.decoder import Decoder
from univla_jax.training import optimizer
from univla_jax.training.losses import weighted_cross_entropy
from univla_jax.training.model_setup import params_init
from univla_jax.training.sharding import MeshConfig, batch_sharding, make_mesh, to_global
from univla_jax.training.train_step import abstract_state, make_train_step, state_from_params

RATES, LOSS, NORMS, FINAL = 1e-12, 2e-5, 1e-4, 1e-5
FLOAT32_RATES = 1e-6  # of the highest rate: near the floor a cosine in float32 cancels


def recipe(golden: Golden) -> Iterator[Check]:
    """Schedules, which parameters decay, and the trajectory."""
    arrays, values = golden.arrays("recipe"), golden.json("recipe")
    for name in (k.split("|")[1] for k in arrays if k.startswith("lr|") and k.endswith("|lr")):
        yield from _schedule(name, arrays[f"lr|{name}|step"], arrays[f"lr|{name}|lr"])
    model, params = golden_decoder(golden.folder)
    yield from _decay(model, values)
    yield from _trajectory(model, params, arrays, values, golden.json("decoder_config"))


def _schedule(name: str, steps: np.ndarray, rates: np.ndarray) -> Iterator[Check]:
    """The stored points; their settings are those of the curve's own corners.

    The files name no settings: the peak is where the warm-up ends, the floor where the cosine
    does, and all points between must lie on the schedule through both.
    """
    peak, floor = int(np.argmax(rates)), len(rates) - 1
    after = np.arange(len(rates)) > peak
    if after.any():
        floor = int(np.argmin(np.where(after, rates, np.inf)))
    settings = optimizer.OptimizerConfig(
        learning_rate=float(rates[peak]),
        min_learning_rate=float(rates[floor]),
        warmup_steps=int(steps[peak]),
    )
    schedule = optimizer.make_schedule(settings, int(steps[floor]))
    with jax.enable_x64(True):
        exact = [float(schedule(jnp.int64(s))) for s in steps]
    yield relative(name, "learning rates", exact, rates, RATES)
    yield _single(
        name, "rates in float32 / highest", [schedule(jnp.int32(s)) for s in steps], rates
    )


def _single(case: str, quantity: str, ours: Sequence, theirs: np.ndarray) -> Check:
    highest = np.max(theirs)
    return close(case, quantity, np.asarray(ours) / highest, theirs / highest, FLOAT32_RATES)


def decayed(model: Decoder) -> dict[str, bool]:
    """Whether each parameter, by its name in the reference, is decayed."""
    params = nn.unbox(jax.eval_shape(params_init(model), jax.random.key(0)))
    mask, _ = jax.tree_util.tree_flatten_with_path(optimizer.decay_mask(params))
    by_path = {jax.tree_util.keystr(path, simple=True, separator="/"): v for path, v in mask}
    return {rule.key: by_path[rule.path] for rule in decoder_rules(model.config)}


def _decay(model: Decoder, values: Mapping[str, Any]) -> Iterator[Check]:
    ours = decayed(model)
    yield equal("decay", "decay mask", {k for k, v in ours.items() if v}, set(values["decay"]))
    kept = {k for k, v in ours.items() if not v}
    yield equal("decay", "decay mask", kept, set(values["no_decay"]))


def _trajectory(
    model: Decoder, params: Any, arrays: Mapping, values: Mapping, config: Mapping
) -> Iterator[Check]:
    history, last = run_steps(model, params, arrays, values, config)
    yield close("trajectory", "loss", [h["loss"] for h in history], arrays["traj_loss"], LOSS)
    norms = [h["grad_norm"] for h in history]
    yield relative("trajectory", "gradient norm", norms, arrays["traj_grad_norm"], NORMS)
    rates = [h["learning_rate"] for h in history]
    yield _single("trajectory", "rates in float32 / highest", rates, arrays["traj_lr"])
    for key in (k for k in arrays if k.startswith("traj_final:")):
        part = last[key.removeprefix("traj_final:")]
        part = part[tuple(slice(size) for size in arrays[key].shape)]
        yield close("trajectory", "final parameters", part, arrays[key], FINAL)


def run_steps(
    model: Decoder, params: Any, arrays: Mapping, values: Mapping, config: Mapping
) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """Metrics of each step of the training path, and the last parameters in reference names."""
    settings = optimizer.OptimizerConfig(
        learning_rate=values["peak_lr"],
        min_learning_rate=values["min_lr"],
        warmup_steps=values["warmup"],
        clip_norm=values["clip"],
        b1=values["betas"][0],
        b2=values["betas"][1],
        eps=values["eps"],
        weight_decay=values["weight_decay"],
    )

    def loss(
        params: Any, batch: Any, step: jax.Array, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict]:
        total, weight, _ = weighted_cross_entropy(
            model, params, batch, batch.weights, id_ranges(config), train=True
        )
        return total, weight, {}

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    adamw = optimizer.make_optimizer(settings, values["total"])
    abstract = abstract_state(params_init(model), adamw, mesh)
    state = state_from_params(params, adamw, abstract)
    schedule = optimizer.make_schedule(settings, values["total"])
    split = batch_sharding(mesh)
    step = make_train_step(loss, adamw, abstract, split, schedule=schedule, seed=0)
    history = []
    names = ("input_ids", "attention_mask", "labels")
    for rows in zip(*(arrays[f"traj_{name}"] for name in names)):
        batch = golden_batch(dict(zip(names, rows)), config)
        state, metrics = step(state, to_global(batch, split))
        history.append({name: float(value) for name, value in metrics.items()})
    return history, export_state(decoder_rules(model.config), jax.device_get(state.params))
