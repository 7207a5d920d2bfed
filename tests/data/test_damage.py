"""Random damage to the files of every reader: named, never a traceback, never a wrong number.

A dataset is damaged in one random place at a time: flipped bits, zeros, a file cut short, nulls,
values of another type. Whatever that does, the pass ends with one line at its beginning or with the
episodes that are left, and every other one is named. Where the format has a checksum, what is left
is what was written.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil

import numpy as np
import pytest

from tests.data import lerobot_files, test_calvin, test_hdf5
from tests.data.episodes import DATASET, make_episode, read_all
from tests.data.test_video import write_video
from tests.data.test_video_folder import CLIPS
from tests.test_io import write_tfrecord
from univla_jax.data.rlds_writer import write_rlds
from univla_jax.errors import UserError
from univla_jax.io import Shard, ShardedRecords

pytest.importorskip("pyarrow")
pytest.importorskip("av")
pytest.importorskip("h5py")

ROUNDS = 50  # of each dataset


def write_array_records(folder):
    episodes = [make_episode(i) for i in range(6)]
    return write_rlds(folder, "blocks", "1.0.0", {"train": episodes}, progress=False)


def write_tfrecords(folder):
    """The same, its shard written again as TFRecord with checksums."""
    folder = write_array_records(folder)
    (shard,) = folder.glob("*.array_record-*")
    records = list(ShardedRecords([Shard(str(shard), 6)]))
    write_tfrecord(str(shard).replace("array_record", "tfrecord"), records)
    shard.unlink()
    for name in ("dataset_info.json", "features.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("array_record", "tfrecord"))
    return folder


def write_calvin(folder):
    test_calvin.write(folder)
    return folder


def write_videos(folder):
    for name in range(6):
        write_video(folder / f"{name}.mp4", range(0, 60, 10))
    (folder / "train.json").write_text(json.dumps({str(n): f"push {n}" for n in range(6)}))
    return folder


# Name -> how it is written, its config, the number of episodes, and the files that have checksums.
CALVIN = dataclasses.replace(test_calvin.CONFIG, min_frames=3)
DATASETS = {
    "array_record": (write_array_records, DATASET, 6, ".array_record"),
    "tfrecord": (write_tfrecords, DATASET, 6, ".tfrecord"),
    "calvin": (write_calvin, CALVIN, 3, ".npz"),
    "hdf5": (lambda folder: test_hdf5.write_act(folder, count=6), test_hdf5.ACT, 6, None),
    "videos": (write_videos, CLIPS, 6, None),
    "lerobot v2.1": (
        lambda folder: lerobot_files.write(folder / "set"),
        lerobot_files.CONFIG,
        4,
        ".parquet",
    ),
    "lerobot v3.0": (
        lambda folder: lerobot_files.write(folder / "set", "v3.0", images=False),
        lerobot_files.CONFIG,
        4,
        ".parquet",
    ),
}


def flip_bits(data, rng):
    for _ in range(rng.choice([1, 1, 3, 20])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def zero(data, rng):
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice([4, 64, 2000]))
    data[start:stop] = bytes(stop - start)


def overwrite(data, rng):
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice([8, 100]))
    data[start:stop] = rng.randbytes(stop - start)


def cut(data, rng):
    del data[rng.randrange(len(data)) :]


def insert(data, rng):
    start = rng.randrange(len(data))
    data[start:start] = rng.randbytes(rng.choice([1, 4, 30]))


def pointer(data, rng):
    data[:] = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


VALUES = (None, "x", -1, 1.5, [], {}, True, "None", 10**12, ["[b'x']"])


def json_value(data, rng):
    """One value of a JSON or JSONL file becomes one of another type."""
    lines = data.decode().splitlines() if b"}\n{" in data else [data.decode()]
    number = rng.randrange(len(lines))
    tree = json.loads(lines[number])
    node = tree
    while True:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.7:
            node = node[key]
            continue
        if rng.random() < 0.3 and isinstance(node, dict):
            del node[key]
        else:
            node[key] = rng.choice(VALUES)
        break
    lines[number] = json.dumps(tree)
    data[:] = "\n".join(lines).encode()


BYTES = (flip_bits, zero, overwrite, cut, insert, pointer)


def damage_parquet(path, rng):
    """A null, or a column of another type."""
    import pyarrow as pa
    from pyarrow import parquet

    table = parquet.read_table(path)
    column = rng.randrange(table.num_columns)
    name, values = table.column_names[column], table.column(column).to_pylist()
    how = rng.choice(["null", "text", "numbers", "drop", "fewer"])
    if how == "drop":
        table = table.drop_columns([name])
    elif how == "fewer":
        table = table.slice(0, max(1, table.num_rows - 1))
    else:
        if how == "null":
            values[rng.randrange(len(values))] = None
        else:
            values = [("x" if how == "text" else 0.5)] * len(values)
        table = table.set_column(column, name, pa.array(values))
    parquet.write_table(table, path)


def damage(folder, rng):
    """Damages one file; returns its path, and whether it was done to bytes, not to values."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # Small files of metadata are hit as often as the many files of data.
    kinds = sorted({path.suffix for path in files})
    kind = rng.choice(kinds)
    path = rng.choice([path for path in files if path.suffix == kind])
    if rng.random() < 0.05:
        path.unlink()
        return path, False
    if path.suffix == ".parquet" and rng.random() < 0.6:
        damage_parquet(path, rng)
        return path, False
    data = bytearray(path.read_bytes())
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.7:
        json_value(data, rng)
    else:
        rng.choice(BYTES)(data, rng)
    path.write_bytes(data)
    return path, True


@pytest.fixture(scope="module", params=DATASETS)
def dataset(request, tmp_path_factory):
    write, config, count, checked = DATASETS[request.param]
    folder = write(tmp_path_factory.mktemp("whole") / "data")
    valid, invalid = read_all(folder, config)
    assert len(valid) == count and not invalid
    return folder, config, valid, checked


def same(left, right):
    return (
        left.instruction == right.instruction
        and np.array_equal(left.actions, right.actions)
        and (left.state is None or np.array_equal(left.state, right.state))
        and all(np.array_equal(left.frames[v], right.frames[v]) for v in right.frames)
    )


@pytest.mark.slow
def test_random_damage_is_named(dataset, tmp_path):
    folder, config, whole, checked = dataset
    outcomes = {"told at the start": 0, "episodes named": 0, "not noticed": 0}
    for seed in range(ROUNDS):
        rng, copy = random.Random(seed), tmp_path / "copy"
        shutil.copytree(folder, copy)
        path, to_bytes = damage(copy, rng)
        where = f"seed {seed}, {path.relative_to(copy)}"
        try:
            valid, invalid = read_all(copy, config)
        except UserError as error:
            assert str(error) and "\n" not in str(error), where
            outcomes["told at the start"] += 1
        else:
            # Ids may move where the file of ids is damaged, but no episode goes missing unsaid.
            lost = len(whole) - len(valid) - len(invalid)
            unlisted = path.suffix in (".json", ".npy") or not path.exists()
            assert lost <= 0 or unlisted, where
            assert all(reason for reason, _ in invalid.values()), where
            outcomes["episodes named" if invalid else "not noticed"] += 1
            if checked and checked in path.name and to_bytes:
                assert all(same(e, whole[i]) for i, e in valid.items()), where
        shutil.rmtree(copy)
    print(outcomes)
    assert outcomes["told at the start"] + outcomes["episodes named"] > ROUNDS / 3
