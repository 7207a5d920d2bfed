"""Files and folders that appear whole or not at all, and lines that survive a kill."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import pathlib
import pickle
import struct
from typing import Any

import google_crc32c
import numpy as np
import pytest
from array_record.python import array_record_module

from univla_jax import io
from univla_jax.errors import UserError
from univla_jax.io import JsonlWriter, Shard, ShardedRecords


@dataclasses.dataclass(frozen=True)
class _Inner:
    sizes: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class _Outer:
    inner: _Inner = _Inner()
    rate: Any = 0.5


def test_a_file_is_replaced_whole(tmp_path):
    io.write_json(tmp_path / "a.json", {"b": 1, "a": "grün"})
    assert (tmp_path / "a.json").read_text("utf-8") == '{\n  "a": "grün",\n  "b": 1\n}\n'
    io.write_json(tmp_path / "a.json", {"b": 2})
    assert io.read_json(tmp_path / "a.json") == {"b": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no file"), (b"{", "not valid JSON"), (b"[1]", "holds a JSON list, expected an obj")],
)
def test_what_is_no_json_object_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        io.read_json(tmp_path / "a.json")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), io.new_folder(tmp_path / "a" / "b") as partial:
        (partial / "file").write_text("half")
        raise RuntimeError
    assert list((tmp_path / "a").iterdir()) == []
    (tmp_path / "a" / "b").mkdir()
    for left_by_a_kill in (False, True):
        if left_by_a_kill:
            (tmp_path / "a" / "b").rename(tmp_path / "a" / ".b.partial")
        with io.new_folder(tmp_path / "a" / "b") as partial:
            assert list(partial.iterdir()) == []
            (partial / "file").write_text("whole")
        assert io.hash_files(tmp_path) == {"a/b/file": io.sha256(tmp_path / "a" / "b" / "file")}


def test_what_killed_processes_left_is_removed(tmp_path):
    (tmp_path / "a").mkdir()
    io.partial_path(tmp_path / "a" / "x").touch()
    (tmp_path / "a" / "y").touch()
    io.remove_partial(tmp_path)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["y"]


def test_dataclasses_become_json_values():
    values = {"inner": {"sizes": [1, 2]}, "rate": 0.5}
    assert io.json_values(_Outer(rate=np.float32(0.5))) == values
    assert json.loads(io.dump_json(io.json_values(_Outer(rate=np.float32(0.5))))) == values


def test_lines_come_back(tmp_path):
    with JsonlWriter(tmp_path / "lines.jsonl") as journal:
        journal.append({"a": 1, "word": "grün"})
        assert (tmp_path / "lines.jsonl").read_text("utf-8") == '{"a": 1, "word": "grün"}\n'
    with JsonlWriter(tmp_path / "lines.jsonl") as journal:
        journal.append({"a": 2})
    with JsonlWriter(tmp_path / "lines.jsonl") as journal:
        assert [line["a"] for line in journal.lines] == [1, 2]


@pytest.mark.parametrize("torn", ['{"a"', '{"a": 3}'])
def test_a_line_cut_short_is_dropped(tmp_path, torn):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n' + torn)
    with JsonlWriter(path) as journal:
        assert journal.lines == [{"a": 1}]
        journal.append({"a": 2})
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'


@pytest.mark.parametrize("damage", ["not json\n", "[1]\n"])
def test_damage_inside_is_named(tmp_path, damage):
    (tmp_path / "lines.jsonl").write_text('{"a": 1}\n' + damage + '{"a": 2}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        JsonlWriter(tmp_path / "lines.jsonl")


# ----------------------------------------------------------------------------
# Records of both formats: order, ranges, sharing, and every way a shard can be broken.


def contents(count, start=0):
    return [bytes([i]) * (2000 + i) for i in range(start, start + count)]


def write_array_record(path, items):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for item in items:
        writer.write(item)
    writer.close()
    return str(path)


def masked(data):
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def write_tfrecord(path, items, checksum=masked):
    with open(path, "wb") as file:
        for item in items:
            length = struct.pack("<Q", len(item))
            file.write(length + checksum(length) + item + checksum(item))
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


def flip(data, place):
    data[place] ^= 1


def in_record(data, offset):
    return data.index(contents(1, start=2)[0][:50]) + offset


DAMAGES = {
    "a bit of the record": lambda data: flip(data, in_record(data, 7)),
    "its last byte": lambda data: flip(data, in_record(data, 2001)),
    "zeros": lambda data: data.__setitem__(
        slice(in_record(data, 0), in_record(data, 900)), b"\0" * 900
    ),
    "random bytes": lambda data: data.__setitem__(
        slice(in_record(data, 90), in_record(data, 100)), b"0123456789"
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_an_error_and_the_others_are_read(path, damage):
    with open(path, "rb+") as file:
        data = bytearray(file.read())
        DAMAGES[damage](data)
        file.seek(0)
        file.write(data)
    records = ShardedRecords([Shard(path, 5)])
    assert [records[i] for i in (0, 1, 3, 4)] == [contents(5)[i] for i in (0, 1, 3, 4)]
    with pytest.raises(UserError, match="record 2 is damaged"):
        records[2]


def test_the_checksums_of_tfrecord_are_compared(tmp_path):
    path = tmp_path / "a.tfrecord"
    whole = bytearray(pathlib.Path(write_tfrecord(path, contents(3))).read_bytes())
    start = 12 + 2000 + 4  # of the second record
    for place, message in ((start + 12 + 2001, "record 1 is damaged"), (start, "holds 1 readable")):
        damaged = bytearray(whole)
        flip(damaged, place)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            ShardedRecords([Shard(str(path), 3)])[1]
    # Zeros over the end of a record and its checksum are damage; zeros in the place of every
    # checksum come from a writer that has none.
    whole[start + 12 + 1000 : start + 12 + 2001 + 4] = b"\0" * 1005
    path.write_bytes(whole)
    with pytest.raises(UserError, match="record 1 is damaged"):
        ShardedRecords([Shard(str(path), 3)])[1]
    write_tfrecord(path, contents(3), checksum=lambda _: b"\0\0\0\0")
    assert list(ShardedRecords([Shard(str(path), 3)])) == contents(3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (gzip.compress(b"x" * 9000, mtime=0), "compressed with gzip"),
        (b"<!DOCTYPE html><title>Sign in</title>", "a web page"),
        (b"", "it is empty"),
        (b"\0" * 5000, "nothing but zeros"),
    ],
)
def test_what_lies_in_the_place_of_a_shard_is_said(path, content, message):
    pathlib.Path(path).write_bytes(content)
    with pytest.raises(UserError, match=f"0 readable records, expected 5 .*{message}"):
        ShardedRecords([Shard(path, 5)]).check()


def test_only_the_last_used_shards_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "_MAX_OPEN_FILES", 3)
    monkeypatch.setattr(io, "_open_shards", io._OpenShards())
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
