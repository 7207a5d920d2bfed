"""Where things lie: apart, on the table, and in the free world nowhere in particular."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.simulators.tabletop import tabletop_layout
from univla_jax.simulators.tabletop.tabletop_layout import WORLDS, positions


@pytest.mark.parametrize("world", WORLDS)
def test_things_lie_apart_on_the_table(world):
    for seed in range(20):
        blocks, zones = positions(world, np.random.default_rng(seed), 5, 2)
        things = np.concatenate([blocks, zones])
        assert blocks.shape == (5, 2) and zones.shape == (2, 2)
        assert things.min() > 0.05 and things.max() < 0.95
        distance = np.linalg.norm(things[:, None] - things, axis=-1) + np.eye(len(things))
        assert distance.min() > 0.13


def test_the_free_world_is_no_grid():
    drawn = [positions("free", np.random.default_rng(seed), 5, 2) for seed in range(60)]
    for things in (np.concatenate([blocks for blocks, _ in drawn]), drawn[0][0]):
        assert len(np.unique(np.round(things, 6), axis=0)) == len(things)
    blocks = np.concatenate([blocks for blocks, _ in drawn])
    cells = np.linalg.norm(blocks[:, None] - tabletop_layout.BLOCK_CELLS, axis=-1).min(1)
    assert np.mean(cells > 0.05) > 0.7
