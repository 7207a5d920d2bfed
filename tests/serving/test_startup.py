"""Compilation before the port opens, and the first message to a robot."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import threading

import jax
import numpy as np
import pytest

from tests.inference import tiny_checkpoint
from tests.serving.harness import infer, running
from univla_jax.checkpoints import checkpoint_identity, find_checkpoint
from univla_jax.client import wire
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.inference.execution import Execution, Executor
from univla_jax.inference.policy import Policy
from univla_jax.models.lora import LoraConfig
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


@pytest.mark.slow
def test_adapters_are_swapped_under_load_and_each_answer_is_of_one(tmp_path, compilation_cache):
    """A base, then two adapters of it: robots keep asking, and every answer is of one of the three.

    Which one a reply names; its actions are those that this checkpoint gives alone.
    """
    base = tiny_checkpoint.save(tmp_path / "base", tiny_checkpoint.make_assets(), scale=20)
    served = tmp_path / "served"
    shutil.copytree(base, served)
    ranks = (LoraConfig(rank=2), LoraConfig(rank=3, targets="attention"))

    def load(folder):
        executor = Executor(Policy.load(folder), Execution())
        executor.policy.warmup(1)
        return [executor]

    (executor,), config = load(served), ServerConfig()
    executor.policy.warmup(2)  # both robots in one batch
    frames = {
        view: np.full((*size, 3), 90, np.uint8)
        for view, size in executor.policy.frame_sizes.items()
    }
    request = {f"observation/{view}": frame for view, frame in frames.items()}
    request |= {"prompt": "touch green", "reset": True}
    replies, swapped = [], []

    def ask(robot):
        while not replies or (replies[-1]["checkpoint"] != swapped[-1]):
            replies.append(infer(robot, request, timeout=120))

    metadata = server_metadata(executor, config)
    swapped.append(metadata["checkpoint"])
    with running(executor, metadata=metadata, window_seconds=0.0) as server:
        reloads = Reloads(str(served), 0.01, load)
        watching = asyncio.run_coroutine_threadsafe(
            watch(server.server, executor, config, reloads), server.loop()
        )
        with server.connect() as one, server.connect() as two:
            ask(one)
            for number, lora in enumerate(ranks):
                tiny_checkpoint.save_adapter(served, base, lora, seed=number, step=8 + number)
                swapped.append(checkpoint_identity(find_checkpoint(served)))
                threads = [threading.Thread(target=ask, args=(robot,)) for robot in (one, two)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(300)
                    assert not thread.is_alive()
        watching.cancel()
    alone = {}
    for folder in (find_checkpoint(base), *(served / "checkpoints" / step for step in "89")):
        policy = Policy.load(folder)
        (chunk,) = policy.act([Observation("touch green", frames)], [policy.start()])
        alone[checkpoint_identity(folder)] = chunk.actions
    assert list(dict.fromkeys(reply["checkpoint"] for reply in replies)) == swapped
    for reply in replies:
        np.testing.assert_array_equal(reply["actions"], alone[reply["checkpoint"]])
    first, *others = (alone[identity] for identity in swapped)
    assert all((first != other).any() for other in others) and (others[0] != others[1]).any()
