"""The blind baseline learns what the ego status tells, and is read back."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.errors import UserError
from univla_jax.simulators.navsim import ego_status_mlp
from univla_jax.simulators.navsim.ego_status_mlp import EgoStatusMlp, fit_ego_status


def test_it_learns_and_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(ego_status_mlp, "_STEPS", 250)
    rng = np.random.default_rng(0)
    states = np.concatenate([rng.uniform(0, 10, (400, 1)), np.zeros((400, 7))], axis=1)
    motions = np.zeros((400, 8, 3))
    motions[..., 0] = 0.5 * states[:, :1]
    network = fit_ego_status(states, motions, hidden=16)
    assert np.abs(network(states) - motions).mean() < 0.2
    network.save(tmp_path / "n.npz")
    found = EgoStatusMlp.load(tmp_path / "n.npz")
    np.testing.assert_array_equal(found(states[:3]), network(states[:3]))
    with pytest.raises(UserError, match="is no ego-status network"):
        EgoStatusMlp.load(tmp_path / "other.npz")
