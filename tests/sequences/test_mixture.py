import pickle

import numpy as np
import pytest
from univla_jax.sequences.samples import SampleBuilder

from tests.sequences import small
from univla_jax.errors import UserError
from univla_jax.pipeline.mixture import SampleStream, deal


def stream(counts, shares=None, seed=7, **changes):
    config = small.config(**changes)
    stores = [small.store(n, letter) for n, letter in zip(counts, "abc")]
    builder = SampleBuilder(config, small.assets())
    return SampleStream(stores, shares or counts, builder, seed)


def places(count, *args, **changes):
    made = stream(*args, **changes)
    return [made.place(n) for n in range(count)]


@pytest.mark.parametrize(
    ("shares", "episodes", "cards"),
    [
        ((12, 12), 24, (12, 12)),
        ((3, 1), 8, (6, 2)),
        ((1, 1, 1), 4, (334, 333, 333)),
        ((0.7, 0.3), 10, (7, 3)),
        ((1e-9, 1), 10, (1, 1000)),
    ],
)
def test_decks_hold_every_store_in_proportion(shares, episodes, cards):
    assert deal(shares, episodes) == cards


def test_with_equal_weights_an_epoch_shows_every_episode_once():
    for epoch in range(3):
        drawn = places(20 * (epoch + 1), (12, 8))[20 * epoch :]
        assert sorted(drawn) == sorted(
            [(0, epoch, i) for i in range(12)] + [(1, epoch, i) for i in range(8)]
        )


def test_epochs_and_stores_are_shuffled_each_in_its_own_way():
    drawn = places(60, (10, 10))
    orders = {
        (store, epoch): [i for s, e, i in drawn if (s, e) == (store, epoch)]
        for store in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert len({tuple(order) for order in orders.values()}) == 6
    assert drawn != places(60, (10, 10), seed=8)
    assert drawn == places(60, (10, 10))


def test_weights_set_the_share_of_every_part_of_the_stream():
    drawn = np.array([store for store, _, _ in places(4000, (12, 8), shares=(3.0, 1.0))])
    assert (drawn == 0).mean() == pytest.approx(0.75, abs=1e-3)
    for part in (drawn[:1000], drawn[::2], drawn[1::4]):
        assert (part == 0).mean() == pytest.approx(0.75, abs=0.04)


def test_a_store_seen_more_often_is_seen_evenly():
    drawn = [index for store, _, index in places(1000, (10, 10), shares=(3.0, 1.0)) if store == 0]
    counts = np.bincount(drawn)
    assert len(drawn) == 750 and set(counts) == {75}


def test_a_sample_is_a_function_of_its_number():
    made = stream((12, 8))
    copy = pickle.loads(pickle.dumps(made))
    later = [copy.draft(n).tokens.ids for n in (31, 4)]
    np.testing.assert_array_equal(later[1], made.draft(4).tokens.ids)
    np.testing.assert_array_equal(later[0], made.draft(31).tokens.ids)


def test_windows_differ_between_epochs():
    made = stream((4,))
    starts = [{made.draft(n).shown[0][1] for n in range(4 * e, 4 * e + 4)} for e in range(6)]
    assert len(set(map(frozenset, starts))) > 1


def test_an_empty_store_is_refused():
    with pytest.raises(UserError, match=r"data.stores\[1\]: holds no episode"):
        stream((3, 0), shares=(1.0, 1.0))
