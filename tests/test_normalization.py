"""Action statistics and normalization: parity (group 8), properties, mistakes; windows."""

from __future__ import annotations

import json

import hypothesis
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest

from tests.parity import assert_parity
from univla_jax import normalization
from univla_jax.errors import UserError


def test_statistics_match_the_reference(golden_dir):
    assert_parity(golden_dir, "normalize")


def test_statistics_survive_json():
    statistics = normalization.ActionStatistics((0.0, 1.0), (1.0, 2.0), (-1.0, 0.5), (1.0, 0.5), 7)
    again = normalization.ActionStatistics.from_dict(json.loads(json.dumps(statistics.to_dict())))
    assert again == statistics


BATCHES = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=30),
    elements={"min_value": -100, "max_value": 100},
)


@hypothesis.given(BATCHES, hypothesis.strategies.integers(1, 7))
@hypothesis.settings(max_examples=25, deadline=None)
def test_streaming_ignores_the_cut_into_batches(rows, size):
    streamed = normalization.stream_statistics(
        lambda: (rows[i : i + size] for i in range(0, len(rows), size))
    )
    whole = normalization.stream_statistics(lambda: [rows])
    np.testing.assert_allclose(streamed.mean, rows.mean(0), atol=1e-9)
    np.testing.assert_allclose(streamed.std, rows.std(0), atol=1e-5)
    assert (streamed.q01, streamed.q99) == (whole.q01, whole.q99)


@hypothesis.given(BATCHES)
@hypothesis.settings(max_examples=25, deadline=None)
def test_normalizing_is_bounded_and_undone_between_the_quantiles(rows):
    statistics = normalization.stream_statistics(lambda: [rows])
    normalized = statistics.normalize(rows)
    assert np.abs(normalized).max() <= 1
    low, high = np.asarray(statistics.q01), np.asarray(statistics.q99)
    np.testing.assert_allclose(
        statistics.unnormalize(normalized), np.clip(rows, low, high), atol=1e-4
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q99": (1.0,)}, "different lengths"),
        ({"std": (float("nan"), 1.0)}, "not finite"),
        ({"q01": (3.0, 0.0)}, "exceeds"),
    ],
)
def test_invalid_statistics_are_refused(change, message):
    rows = {"mean": (0.0, 0.0), "std": (1.0, 1.0), "q01": (-1.0, -1.0), "q99": (1.0, 1.0)}
    with pytest.raises(UserError, match=message):
        normalization.ActionStatistics(**{**rows, **change})


def rare(steps=1000):
    """Dimensions of noise, of a gripper used in 0.5 % of the steps, of nothing and of a switch."""
    rng = np.random.default_rng(0)
    actions = np.zeros((steps, 4))
    actions[:, 0] = rng.normal(size=steps)
    actions[rng.permutation(steps)[: steps // 200], 1] = 1
    actions[:, 3] = rng.integers(0, 2, steps)
    return actions


def test_a_dimension_that_hardly_ever_moves_keeps_its_range():
    actions = rare()
    found = normalization.stream_statistics(lambda: [actions])
    assert found.kinds == ("quantiles", "min_max", "quantiles", "quantiles")
    back = found.unnormalize(found.normalize(actions))
    np.testing.assert_allclose(back[:, 1], actions[:, 1], atol=1e-6)
    np.testing.assert_allclose(back[:, [2, 3]], actions[:, [2, 3]], atol=1e-3)
    assert np.quantile(np.abs(back[:, 0] - actions[:, 0]), 0.97) < 1e-3


def test_the_kind_of_a_dimension_can_be_chosen():
    actions = rare()
    kinds = ("min_max", "identity", "quantiles", "identity")
    found = normalization.stream_statistics(lambda: [actions], kinds)
    assert found.kinds == kinds and normalization.ActionStatistics.from_dict(found.to_dict()) == (
        found
    )
    normalized = found.normalize(actions)
    assert normalized[:, 0].min() == -1 and normalized[:, 0].max() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(normalized[:, [1, 3]], actions[:, [1, 3]], atol=1e-6)
    np.testing.assert_allclose(found.unnormalize(normalized), actions, atol=1e-3)
    with pytest.raises(UserError, match="3 normalizations for 4 dimensions"):
        normalization.stream_statistics(lambda: [actions], kinds[:3])
    with pytest.raises(UserError, match="'mean' is not one of quantiles, min_max, identity"):
        normalization.stream_statistics(lambda: [actions], ("mean",) * 4)


def test_quantiles_alone_are_saved_as_ever():
    found = normalization.stream_statistics(lambda: [rare()[:, [0, 2, 3]]])
    assert set(found.to_dict()) == {"mean", "std", "q01", "q99", "count"}


def test_wrong_batches_are_refused():
    running = normalization.RunningStatistics(np.zeros(3), np.ones(3))
    running.update(np.zeros((1, 3)))
    with pytest.raises(UserError, match="at least 2"):
        running.statistics()
    with pytest.raises(UserError, match=r"expected \[N, 3\]"):
        running.update(np.zeros((1, 2)))
    with pytest.raises(UserError, match="not finite"):
        running.update(np.full((1, 3), np.nan))
    with pytest.raises(UserError, match="beyond"):
        running.update(np.full((2, 3), 2.0))
    with pytest.raises(UserError, match="at least 2"):
        normalization.stream_statistics(list)
    with pytest.raises(UserError, match="2 dimensions"):
        normalization.ActionStatistics((0, 0), (1, 1), (0, 0), (1, 1)).normalize(np.zeros((4, 3)))


def test_windows_stay_inside_their_episode():
    episodes = [np.arange(4)[:, None], np.array([[9]]), np.array([[7], [8]])]
    assert normalization.sliding_windows(episodes, 2)[..., 0].tolist() == [
        [0, 1],
        [1, 2],
        [2, 3],
        [7, 8],
    ]
    for most in (1, 2, 3, 4):
        spread = normalization.sliding_windows(episodes, 2, most=most)[..., 0].tolist()
        assert spread == [[0, 1], [1, 2], [2, 3], [7, 8]][:: -(-4 // most)]
    two = np.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(normalization.sliding_windows([two], 2), [two[:2], two[1:]])
    with pytest.raises(UserError, match="chunks of 5 steps wanted, the longest episode has 4"):
        normalization.sliding_windows(episodes, 5)
