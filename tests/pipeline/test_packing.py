"""First-fit groups, and elements that lose and repeat nothing."""

from __future__ import annotations

import collections
import pickle

import numpy as np
import pytest

from tests.pipeline import small
from univla_jax.pipeline.dataset import training_stream
from univla_jax.pipeline.packing import POSITION, PackedSource, pack_group


def group(lengths, start=0, capacity=10, bins=2):
    return pack_group([*lengths, capacity].__getitem__, start, capacity=capacity, bins=bins)


def test_groups_on_cases_worked_out_by_hand():
    assert group([7, 10, 3, 5]) == ([[0, 2], [1]], 3)
    assert group([7, 10, 3, 5], start=3, bins=1) == ([[3]], 4)
    # first-fit would put 3 beside 6 and end at the 4; longest first all of them fit
    assert group([6, 3, 7, 4]) == ([[0, 3], [1, 2]], 4)


@pytest.mark.parametrize("seed", range(5))
def test_groups_keep_every_sequence_once_and_no_bin_empty(seed):
    lengths = np.random.default_rng(seed).integers(1, 33, 400)
    kept, start = [], 0
    while start < 300:
        bins, end = pack_group(lambda n: int(lengths[n]), start, capacity=32, bins=4)
        assert all(bins) and max(sum(lengths[bin_]) for bin_ in bins) <= 32
        assert sorted(n for bin_ in bins for n in bin_) == list(range(start, end))
        kept, start = [*kept, *bins], end
    assert len(kept) < start


def source(elements=range(2), parts=1, **changes):
    config, assets = small.config(**changes), small.assets()
    stream = training_stream(config, assets, [small.store(40)])
    return PackedSource(config, stream, elements, assets.vocabulary.pad, parts=parts)


def segments(items):
    """The bytes of every sample, and how often it occurs."""
    found = collections.Counter()
    for item in items:
        for tokens, ids in zip(item["tokens"], item["segment_ids"]):
            found.update(tokens[ids == n].tobytes() for n in range(1, ids.max() + 1))
    return found


def test_packed_elements_lose_and_repeat_nothing():
    packed, padded = source(), source(packing=False)
    in_elements = segments(packed[i] for i in range(20))
    assert sum(in_elements.values()) > 40
    assert in_elements <= segments(padded[i] for i in range(120))


def test_batches_may_be_asked_for_in_any_order():
    ordered, shuffled = source(), source()
    wanted = [ordered[i] for i in range(12)]
    for i in (3, 0, 11, 7, 1, 9):
        for key, array in shuffled[i].items():
            np.testing.assert_array_equal(array, wanted[i][key])


@pytest.mark.parametrize("packing", [True, False])
def test_parts_of_a_batch_are_its_elements_in_order(packing):
    whole = source(range(4), packing=packing, batch_size=4)
    parts = source(range(4), parts=2, packing=packing, batch_size=4)
    for step in range(5):
        for key, array in whole[step].items():
            halves = [parts[2 * step + i][key] for i in range(2)]
            np.testing.assert_array_equal(np.concatenate(halves), array)


def test_a_copy_for_a_worker_gives_the_same():
    original = source()
    copy = pickle.loads(pickle.dumps(original))
    for step in range(3):
        item = original[step]
        assert item[POSITION].shape == (2,)
        for key, array in copy[step].items():
            np.testing.assert_array_equal(array, item[key])
