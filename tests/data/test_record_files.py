"""Records of both formats: order, ranges, sharing, and every way a shard can be broken."""

from __future__ import annotations

import os
import pickle
import struct

import pytest
from array_record.python import array_record_module

from univla_jax.data import record_files as module
from univla_jax.data.record_files import Shard, ShardedRecords
from univla_jax.errors import UserError


def contents(count, start=0):
    return [bytes([i]) * (2000 + i) for i in range(start, start + count)]


def write_array_record(path, items):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for item in items:
        writer.write(item)
    writer.close()
    return str(path)


def write_tfrecord(path, items):
    with open(path, "wb") as file:
        for item in items:
            file.write(struct.pack("<QI", len(item), 0) + item + b"\0\0\0\0")
    return str(path)


WRITERS = {"x.array_record-0": write_array_record, "x.tfrecord-0": write_tfrecord}


@pytest.fixture(params=WRITERS)
def path(request, tmp_path):
    return WRITERS[request.param](tmp_path / request.param, contents(5))


def test_shards_are_one_sequence(tmp_path):
    a = write_array_record(tmp_path / "a", contents(3))
    b = write_tfrecord(tmp_path / "b.tfrecord", contents(4, start=3))
    records = ShardedRecords([Shard(a, 3), Shard(b, 4, skip=1, take=2)])
    expected = [*contents(3), *contents(2, start=4)]
    assert len(records) == 5
    assert list(records) == expected
    assert records[-1] == expected[-1]
    assert list(pickle.loads(pickle.dumps(records))) == expected
    with pytest.raises(IndexError):
        records[5]
    assert len(ShardedRecords([])) == 0


def test_a_truncated_shard_is_an_error(path):
    with open(path, "rb") as file:
        whole = file.read()
    for end in (0, len(whole) // 2, len(whole) - 1):
        with open(path, "wb") as file:
            file.write(whole[:end])
        with pytest.raises(UserError, match="readable records, expected 5"):
            ShardedRecords([Shard(path, 5)]).check()


def test_another_number_of_records_is_an_error(path):
    with pytest.raises(UserError, match="holds 5 readable records, expected 4"):
        ShardedRecords([Shard(path, 4)])[0]


def test_a_missing_shard_is_an_error(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        ShardedRecords([Shard(str(tmp_path / "none"), 4)]).check()


def test_a_flipped_bit_is_an_error(tmp_path):
    path = tmp_path / "a"
    write_array_record(path, contents(5))
    data = bytearray(path.read_bytes())
    place = data.index(contents(1, start=2)[0][:50])
    data[place] ^= 1
    path.write_bytes(data)
    records = ShardedRecords([Shard(str(path), 5)])
    assert records[1] == contents(2)[1]
    with pytest.raises(UserError, match="record 2 is damaged"):
        records[2]


def test_only_the_last_used_shards_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MAX_OPEN_FILES", 3)
    monkeypatch.setattr(module, "_open_shards", module._OpenShards())
    items = contents(20)
    paths = [write_array_record(tmp_path / f"{n}", items[n : n + 1]) for n in range(20)]
    stores = [
        ShardedRecords([Shard(p, 1) for p in paths[:10]]),
        ShardedRecords([Shard(p, 1) for p in paths[10:]]),
    ]
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [record for pair in zip(*stores) for record in pair] == [
            items[n] for pair in zip(range(10), range(10, 20)) for n in pair
        ]
        assert len(os.listdir("/proc/self/fd")) == before + 3
    del stores
    assert len(os.listdir("/proc/self/fd")) == before
