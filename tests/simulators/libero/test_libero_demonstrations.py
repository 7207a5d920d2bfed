"""Which demonstrations of LIBERO can be written."""

from __future__ import annotations

import types

import pytest

from univla_jax.errors import UserError
from univla_jax.simulators.libero.libero_benchmark import INITIAL_STATES
from univla_jax.simulators.libero.libero_demonstrations import (
    FIRST_STATE,
    DemonstrationsConfig,
    initial_state,
    write_demonstrations,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": (2,)}, "config.tasks: .2,., libero_goal has scripts for 0, 1"),
        ({"suite": "libero_90"}, "libero_90 has scripts for none"),
        ({"val_episodes": 0}, "val_episodes 0, draw_every 10 and policy_chunks 12 must"),
        ({"displacement": -0.1}, "displacement -0.1 at least 0"),
        ({"draw_every": 0}, "draw_every 0 and policy_chunks 12 must be at least 1"),
        ({"policy_chunks": 0}, "policy_chunks 0 must be at least 1"),
        ({"disturbance": 1.5}, "disturbance 1.5 and slips 0.0 in 0...1"),
        ({"slips": -0.1}, "slips -0.1 in 0...1"),
    ],
)
def test_mistakes_are_named(changes, message):
    values = {"suite": "libero_goal", "tasks": (7,), "train_episodes": 1, "val_episodes": 1}
    with pytest.raises(UserError, match=message):
        DemonstrationsConfig(**values | changes)


def test_a_policy_of_other_chunks_is_named_before_libero_is_opened(tmp_path):
    config = DemonstrationsConfig("libero_goal", (7,), 1, 1, policy="POLICY")
    policy = types.SimpleNamespace(chunk_size=5)
    with pytest.raises(UserError, match=r"draw_every: 10, but POLICY has chunks of 5 steps"):
        write_demonstrations(config, tmp_path, load_policy=lambda folder: policy)


@pytest.mark.parametrize("episodes", [1, 4, 26, 36, 100])
def test_splits_begin_from_states_of_their_own(episodes):
    """None that is scored, none in both splits, and all of a split's before one comes again."""
    begun = {
        s: [initial_state(s, n, episodes) for n in range(3 * episodes)] for s in ("train", "val")
    }
    used = {split: set(states) for split, states in begun.items()}
    assert not used["train"] & used["val"]
    assert all(FIRST_STATE <= state < INITIAL_STATES for state in used["train"] | used["val"])
    for split, states in begun.items():
        first = states[:episodes]
        assert len(set(first)) == min(episodes, len(used[split])) and first == sorted(first)
