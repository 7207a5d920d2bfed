import grain
import numpy as np
import pytest

from univla_jax.sequences.packing import pack, pad_rows

PAD = 99


def rows(lengths):
    """Row i holds the token i at every place, so that its pieces can be found again."""
    made = [
        {
            "tokens": np.full(n, i, np.int32),
            "loss_weight": np.linspace(0, 1, n, dtype=np.float32) + i,
        }
        for i, n in enumerate(lengths)
    ]
    return grain.MapDataset.source(made).to_iter_dataset(grain.ReadOptions(0, 0))


def segments(row):
    """(token, length) of each packed sequence, after checking how it lies in the row."""
    found = []
    ids = row["segment_ids"]
    for number in range(1, ids.max() + 1):
        (places,) = np.nonzero(ids == number)
        assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
        assert np.array_equal(row["positions"][places], np.arange(len(places)))
        (token,) = set(row["tokens"][places].tolist())
        weights = np.linspace(0, 1, len(places), dtype=np.float32) + token
        np.testing.assert_array_equal(row["loss_weight"][places], weights)
        found.append((token, len(places)))
    empty = ids == 0
    assert (row["tokens"][empty] == PAD).all() and not row["loss_weight"][empty].any()
    assert not row["positions"][empty].any()
    assert len(ids) == sum(n for _, n in found) + empty.sum()
    return found


def test_first_fit_on_a_written_case():
    packed = list(pack(rows([7, 10, 3, 5]), length=10, bins=2, pad=PAD, seed=0))
    kept = sorted(tuple(segments(row)) for row in packed)
    assert kept == [((0, 7), (2, 3)), ((1, 10),), ((3, 5),)]


@pytest.mark.parametrize("seed", range(5))
def test_every_sequence_is_kept_whole_and_alone(seed):
    lengths = np.random.default_rng(seed).integers(1, 33, 60)
    packed = list(pack(rows(lengths), length=32, bins=4, pad=PAD, seed=seed))
    kept = [piece for row in packed for piece in segments(row)]
    assert sorted(kept) == list(enumerate(lengths))
    assert len(packed) < len(lengths)


def test_padding_gives_each_sequence_a_row():
    padded = list(pad_rows(rows([4, 10, 1]), length=10, pad=PAD))
    assert [segments(row) for row in padded] == [[(0, 4)], [(1, 10)], [(2, 1)]]
    assert all(row[key].dtype == np.int32 for row in padded for key in ("tokens", "positions"))
