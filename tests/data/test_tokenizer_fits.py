"""Windows of actions."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.data.tokenizer_fitting import sliding_windows
from univla_jax.errors import UserError


def test_windows_stay_inside_their_episode():
    episodes = [np.arange(4)[:, None], np.array([[9]]), np.array([[7], [8]])]
    assert sliding_windows(episodes, 2)[..., 0].tolist() == [[0, 1], [1, 2], [2, 3], [7, 8]]
    two = np.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(sliding_windows([two], 2), [two[:2], two[1:]])
    with pytest.raises(UserError, match="chunks of 5 steps wanted, the longest episode has 4"):
        sliding_windows(episodes, 5)
