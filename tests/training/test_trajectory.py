"""Seven optimizer steps of the whole training path beside the reference's."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from univla_jax.interop import huggingface
from univla_jax.interop.key_table import export_state, import_state
from univla_jax.models.decoder import Decoder
from univla_jax.sequences.examples import Batch
from univla_jax.training import optimizer
from univla_jax.training.batches import batch_sharding, to_global
from univla_jax.training.loss import Modalities, weighted_cross_entropy
from univla_jax.training.run_model import params_init
from univla_jax.training.sharding import MeshConfig, make_mesh, unbox
from univla_jax.training.state import abstract_state, state_from_params
from univla_jax.training.step import make_train_step

OPTIMIZER = optimizer.OptimizerConfig(
    learning_rate=0.003, min_learning_rate=0.0003, warmup_steps=2, clip_norm=3.0
)
STEPS = 7


@pytest.fixture(scope="module")
def reference(golden_dir):
    """Values of the decoder's config, its weights and the trajectory."""
    values = json.loads((golden_dir / "decoder_config.json").read_text())
    weights = safetensors.numpy.load_file(golden_dir / "decoder.safetensors")
    return values, weights, dict(np.load(golden_dir / "recipe.npz"))


def _batch(values, golden, step):
    labels, ids = golden["traj_labels"][step], golden["traj_input_ids"][step]
    labelled = labels != -100
    np.testing.assert_array_equal(labels[labelled], ids[labelled])
    visual = (ids >= values["bov_token_id"]) & (ids <= values["eov_token_id"])
    weight = np.where(visual, values["vision_loss_weight"], 1.0) * labelled
    weight[:, 0] = 0
    return Batch(
        tokens=ids,
        loss_weight=weight.astype(np.float32),
        positions=np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape).copy(),
        segment_ids=golden["traj_attention_mask"][step],
    )


def _train(values, weights, golden):
    """Loss and gradient norm of each step, and the last parameters under the reference's names."""
    config = huggingface.config_from_huggingface(
        values, dtype="float32", remat="none", dropout=0.0, vocab_pad_multiple=64
    )
    model, rules = Decoder(config), huggingface.decoder_rules(config)
    modalities = Modalities(visual=(values["bov_token_id"], values["eov_token_id"]), action=(0, 0))

    def loss(params, batch, rng):
        total, weight, _ = weighted_cross_entropy(model, params, batch, modalities, train=True)
        return total, weight, {}

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    adamw = optimizer.make_optimizer(OPTIMIZER, STEPS)
    abstract = abstract_state(params_init(model), adamw, mesh)
    params = jax.tree.map(jax.numpy.asarray, import_state(rules, weights))
    state = state_from_params(params, adamw, abstract)
    schedule = optimizer.make_schedule(OPTIMIZER, STEPS)
    step = make_train_step(loss, adamw, abstract, batch_sharding(mesh), schedule=schedule, seed=0)
    history = []
    for number in range(STEPS):
        batch = to_global(_batch(values, golden, number), batch_sharding(mesh))
        state, metrics = step(state, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    return history, export_state(rules, jax.device_get(state.params))


def test_seven_steps_equal_the_reference(reference):
    values, weights, golden = reference
    history, last = _train(values, weights, golden)
    for name, tolerance in (
        ("loss", {"atol": 2e-5}),
        ("grad_norm", {"rtol": 1e-4}),
        ("learning_rate", {"rtol": 1e-6, "atol": 1e-12}),
    ):
        wanted = golden["traj_lr" if name == "learning_rate" else f"traj_{name}"]
        np.testing.assert_allclose([h[name] for h in history], wanted, **tolerance)
    for name in (key for key in golden if key.startswith("traj_final:")):
        found = last[name.removeprefix("traj_final:")]
        wanted = golden[name]
        found = found[tuple(slice(size) for size in wanted.shape)]
        np.testing.assert_allclose(found, wanted, atol=1e-5, err_msg=name)


def test_the_split_of_decayed_parameters_is_the_reference_one(golden_dir, reference):
    values, _, _ = reference
    split = json.loads((golden_dir / "recipe.json").read_text())
    config = huggingface.config_from_huggingface(values, vocab_pad_multiple=64)
    abstract = jax.eval_shape(params_init(Decoder(config)), jax.random.key(0))
    mask, _ = jax.tree_util.tree_flatten_with_path(
        optimizer.decay_mask(jax.tree.map(lambda x: 0, unbox(abstract)))
    )
    by_path = {jax.tree_util.keystr(path, simple=True, separator="/"): v for path, v in mask}
    rules = huggingface.decoder_rules(config)
    assert {r.key for r in rules if by_path[r.path]} == set(split["decay"])
    assert {r.key for r in rules if not by_path[r.path]} == set(split["no_decay"])
