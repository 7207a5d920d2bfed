"""Buckets, on a GCS server on loopback: files, logs, stores, checkpoints; a network at fault."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
from io import BytesIO

import fsspec
import jax
import numpy as np
import pytest

from tests import bucket_server
from tests.training import tiny_run, toy
from univla_jax import buckets, cli, io, run_dir
from univla_jax.checkpoints import CheckpointConfig, Checkpointer, find_checkpoint, load_params
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.readers import open_reader
from univla_jax.data.token_store import TokenStore
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.evaluation.worker import Recorder
from univla_jax.training.metrics import METRICS_FILE, MetricsLogger

pytest.importorskip("gcsfs", reason="needs the extra [gcs]")


@pytest.fixture(scope="module")
def server():
    """The port of a server with an empty bucket ``bucket``."""
    with bucket_server.running_server() as port:
        yield port


@pytest.fixture
def proxy(server, monkeypatch, tmp_path):
    """A proxy before the server, which all clients of this process go through."""
    with bucket_server.Proxy(server) as between:
        _connect(monkeypatch, between.port, tmp_path)
        yield between
        _forget()


@pytest.fixture
def bucket(server, monkeypatch, tmp_path, request):
    """A folder of its own in the bucket."""
    _connect(monkeypatch, server, tmp_path)
    yield io.absolute_path(f"gs://bucket/{request.node.name.replace('[', '_').strip(']')}")
    _forget()


def _connect(monkeypatch, port, folder):
    for name, value in bucket_server.environment(port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("UNIVLA_CACHE", str(folder / "cache"))
    _forget()


def _forget():
    """Clients keep the address they were made with."""
    from etils.epath import backend

    buckets.filesystem.cache_clear()
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    fsspec.get_filesystem_class("gcs").clear_instance_cache()


def test_files_and_folders(bucket):
    with io.new_folder(bucket / "made") as folder:
        (folder / "inner").mkdir()
        io.write_text(folder / "inner" / "a.txt", "a")
        io.write_json(folder / "done.json", {"b": 1})
    assert io.read_json(bucket / "made" / "done.json") == {"b": 1}
    assert sorted(io.hash_files(bucket / "made")) == ["done.json", "inner/a.txt"]
    with io.new_file(bucket / "made" / "c.bin") as file:
        file.write_bytes(b"123")
    sizes = {"done.json": len(io.dump_json({"b": 1})), "c.bin": 3}
    assert buckets.file_sizes(bucket / "made") == sizes
    copy = buckets.local_file(bucket / "made" / "c.bin")
    assert pathlib.Path(copy).read_bytes() == b"123"
    assert buckets.local_file(bucket / "made" / "c.bin") == copy
    io.write_bytes(bucket / "made" / "c.bin", b"456")
    assert pathlib.Path(buckets.local_file(bucket / "made" / "c.bin")).read_bytes() == b"456"


def test_one_of_many_processes_begins_a_folder(bucket):
    configs = [{"rate": number} for number in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        accepted = list(pool.map(lambda config: _begin(bucket, config), configs))
    first = io.read_json(bucket / run_dir.CONFIG_FILE)
    assert accepted == [config == first for config in configs]


def _begin(folder, config):
    try:
        run_dir.write_config(folder, config)
    except UserError:
        return False
    return True


def test_the_cache_drops_what_was_used_least(bucket, monkeypatch):
    monkeypatch.setenv("UNIVLA_CACHE_GB", "3e-6")
    for name in "abc":
        io.write_bytes(bucket / name, name.encode() * 1000)
    copies = {name: buckets.local_file(bucket / name) for name in "abc"}
    os.utime(copies["b"], (1, 1))
    io.write_bytes(bucket / "d", b"d" * 1000)
    buckets.local_file(bucket / "d")
    left = [name for name, copy in copies.items() if os.path.exists(copy)]
    assert left == ["a", "c"]
    io.write_bytes(bucket / "e", b"e" * 4000)
    with pytest.raises(UserError, match="set UNIVLA_CACHE and UNIVLA_CACHE_GB"):
        buckets.local_file(bucket / "e")


def test_logs_are_uploaded_as_a_whole(bucket, monkeypatch):
    monkeypatch.setattr(buckets, "_REWRITE_SECONDS", 1000.0)
    with io.JsonlWriter(bucket / "log.jsonl") as log:
        log.append({"a": 1})
        assert not (bucket / "log.jsonl").exists()
    with io.JsonlWriter(bucket / "log.jsonl") as log:
        assert log.lines == [{"a": 1}]
        log.append({"a": 2})
    assert io.read_jsonl(bucket / "log.jsonl") == [{"a": 1}, {"a": 2}]


def test_metrics_are_durable_before_the_checkpoint(bucket):
    with MetricsLogger(bucket, start_step=0, total_steps=3, progress=False) as logger:
        for step in range(2):
            logger.step(step, {"loss": 1.0})
        logger.sync()
        assert [line["step"] for line in io.read_jsonl(bucket / METRICS_FILE)] == [0, 1]
    with MetricsLogger(bucket, start_step=1, total_steps=3, progress=False) as logger:
        logger.step(1, {"loss": 2.0})
    lines = io.read_jsonl(bucket / METRICS_FILE)
    assert [(line["step"], line["loss"]) for line in lines] == [(0, 1.0), (1, 2.0)]


def _save(folder, steps):
    state = toy.create()
    with Checkpointer(folder, CheckpointConfig()) as saver:
        for step in steps:
            batches = toy.Batches()
            batches.position = step
            state = type(state)(jax.numpy.int32(step), state.params, state.opt_state)
            saver.save(step, state, batches)
    return state


def _restore(folder, batches=None):
    with Checkpointer(folder, CheckpointConfig()) as saver:
        return saver.restore(toy.template(toy.create()), batches)


@pytest.mark.slow
def test_checkpoints(bucket):
    saved = _save(bucket, [1, 2])
    batches = toy.Batches()
    jax.tree.map(np.testing.assert_array_equal, _restore(bucket, batches), saved)
    assert batches.position == 2
    newest = find_checkpoint(bucket)
    params = load_params(newest, toy.template(saved.params))
    np.testing.assert_array_equal(params["w"], saved.params["w"])
    # A save that a kill cut short lacks the object that Orbax writes last.
    (newest / "commit_success.txt").unlink()
    assert find_checkpoint(bucket).name == "1"
    assert int(_restore(bucket).step) == 1


@pytest.mark.slow
def test_a_damaged_checkpoint_in_a_bucket(bucket, caplog):
    _save(bucket, [1, 2])
    (bucket / "checkpoints" / "2" / "state" / "manifest.ocdbt").write_bytes(b"")
    assert int(_restore(bucket).step) == 1
    assert "checkpoints/2 is damaged" in caplog.text
    _save(bucket, [2])
    assert int(_restore(bucket).step) == 2


@pytest.mark.slow
def test_token_stores_and_assets(bucket, tmp_path):
    world = tiny_run.make_world(tmp_path / "world")
    fingerprint = TokenStore(world / "store").manifest.header.vision_fingerprint
    tiny_run.make_store(bucket / "store", fingerprint)
    here, there = TokenStore(world / "store"), TokenStore(bucket / "store")
    assert there.fingerprint == here.fingerprint
    for number in range(len(here)):
        np.testing.assert_array_equal(there[number].actions, here[number].actions)
    there.verify()
    (bucket / "store" / "shards" / "00000.array_record").unlink()
    with pytest.raises(UserError, match="is missing"):
        TokenStore(bucket / "store")


@pytest.mark.slow
def test_recorded_episodes(bucket):
    recorder = Recorder(bucket / "recorded" / "policy_0_0")
    for level in (0, 1):
        recorder.observe(Observation("go", {"image": np.full((2, 2, 3), level, np.uint8)}))
        if not level:
            recorder.act(np.ones(7))
    recorder.finish(True)
    [path] = (bucket / "recorded").glob("*.npz")
    with np.load(BytesIO(path.read_bytes())) as episode:
        assert episode["frames/image"].shape == (2, 2, 2, 3) and episode["success"]


def test_what_cannot_be_reached_is_said(proxy):
    with pytest.raises(UserError, match="there is no bucket 'other'"):
        buckets.check_access("gs://other/run")
    with pytest.raises(UserError, match="expected a local path or gs://"):
        buckets.check_access("s3://bucket/run")
    buckets.check_access("gs://bucket/run")
    proxy.denied = True
    with pytest.raises(UserError, match=r"'bucket' cannot be read .*log in with `gcloud auth"):
        buckets.check_access("gs://bucket/run")


def test_commands_look_at_every_bucket_before_they_work(proxy):
    """Whether a flag names it or the config, which names a bucket once for many folders."""
    config = {"data": {"stores": ("gs://bucket/a", "gs://bucket/b"), "seed": 3}}
    named = cli._bucket_paths({"workdir": "/tmp/run", "config": config, "out": "gs://other/x"})
    assert sorted(named) == ["gs://bucket/b", "gs://other/x"]
    with pytest.raises(UserError, match="there is no bucket 'other'"):
        for path in named:
            buckets.check_access(path)


def test_what_cannot_be_in_a_bucket_says_so():
    with pytest.raises(UserError, match="a dataset of the format 'calvin' must be a local folder"):
        open_reader("gs://bucket/calvin", find_dataset_config("calvin"), "train")


@pytest.mark.slow
def test_a_busy_server_is_asked_again(proxy):
    proxy.fail_every = 3
    folder = io.absolute_path("gs://bucket/busy")
    for number in range(4):
        io.write_text(folder / f"{number}.txt", str(number))
    assert [(folder / f"{n}.txt").read_text() for n in range(4)] == ["0", "1", "2", "3"]


@pytest.mark.slow
def test_a_bucket_that_becomes_read_only(proxy):
    folder = io.absolute_path("gs://bucket/frozen")
    _save(folder, [1])
    proxy.read_only = True
    with pytest.raises(UserError, match=r"(?s)cannot write .*older checkpoints are intact"):
        _save(folder, [2])
    with pytest.raises(UserError, match="cannot be written"):
        run_dir.write_config(folder / "new", {"a": 1})
    assert find_checkpoint(folder).name == "1"
