"""Where blocks and zones of the tabletop lie at the start: in cells, or anywhere without overlap.

In the world "cells" things lie in twelve cells, a little off their centers. In the world "free"
they lie anywhere on the table where the expert can reach them, blocks that no instruction names
among them, and some pairs of family and color are kept from demonstrations.

Axes: N blocks, Z zones, C candidate tables.
"""

from __future__ import annotations

import numpy as np

WORLDS = ("cells", "free")
HELD_OUT_PAIRS = (("touch", "red"), ("lift", "yellow"), ("push", "green"), ("place", "blue"))
"""Families and block colors that no demonstration of the world "free" puts together."""
DISTRACTORS = {"cells": 0, "free": 2}
"""World → blocks on its table that no instruction names."""

COLUMNS = (0.0875, 0.3625, 0.6375, 0.9125)  # centers of the cells; rows are alike
BLOCK_CELLS = np.array([(x, y) for y in COLUMNS[1:3] for x in COLUMNS])  # the first row is free
ZONE_CELLS = np.array([(x, COLUMNS[3]) for x in COLUMNS])  # along the far edge
JITTER = 0.01  # how far things lie from the center of their cell, along each axis

BLOCK_AREA = ((0.1, 0.22), (0.9, 0.9))  # in the world "free": corners (x, y)
ZONE_AREA = ((0.13, 0.6), (0.87, 0.87))
BLOCKS_APART = (0.28, 0.14)  # along at least one axis: room behind and ahead of a pushed block
ZONES_APART, ZONE_BLOCK_APART = 0.24, 0.2
_CANDIDATES = 256  # tables drawn at once; one in about four hundred is taken


def positions(
    world: str, rng: np.random.Generator, blocks: int, zones: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions float64 [N, 2] of blocks and [Z, 2] of zones, in table units.

    Args:
      world: one of ``WORLDS``.
      rng: source of randomness.
      blocks: their number N, distractors included.
      zones: their number Z.
    """
    if world == "cells":
        return _spots(rng, BLOCK_CELLS)[:blocks], _spots(rng, ZONE_CELLS)[:zones]
    while True:  # whole tables are drawn anew, so that no arrangement is preferred
        candidates = rng.uniform(*BLOCK_AREA, (_CANDIDATES, blocks, 2))
        zone_candidates = rng.uniform(*ZONE_AREA, (_CANDIDATES, zones, 2))
        fitting = np.flatnonzero(_lie_apart(candidates, zone_candidates))
        if len(fitting):
            return candidates[fitting[0]], zone_candidates[fitting[0]]


def _spots(rng: np.random.Generator, cells: np.ndarray) -> np.ndarray:
    """The cells' centers in random order, a little off, float64 [N, 2]."""
    return rng.permutation(cells) + rng.uniform(-JITTER, JITTER, cells.shape)


def _lie_apart(blocks: np.ndarray, zones: np.ndarray) -> np.ndarray:
    """Where nothing overlaps and every block can be pushed, bool [C].

    Args:
      blocks: float64 [C, N, 2].
      zones: float64 [C, Z, 2].
    """
    first, second = np.triu_indices(blocks.shape[1], 1)
    offsets = np.abs(blocks[:, first] - blocks[:, second]) / BLOCKS_APART
    apart = (offsets.max(-1) >= 1).all(-1)
    first, second = np.triu_indices(zones.shape[1], 1)
    offsets = np.linalg.norm(zones[:, first] - zones[:, second], axis=-1)
    apart &= (offsets >= ZONES_APART).all(-1)
    offsets = np.linalg.norm(zones[:, :, None] - blocks[:, None], axis=-1)
    return apart & (offsets >= ZONE_BLOCK_APART).all((-1, -2))
