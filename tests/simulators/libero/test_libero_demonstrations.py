"""Which demonstrations of LIBERO can be written."""

from __future__ import annotations

import pytest

from univla_jax.errors import UserError
from univla_jax.simulators.libero.libero_demonstrations import DemonstrationsConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": (2,)}, "config.tasks: .2,., libero_goal has scripts for 0, 1"),
        ({"suite": "libero_90"}, "libero_90 has scripts for none"),
        ({"val_episodes": 0}, "val_episodes 0 and draw_every 1 must be at least 1"),
        ({"displacement": -0.1}, "displacement -0.1 at least 0"),
        ({"draw_every": 0}, "draw_every 0 must be at least 1"),
        ({"disturbance": 1.5}, "disturbance 1.5 in 0...1"),
    ],
)
def test_mistakes_are_named(changes, message):
    values = {"suite": "libero_goal", "tasks": (7,), "train_episodes": 1, "val_episodes": 1}
    with pytest.raises(UserError, match=message):
        DemonstrationsConfig(**values | changes)
