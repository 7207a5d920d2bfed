"""Loss weights by role, task and step; the weighted cross-entropy; flow matching."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.decoders import WeightedBatch, golden_decoder, tiny_decoder, tokens_and_positions
from tests.experts import tiny_expert
from tests.parity import assert_parity
from tests.parity_groups.checks import Golden
from tests.parity_groups.decoder import golden_batch, loss_and_gradient
from tests.pipeline import small
from tests.sequences.spelling import chunk, code
from univla_jax.errors import UserError
from univla_jax.pipeline.batch import Batch, Example, pack
from univla_jax.sequences.tokens import LABELS, Role, labeled_roles
from univla_jax.training.losses import (
    DROPPED,
    MODALITIES,
    FlowTarget,
    LabelWeights,
    Modalities,
    flow_loss,
    gather_labeled,
    weighted_cross_entropy,
)
from univla_jax.training.model_setup import label_weights

RANGES = Modalities(visual=(20, 29), action=(10, 15), action_marks=(3,))


def test_golden_loss_and_gradients(golden_dir):
    assert_parity(golden_dir, "decoder", "loss", "global norm", "gradients")


def test_golden_loss_gathered_and_in_chunks(golden_dir):
    golden = Golden.beside(golden_dir)
    values, data = golden.json("decoder_config"), golden.arrays("decoder")
    model, params = golden_decoder(golden_dir)
    batch = golden_batch(data, values)
    most = int(np.count_nonzero(batch.weights, axis=1).max())
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
    return (
        model,
        params,
        WeightedBatch(tokens, jnp.asarray(weight), positions, jnp.ones((4, 10), int)),
    )


def _run(case, **options):
    model, params, batch = case
    return weighted_cross_entropy(model, params, batch, batch.weights, RANGES, **options)


def test_gathering_changes_nothing(case):
    whole, part = _run(case), _run(case, max_labeled=9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, part)


def test_sums_add_up_over_micro_batches(case):
    model, params, batch = case
    halves = [jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch) for i in (0, 1)]
    sums = [weighted_cross_entropy(model, params, half, half.weights, RANGES) for half in halves]
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
    labels, weights = np.asarray(batch.tokens)[:, 1:], np.asarray(batch.weights)[:, 1:]
    action = ((labels >= 10) & (labels <= 15)) | (labels == 3)
    visual = (labels >= 20) & (labels <= 29)
    for name, mine in zip(MODALITIES, (~action & ~visual, visual, action)):
        mine &= weights > 0
        correct = np.argmax(logits, -1) == labels
        np.testing.assert_allclose(metrics[f"{name}_nll"], nll[mine].sum(), rtol=1e-5)
        assert metrics[f"{name}_tokens"] == mine.sum()
        assert metrics[f"{name}_correct"] == (correct & mine).sum()
    np.testing.assert_allclose(weight, weights.sum())
    visual_loss = float(metrics["visual_nll"]) / float(metrics["visual_tokens"])
    assert visual_loss == pytest.approx(nll[visual & (weights > 0)].mean())


def test_the_decoder_reads_the_inputs_and_predicts_the_tokens(case):
    model, params, batch = case
    read = (batch.tokens + 1) % 40
    total, _, _ = _run(case, inputs=read)
    hidden, _ = model.apply({"params": params}, read, batch.positions, batch.segment_ids)
    logits = model.apply({"params": params}, hidden, method="unembed")[:, :-1]
    nll = -np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits)), np.asarray(batch.tokens)[:, 1:, None], -1
    )[..., 0]
    np.testing.assert_allclose(total, (nll * batch.weights[:, 1:]).sum(), rtol=1e-5)


def test_too_many_labels_are_never_dropped_in_silence(case):
    total, _, metrics = _run(case, max_labeled=2)
    counts = np.count_nonzero(np.asarray(case[2].weights)[:, 1:], axis=1)
    assert np.isnan(total)
    assert metrics[DROPPED] == np.maximum(counts - 2, 0).sum() > 0


def test_gathered_positions_keep_their_order():
    weights = jnp.asarray([[0, 1, 0, 2, 0], [0, 0, 0, 0, 3]], jnp.float32)
    targets = jnp.arange(10).reshape(2, 5)
    hidden = targets[..., None].astype(jnp.float32)
    picked, ids, kept, dropped, _ = gather_labeled(hidden, targets, weights, 3)
    np.testing.assert_array_equal(kept, [[1, 2, 0], [3, 0, 0]])
    np.testing.assert_array_equal(ids, [[1, 3, 4], [9, 9, 9]])
    np.testing.assert_array_equal(picked[..., 0], ids)
    assert dropped == 0


def test_modality_of_ids():
    ids = jnp.asarray([3, 9, 10, 15, 16, 19, 20, 29, 30])
    np.testing.assert_array_equal(RANGES.index(ids), [2, 0, 2, 2, 0, 0, 1, 1, 0])


# Loss weights by role, task and step.


def _batch(*elements, length=40):
    """A batch of examples given as (tokens, task id)."""
    examples = [
        [Example(tokens.ids, tokens.roles, task_id) for tokens, task_id in element]
        for element in elements
    ]
    return Batch(**pack(examples, length=length, pad=9))


POLICY = small.task("policy_image").build("go", [code(1, 2)], chunk(1), state=chunk(1))
WORLD = small.task("world_model").build("go", [np.concatenate([code(1, 2), code(3, 4)])])


def _weights(labels, vision, batch, step=0, value=None):
    tables = [labeled_roles(name) for name in labels]
    rule = LabelWeights(tables, vision, value or [1.0] * len(labels))
    weights = jax.jit(rule.__call__)(batch, jnp.int32(step))
    assert weights.dtype == jnp.float32
    return np.asarray(weights)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        # bos g o | boi 1 * 1 * 2 img | v v | eof eoi | state | boa a eoa
        ("action", "000 0000000 00 00 0 111"),
        ("vision", "000 0000000 vv 00 0 000"),
        ("both", "000 1111111 vv 11 0 111"),
        ("all", "011 1111111 vv 11 0 111"),
        ("thought_and_action", "000 0000000 00 00 0 111"),
        ("answer", "000 0000000 00 00 0 000"),
    ],
)
def test_weights_by_role(labels, expected):
    weights = _weights([labels], [(0.5, 0.5, 0)], _batch([(POLICY, 0)]))
    wanted = {"0": 0.0, "1": 1.0, "v": 0.5}
    used = len(POLICY)
    assert weights[0, :used].tolist() == [wanted[c] for c in expected.replace(" ", "")]
    assert not weights[0, used:].any()


def test_the_first_token_of_every_segment_and_padding_weigh_nothing():
    batch = _batch([(POLICY, 0), (POLICY, 0)], [(POLICY, 0)], [], length=40)
    weights = _weights(["all"], [(1.0, 1.0, 0)], batch)
    assert not weights[batch.segment_ids == 0].any()
    assert not weights[batch.positions == 0].any()
    used = len(POLICY)
    np.testing.assert_array_equal(weights[0, :used], weights[0, used : 2 * used])
    np.testing.assert_array_equal(weights[0, :used], weights[1, :used])


def test_both_labels_weigh_vision():
    weights = _weights(["both"], [(0.25, 0.25, 0)], _batch([(WORLD, 0)]))
    assert set(weights.ravel().tolist()) == {0.0, 0.25, 1.0}
    assert (weights == 0.25).sum() == 4


def test_a_vision_weight_of_zero_labels_nothing():
    weights = _weights(["vision"], [(0.0, 0.0, 0)], _batch([(WORLD, 0)]))
    assert not weights.any()


@pytest.mark.parametrize(
    ("step", "vision"), [(0, 1.0), (1, 0.92), (5, 0.6), (10, 0.2), (11, 0.2), (10_000, 0.2)]
)
def test_a_vision_weight_goes_in_a_line_from_start_to_end(step, vision):
    batch = _batch([(POLICY, 0)])
    weights = _weights(["both"], [(1.0, 0.2, 10)], batch, step)
    visual, action = (batch.roles == role for role in (Role.VISION, Role.ACTION))
    np.testing.assert_allclose(weights[visual & (batch.segment_ids > 0)], vision, rtol=1e-6)
    assert (weights[action] == 1).all() and action.any()


@pytest.mark.parametrize(
    ("step", "policy", "world"), [(0, 0.0, 1.0), (4, 0.2, 1.0), (8, 0.4, 1.0), (99, 0.4, 1.0)]
)
def test_each_task_of_a_batch_has_its_own_labels_and_schedule(step, policy, world):
    """Two tasks in one row: the actions of the one, the frames of both, at their own weights."""
    batch = _batch([(POLICY, 0), (WORLD, 1)], [(WORLD, 1)], length=60)
    weights = _weights(["both", "vision"], [(0.0, 0.4, 8), (1.0, 1.0, 0)], batch, step)
    for task_id, vision in [(0, policy), (1, world)]:
        of_task = (batch.task_ids == task_id) & (batch.segment_ids > 0)
        visual = of_task & (batch.roles == Role.VISION)
        np.testing.assert_allclose(weights[visual], vision, rtol=1e-6)
        others = of_task & (batch.roles != Role.VISION) & (batch.positions > 0)
        labeled = np.isin(batch.roles, list(LABELS[["both", "vision"][task_id]]))
        np.testing.assert_array_equal(weights[others], labeled[others].astype(np.float32))


def test_weights_of_a_config():
    batch = _batch([(POLICY, 0)])
    config = small.config(loss_on="both", vision_weight=(1.0, 0.5, 2))
    for step, vision in enumerate((1.0, 0.75, 0.5)):
        weights = label_weights(config)(batch, jnp.int32(step))
        assert set(weights[batch.roles == Role.VISION].tolist()) == {vision}
    own = label_weights(small.config())(batch, jnp.int32(0))
    assert set(np.flatnonzero(own[0])) == set(range(len(POLICY) - 3, len(POLICY)))


def test_the_host_check_names_the_element_and_the_need():
    batch = _batch([(WORLD, 0)], [(POLICY, 0)], [(POLICY, 0), (POLICY, 0)])
    weights = LabelWeights((labeled_roles("action"),), ((0.5, 0.5, 0),), (1.0,))
    weights.check_capacity(batch, 6)
    message = "element 2 of the batch labels 6 tokens; set it to at least 6"
    with pytest.raises(UserError, match=message):
        weights.check_capacity(batch, 5)


@pytest.mark.parametrize("weight", [0.0, 20.0])
def test_a_value_weighs_what_its_task_says_and_actions_between_its_moments_nothing(weight):
    moments = [np.concatenate([code(1, 2), code(3, 4)])]
    judged = small.task("value", frames=2).build("go", moments, [np.arange(3)], 3)
    batch = _batch([(judged, 0), (POLICY, 1)], length=64)
    schedules = ((0.5, 0.5, 0),) * 2
    weights = _weights(["value", "action"], schedules, batch, value=[weight, 1.0])
    values = batch.roles == Role.VALUE
    assert values.sum() == 1 and (weights[values] == weight).all()
    actions = (batch.roles == Role.ACTION) & (batch.task_ids == 1)
    np.testing.assert_array_equal(
        np.flatnonzero(weights[~values]), np.flatnonzero(actions[~values])
    )
    assert (weights[actions] == 1).all()
    rule = LabelWeights([labeled_roles("value")], schedules[:1], [weight])
    rule.check_capacity(_batch([(judged, 0)]), int(weight > 0))


@pytest.mark.parametrize(("vision", "count"), [((0, 0, 0), 0), ((0, 0.5, 9), 4), ((1, 0, 9), 4)])
def test_the_host_check_counts_what_ever_has_a_weight(vision, count):
    weights = LabelWeights((labeled_roles("vision"),), (vision,), (1.0,))
    batch = _batch([(WORLD, 0)])
    weights.check_capacity(batch, count)
    if count:
        with pytest.raises(UserError, match="labels 4 tokens"):
            weights.check_capacity(batch, count - 1)


# Flow matching of the action expert.


FLOW_RANGES = Modalities(visual=(20, 29), action=(10, 15))


@pytest.fixture(scope="module")
def flow_case():
    """Two rows, the second with three tokens of padding."""
    model, decoder = tiny_decoder(vocab_size=40)
    expert, params = tiny_expert(model.config)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 40, (2, 8)), jnp.int32)
    segments = jnp.asarray([[1] * 8, [1] * 5 + [0] * 3])
    weight = (segments > 0).astype(jnp.float32).at[:, 0].set(0)
    batch = WeightedBatch(tokens, weight, jnp.tile(jnp.arange(8), (2, 1)), segments)
    actions = jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32)
    target = FlowTarget.draw(jax.random.key(0), actions)
    params = {"decoder": decoder, "action_expert": params}
    return model, expert, params, batch, batch.weights, target


def test_golden_flow_loss_and_gradients(golden_dir):
    assert_parity(golden_dir, "action_expert", "total loss, causal", "gradients, causal")


def test_total_is_cross_entropy_plus_weighted_error(flow_case):
    model, _, params, batch, *_ = flow_case
    total, weights, metrics = flow_loss(*flow_case, FLOW_RANGES, flow_weight=3.0)
    ce, weight, _ = weighted_cross_entropy(
        model, params["decoder"], batch, batch.weights, FLOW_RANGES
    )
    error, rows = metrics["flow_mse"]
    assert rows == 2 and weights == weight
    np.testing.assert_allclose(total, ce + weight * 3.0 * error / rows, rtol=1e-5)


def test_rows_of_padding_have_no_error(flow_case):
    """Such rows fill up the last batch of an evaluation."""
    model, expert, params, *arrays = flow_case
    error, rows = flow_loss(*flow_case, FLOW_RANGES)[2]["flow_mse"]
    more = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x[:1])]), arrays)
    one_more = flow_loss(model, expert, params, *more, FLOW_RANGES)
    np.testing.assert_allclose(one_more[2]["flow_mse"], (error, rows), rtol=1e-5)
    np.testing.assert_allclose(one_more[0], flow_loss(*flow_case, FLOW_RANGES)[0], rtol=1e-5)


@pytest.mark.slow
def test_insulated_the_flow_matching_leaves_the_decoder_alone(flow_case):
    model, expert, params, batch, weights, target = flow_case

    def gradient(**options):
        loss = lambda p: flow_loss(  # noqa: E731
            model, expert, p, batch, weights * 0 + 1e-6, target, FLOW_RANGES, **options
        )
        return jax.grad(lambda p: loss(p)[0] / loss(p)[1])(params)

    plain, insulated = gradient(), gradient(insulate=True)
    without = gradient(flow_weight=0.0)
    same = lambda a, b: jax.tree.map(  # noqa: E731
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b
    )
    same(insulated["decoder"], without["decoder"])
    same(insulated["action_expert"], plain["action_expert"])
    assert optax.global_norm(plain["decoder"]) > 1.1 * optax.global_norm(without["decoder"])


def _with_padding(flow_case, token):
    model, expert, params, batch, *rest = flow_case
    batch = dataclasses.replace(batch, tokens=batch.tokens.at[1, 5:].set(token))
    return model, expert, params, batch, *rest


def test_padding_changes_nothing_unless_asked(flow_case):
    def error(token, **options):
        case = _with_padding(flow_case, token)
        return flow_loss(*case, FLOW_RANGES, **options)[2]["flow_mse"][0]

    np.testing.assert_allclose(error(1), error(2), rtol=1e-6)
    assert abs(error(1, reference_padding=True) - error(2, reference_padding=True)) > 1e-5


def test_both_parts_get_a_gradient(flow_case):
    model, expert, params, *arrays = flow_case
    loss = lambda p: flow_loss(model, expert, p, *arrays, FLOW_RANGES)[0]  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_target_written_out():
    target = FlowTarget(jnp.full((1, 1, 2), 2.0), jnp.full((1, 1, 2), -1.0), jnp.asarray([0.25]))
    np.testing.assert_allclose(target.noisy[0, 0], [1.25, 1.25])
    np.testing.assert_allclose(target.velocity[0, 0], [-3.0, -3.0])


def test_levels_follow_the_beta_distribution():
    """P(1 - tau <= x) = x ** 1.5, so that tau lies in [0, 1] with mean 0.4."""
    target = FlowTarget.draw(jax.random.key(0), jnp.zeros((4000, 1, 1)))
    tau = np.asarray(target.tau)
    assert tau.min() >= 0 and tau.max() <= 1
    assert abs(tau.mean() - 0.4) < 0.02
    assert abs(np.mean(1 - tau <= 0.5) - 0.5**1.5) < 0.03
    half = FlowTarget.draw(jax.random.key(0), jnp.zeros((4000, 1, 1)), largest=0.5)
    np.testing.assert_allclose(half.tau, tau / 2, rtol=1e-6)
