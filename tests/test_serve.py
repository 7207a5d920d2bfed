"""The command that serves a checkpoint: it starts, answers as the policy does, stops."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from univla_jax.client import wire
from univla_jax.episode import Observation
from univla_jax.inference.policy import Policy
from univla_jax.inference.sampling import Sampling

ENVIRONMENT = dict(os.environ, PYTHONPATH=str(REPOSITORY), JAX_PLATFORMS="cpu")
WORDS = "push the red block to the left"


def _command(checkpoint, *arguments):
    command = [sys.executable, "-m", "univla_jax.serve", f"--checkpoint={checkpoint}"]
    return [*command, *arguments]


@contextlib.contextmanager
def _server(checkpoint, compiled, *arguments):
    """A running server: its process, its port, and the processor seconds until it listened."""
    command = _command(checkpoint, "--port=0", f"--compiled={compiled}", *arguments)
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            found = re.search(r"listening on ws://127.0.0.1:(\d+)", line)
            if found:
                break
        yield process, int(found[1]), _processor_seconds(process.pid)
    finally:
        process.kill()
        process.wait()


def _processor_seconds(process):
    """What a process has used of all processors; waiting for others does not count."""
    fields = pathlib.Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _frames(seed):
    rng = np.random.default_rng(seed)
    draw = lambda side: rng.integers(0, 256, (side, side, 3), np.uint8)  # noqa: E731
    return {"image": draw(64), "wrist_image": draw(32)}


def _message(seed):
    frames = {f"observation/{view}": frame for view, frame in _frames(seed).items()}
    return frames | {"prompt": WORDS}


@pytest.mark.slow
def test_it_acts_as_the_policy_does_and_compiles_nothing_the_second_time(
    policy_checkpoint, tmp_path
):
    from websockets.sync.client import connect

    policy = Policy.load(policy_checkpoint)
    session, compiled = policy.start(), []
    expected = [policy.act([Observation(WORDS, _frames(i))], [session])[0] for i in range(4)]
    for _ in range(2):
        with _server(policy_checkpoint, tmp_path / "compiled", "--max_batch=2") as (
            process,
            port,
            _,
        ):
            with connect(f"ws://127.0.0.1:{port}", compression=None) as robot:
                metadata = wire.unpack(robot.recv())
                assert metadata["chunk"] == policy.chunk_size and metadata["checkpoint_step"] == 7
                for seed, chunk in enumerate(expected):
                    robot.send(wire.pack({**_message(seed), "episode_id": 1}))
                    reply = wire.unpack(robot.recv(timeout=60))
                    np.testing.assert_array_equal(reply["actions"], chunk.actions)
                    assert reply["actions_valid"] == chunk.valid
                    assert reply["actions_invalid_reason"] == chunk.reason
                    time.sleep(0.1)  # lets it read ahead
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        compiled.append({path.name for path in (tmp_path / "compiled").rglob("*-cache")})
    assert compiled[0] and compiled[0] == compiled[1]


def test_sampling_flags_arrive(policy_checkpoint, tmp_path):
    from websockets.sync.client import connect

    policy = Policy.load(policy_checkpoint, sampling=Sampling(2.0, top_k=40, top_p=0.9, seed=3))
    (chunk,) = policy.act([Observation(WORDS, _frames(0))], [policy.start()])
    arguments = ("--temperature=2", "--top_k=40", "--top_p=0.9", "--seed=3", "--max_batch=1")
    with (
        _server(policy_checkpoint, tmp_path, *arguments) as (_, port, _),
        connect(f"ws://127.0.0.1:{port}", compression=None) as robot,
    ):
        robot.recv()
        robot.send(wire.pack(_message(0)))
        reply = wire.unpack(robot.recv(timeout=60))
        np.testing.assert_array_equal(reply["actions"], chunk.actions)


@pytest.mark.slow
def test_sigterm_under_load(policy_checkpoint, tmp_path):
    """Whoever got no answer is told that the server stops; nothing hangs, nothing crashes."""
    from websockets import exceptions
    from websockets.sync.client import connect

    arguments = ("--max_batch=2", "--window_ms=1")
    with _server(policy_checkpoint, tmp_path / "compiled", *arguments) as (process, port, _):
        robots = [connect(f"ws://127.0.0.1:{port}", compression=None) for _ in range(4)]
        for robot in robots:
            robot.recv()
        for i, robot in enumerate(robots):
            robot.send(wire.pack(_message(i)))
        process.send_signal(signal.SIGTERM)
        outcomes = []
        for robot in robots:
            try:
                outcomes.append(wire.unpack(robot.recv(timeout=60))["actions"].shape)
                robot.recv(timeout=60)
            except exceptions.ConnectionClosed as closed:
                outcomes.append(closed.rcvd.code)
        assert process.wait(60) == 0
    assert set(outcomes) <= {(3, 7), 1001} and outcomes.count(1001) == 4


def _fails(checkpoint, *arguments):
    done = subprocess.run(
        _command(checkpoint, *arguments), env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.slow
def test_it_starts_without_a_home(policy_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "HOME", str(tmp_path / "file" / "home"))
    (tmp_path / "file").write_text("")
    command = [*_command(policy_checkpoint, "--port=0", "--max_batch=1")]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "listening" in line:
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
    assert any("compiled functions are not kept: --compiled=~/.cache" in line for line in lines)
    assert any("GiB per device: weights" in line for line in lines)


def test_mistakes_are_one_line(policy_checkpoint, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in _fails(policy_checkpoint, f"--port={port}")
    assert "no complete checkpoint" in _fails(tmp_path, "--port=0", f"--compiled={tmp_path}/c")
    assert "--max_batch: 0" in _fails(policy_checkpoint, "--max_batch=0")
    assert "temperature: -1.0 is negative" in _fails(policy_checkpoint, "--temperature=-1")
