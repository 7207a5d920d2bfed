"""Compilation before the port opens, and the first message to a robot."""

from __future__ import annotations

import asyncio
import dataclasses

import jax
import pytest

from tests.inference import tiny_checkpoint
from univla_jax.client import wire
from univla_jax.errors import UserError
from univla_jax.inference.execution import Execution, Executor
from univla_jax.inference.policy import Policy
from univla_jax.serving.server import ServerConfig
from univla_jax.serving.startup import (
    Reloads,
    enable_compilation_cache,
    parse_camera_sizes,
    plan_memory,
    server_metadata,
    warmup,
    watch,
)


def test_a_robot_learns_what_to_send_and_what_it_gets(tmp_path):
    policy = Policy.load(tiny_checkpoint.save(tmp_path, tiny_checkpoint.make_assets()))
    metadata = server_metadata(Executor(policy, Execution("receding", steps=1)), ServerConfig())
    assert wire.unpack(wire.pack(metadata)) == metadata
    assert (metadata["chunk"], metadata["actions_per_call"], metadata["action_dim"]) == (3, 1, 7)
    assert (metadata["checkpoint_step"], metadata["control_hz"]) == (7, 5.0)
    assert len(metadata["checkpoint"]) == 64 and metadata["keeps_history"] is True
    assert metadata["optional_keys"] == ["reset", "episode_id", "executed", "committed", "task"]
    assert metadata["max_committed"] == 0
    shapes = {"observation/image": [24, 24, 3], "observation/wrist_image": [16, 16, 3]}
    assert metadata["observation_keys"] == shapes
    assert metadata["action_q01"] == list(tiny_checkpoint.STATISTICS.q01)
    assert len(metadata["statistics_sha256"]) == 64


def test_a_robot_learns_that_its_state_is_wanted(tmp_path):
    assets = tiny_checkpoint.make_assets(state=True)
    statistics = {**assets.statistics, "tabletop/state": tiny_checkpoint.STATISTICS}
    assets = dataclasses.replace(assets, statistics=statistics)
    policy = Policy.load(tiny_checkpoint.save(tmp_path, assets))
    metadata = server_metadata(Executor(policy, Execution("chunk")), ServerConfig())
    assert metadata["observation_keys"]["observation/state"] == [7]


class _Recorder:
    """Has memory for ``room`` robots at once."""

    def __init__(self, room):
        self.sizes, self.room = [], room

    def warmup(self, rows):
        self.sizes.append(rows)
        if rows > self.room:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")


def test_every_batch_size_that_a_call_is_padded_to_is_compiled():
    recorder = _Recorder(room=99)
    assert warmup(recorder, 20, lambda message: None) == 20
    assert recorder.sizes == [1, 2, 4, 8, 16, 24]


def test_too_little_memory_for_a_batch_means_smaller_ones():
    lines = []
    assert warmup(_Recorder(room=4), 20, lines.append) == 4
    assert lines[-1] == "out of memory for 8 robots at once; at most 4 are answered"
    with pytest.raises(UserError, match=r"too small to answer one robot .*--int8"):
        warmup(_Recorder(room=0), 20, lines.append)


def test_memory_is_planned_by_bytes(policy_checkpoint):
    policy, lines = Policy.load(policy_checkpoint), []
    plan_memory(policy, 4, 0.5, lines.append)
    parts = policy.memory(4)
    assert parts["budget of caches kept"] == 2**29
    assert parts["caches of a call with 4"] == 8 * parts["cache of a robot"] > 0
    assert parts["weights"] > 0 and parts["vision tokenizer"] > 0
    assert lines[0].startswith("GiB per device: weights 0.0") and "kept 0.50" in lines[0]
    plan_memory(policy, 4, 0.0, lines.append)
    assert policy.memory(4)["budget of caches kept"] == 2**32  # a CPU does not tell its memory


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--compiled=.*file/x: .*name another folder"):
        enable_compilation_cache(tmp_path / "file" / "x")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # a container without /etc/passwd
    with pytest.raises(UserError, match=r"--compiled=~/x: .*home directory.*; name another folder"):
        enable_compilation_cache("~/x")


def test_sizes_of_cameras():
    assert parse_camera_sizes(["image=480x640", "a=b=1x2"]) == {"image": (480, 640), "a=b": (1, 2)}
    with pytest.raises(UserError, match="--camera_sizes: 'image=480', expected CAMERA="):
        parse_camera_sizes(["image=480"])


class _Server:
    """Remembers what it was given."""

    def __init__(self):
        self.reloaded = asyncio.Event()

    async def reload(self, policy, metadata, *, further):
        self.served, self.metadata = policy, metadata
        self.reloaded.set()


def test_a_newer_checkpoint_replaces_the_one_before(tmp_path, caplog):
    assets = tiny_checkpoint.make_assets()
    executor = Executor(Policy.load(tiny_checkpoint.save(tmp_path, assets)), Execution())
    loaded = []

    def load(folder):
        loaded.append(folder)
        if len(loaded) == 1:
            raise UserError("a disk that fails")
        return [Executor(Policy.load(folder), Execution())]

    async def scenario():
        server, reloads = _Server(), Reloads(str(tmp_path), 0.01, load)
        watching = asyncio.create_task(watch(server, executor, ServerConfig(), reloads))
        for step in (8, 9):
            await asyncio.to_thread(tiny_checkpoint.save, tmp_path, assets, step=step)
            while len(loaded) < step - 7:
                await asyncio.sleep(0.01)
        await server.reloaded.wait()
        watching.cancel()
        return server

    server = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert server.metadata["checkpoint_step"] == 9 and "a disk that fails" in caplog.text
    assert server.served.policy.loaded.folder.name == "9"
