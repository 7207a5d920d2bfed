import numpy as np
import pytest

from univla_jax.pipeline.packing import join, pack_group

PAD = 99


def pack(lengths, start=0, capacity=10, rows=2):
    return pack_group([*lengths, capacity].__getitem__, start, capacity=capacity, rows=rows)


def test_groups_on_written_cases():
    assert pack([7, 10, 3, 5]) == ([[0, 2], [1]], 3)
    assert pack([7, 10, 3, 5], start=3, rows=1) == ([[3]], 4)
    # first-fit would put 3 beside 6 and end at the 4; longest first all of them fit
    assert pack([6, 3, 7, 4]) == ([[0, 3], [1, 2]], 4)


@pytest.mark.parametrize("seed", range(5))
def test_groups_keep_every_sequence_once_and_no_row_empty(seed):
    lengths = np.random.default_rng(seed).integers(1, 33, 400)
    kept, start = [], 0
    while start < 300:
        rows, end = pack_group(lambda n: int(lengths[n]), start, capacity=32, rows=4)
        assert all(rows) and max(sum(lengths[row]) for row in rows) <= 32
        assert sorted(n for row in rows for n in row) == list(range(start, end))
        kept, start = [*kept, *rows], end
    assert len(kept) < start


def sample(*tokens):
    weight = np.linspace(0, 1, len(tokens), dtype=np.float32)
    return {"tokens": np.array(tokens, np.int32), "loss_weight": weight}


def test_joined_rows_as_drawn():
    rows = join([[sample(5, 6, 7), sample(8, 9)], [sample(4)]], length=7, pad=PAD)
    assert rows["tokens"].tolist() == [[5, 6, 7, 8, 9, PAD, PAD], [4] + 6 * [PAD]]
    assert rows["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
    assert rows["positions"].tolist() == [[0, 1, 2, 0, 1, 0, 0], [0] * 7]
    assert rows["loss_weight"].tolist() == [[0, 0.5, 1, 0, 1, 0, 0], [0] * 7]
    dtypes = {key: array.dtype for key, array in rows.items()}
    assert dtypes.pop("loss_weight") == np.float32 and set(dtypes.values()) == {np.dtype(np.int32)}


def test_actions_of_a_lone_sample_come_along():
    chunk = np.zeros((3, 2), np.float32)
    rows = join([[{**sample(1, 2), "actions": chunk + i}] for i in range(2)], length=4, pad=PAD)
    np.testing.assert_array_equal(rows["actions"], [chunk, chunk + 1])
