from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.decoders import Batch, golden_decoder, tiny_decoder, tokens_and_positions
from tests.parity import assert_parity
from tests.parity_groups.checks import Golden
from tests.parity_groups.decoder import golden_batch, loss_and_gradient
from univla_jax.errors import UserError
from univla_jax.training.losses import (
    DROPPED,
    MODALITIES,
    Modalities,
    averages,
    check_labeled,
    gather_labeled,
    weighted_cross_entropy,
)

RANGES = Modalities(visual=(20, 29), action=(10, 15), action_marks=(3,))


def test_golden_loss_and_gradients(golden_dir):
    assert_parity(golden_dir, "decoder", "loss", "global norm", "gradients")


def test_golden_loss_gathered_and_in_chunks(golden_dir):
    golden = Golden.beside(golden_dir)
    values, data = golden.json("decoder_config"), golden.arrays("decoder")
    model, params = golden_decoder(golden_dir)
    batch = golden_batch(data, values)
    most = int(np.count_nonzero(batch.loss_weight, axis=1).max())
    options = {"max_labeled": most, "chunks": 3}
    loss, gradient = loss_and_gradient(model, params, batch, values, **options)
    assert abs(float(loss) - data["loss"]) <= 1e-5
    norm = optax.global_norm(gradient)
    np.testing.assert_allclose(norm, data["grad_global_norm"], rtol=1e-4)


@pytest.fixture(scope="module")
def case():
    model, params = tiny_decoder(vocab_size=40)
    tokens, positions = tokens_and_positions(model, 4, 10)
    weight = np.random.default_rng(1).choice([0.0, 0.5, 1.0], (4, 10)).astype(np.float32)
    weight[:, 0] = 0
    weight[3] = 0
    return model, params, Batch(tokens, jnp.asarray(weight), positions, jnp.ones((4, 10), int))


def _run(case, **options):
    model, params, batch = case
    return weighted_cross_entropy(model, params, batch, RANGES, **options)


def test_gathering_changes_nothing(case):
    whole, part = _run(case), _run(case, max_labeled=9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, part)


def test_sums_add_up_over_micro_batches(case):
    model, params, batch = case
    halves = [jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch) for i in (0, 1)]
    sums = [weighted_cross_entropy(model, params, half, RANGES) for half in halves]
    added = jax.tree.map(jnp.add, *sums)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), added, _run(case))


def test_metrics_by_modality(case):
    model, params, batch = case
    _, weight, metrics = _run(case)
    hidden, _ = model.apply({"params": params}, batch.tokens, batch.positions, batch.segment_ids)
    logits = model.apply({"params": params}, hidden, method="unembed")[:, :-1]
    nll = -np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), np.asarray(batch.tokens)[:, 1:, None], -1
    )[..., 0]
    labels, weights = np.asarray(batch.tokens)[:, 1:], np.asarray(batch.loss_weight)[:, 1:]
    action = ((labels >= 10) & (labels <= 15)) | (labels == 3)
    visual = (labels >= 20) & (labels <= 29)
    for name, mine in zip(MODALITIES, (~action & ~visual, visual, action)):
        mine &= weights > 0
        correct = np.argmax(logits, -1) == labels
        np.testing.assert_allclose(metrics[f"{name}_nll"], nll[mine].sum(), rtol=1e-5)
        assert metrics[f"{name}_tokens"] == mine.sum()
        assert metrics[f"{name}_correct"] == (correct & mine).sum()
    np.testing.assert_allclose(weight, weights.sum())
    assert averages(metrics)["visual_loss"] == pytest.approx(nll[visual & (weights > 0)].mean())


def test_too_many_labels_are_never_dropped_in_silence(case):
    total, _, metrics = _run(case, max_labeled=2)
    counts = np.count_nonzero(np.asarray(case[2].loss_weight)[:, 1:], axis=1)
    assert np.isnan(total)
    assert metrics[DROPPED] == np.maximum(counts - 2, 0).sum() > 0


def test_host_check_names_the_row_and_the_need():
    weight = np.zeros((3, 6), np.float32)
    weight[1, [0, 2, 3, 5]] = 1  # the first column predicts nothing
    check_labeled(weight, 3)
    with pytest.raises(UserError, match="row 1 of the batch labels 3 tokens; set it to at least 3"):
        check_labeled(weight, 2)


def test_gathered_positions_keep_their_order():
    weights = jnp.asarray([[0, 1, 0, 2, 0], [0, 0, 0, 0, 3]], jnp.float32)
    targets = jnp.arange(10).reshape(2, 5)
    hidden = targets[..., None].astype(jnp.float32)
    picked, ids, kept, dropped = gather_labeled(hidden, targets, weights, 3)
    np.testing.assert_array_equal(kept, [[1, 2, 0], [3, 0, 0]])
    np.testing.assert_array_equal(ids, [[1, 3, 4], [9, 9, 9]])
    np.testing.assert_array_equal(picked[..., 0], ids)
    assert dropped == 0


def test_modality_of_ids():
    ids = jnp.asarray([3, 9, 10, 15, 16, 19, 20, 29, 30])
    np.testing.assert_array_equal(RANGES.index(ids), [2, 0, 2, 2, 0, 0, 1, 1, 0])
