"""Robots that break off, send rubbish or do not read: the server stays up and the others notice
nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import jax
import msgpack
import numpy as np
import pytest
from websockets import exceptions

from tests.serving.harness import CountingPolicy, infer, observation, running
from univla_jax.benchmarks.harness import resident_megabytes
from univla_jax.client import wire

PIXELS = 8 * 8 * 3
LONGEST = 2**13  # bytes of a frame that the fuzzed server reads


def _mutated(rng):
    """One message that is wrong somewhere: bytes, structure, values, or nothing at all."""
    kind = rng.integers(8)
    frame = bytearray(wire.pack(observation(1, **{"observation/state": np.zeros(8)})))
    if kind == 0:
        return rng.bytes(rng.integers(0, 400))
    if kind == 1:
        for _ in range(rng.integers(1, 6)):
            frame[rng.integers(len(frame))] = rng.integers(256)
        return bytes(frame)
    if kind == 2:
        return bytes(frame[: rng.integers(len(frame))])
    if kind == 3:
        return "text" * int(rng.integers(1, 50))
    if kind == 4:
        key = ["prompt", "observation/image", "reset", "episode_id"][rng.integers(4)]
        value = [None, 1, -1.5, b"\0", "x" * 2000, [1], {"a": 1}, np.zeros((8, 8, 4))][
            rng.integers(8)
        ]
        return wire.pack(observation(1) | {key: value})
    if kind == 5:
        message = {b"__ndarray__": True, b"data": rng.bytes(8), b"dtype": "<i8"}
        message[b"shape"] = rng.integers(-3, 2**31, rng.integers(0, 12)).tolist()
        return msgpack.packb({"observation/image": message, "prompt": "go"})
    if kind == 6:
        return b"\0" * int(rng.integers(LONGEST, 3 * LONGEST))
    return b"\xdd\x00\x0f\x00\x00" * int(rng.integers(1, 200))


def _fuzz(server, count, seed):
    """Sends ``count`` messages, over a new connection where the last one ended."""
    rng, robot, ended = np.random.default_rng(seed), server.connect(), 0
    for _ in range(count):
        try:
            robot.send(_mutated(rng))
            reply = robot.recv(timeout=20)
            assert isinstance(reply, str) or "actions" in wire.unpack(reply) or reply
        except exceptions.ConnectionClosed:
            robot.close()
            robot, ended = server.connect(), ended + 1
    robot.close()
    return ended


def _check_fuzzed(count):
    limits = {"window_seconds": 0.0, "max_message_bytes": LONGEST}
    with running(CountingPolicy(), **limits) as server, server.connect() as good:
        _fuzz(server, 200, seed=1)
        before = resident_megabytes()
        assert _fuzz(server, count, seed=0) > 0
        for i in range(2, 5):
            assert infer(good, observation(1))["actions"][0, 1] == i - 1
        assert server.metric("univla_connections") == 1
        return resident_megabytes() - before


def test_fuzzed_messages():
    _check_fuzzed(300)


@pytest.mark.slow
def test_ten_thousand_fuzzed_messages_leave_no_memory_behind():
    assert _check_fuzzed(10_000) < 10


def test_a_robot_that_dies_while_it_waits():
    policy = CountingPolicy(seconds=0.3)
    with running(policy) as server, server.connect() as good:
        bad = server.connect()
        bad.send(wire.pack(observation(9)))
        assert policy.running.wait(10)
        bad.socket.shutdown(socket.SHUT_RDWR)
        assert infer(good, observation(1))["actions"][0].tolist() == [PIXELS, 1]
        _until(lambda: server.metric("univla_connections") == 1)


def test_a_robot_that_dies_within_a_frame():
    with running(CountingPolicy()) as server, server.connect() as good:
        raw = socket.create_connection(("127.0.0.1", server.port))
        lines = ["GET / HTTP/1.1", "Host: x", "Upgrade: websocket", "Connection: Upgrade"]
        lines += ["Sec-WebSocket-Key: " + "A" * 22 + "==", "Sec-WebSocket-Version: 13", "", ""]
        raw.sendall("\r\n".join(lines).encode())
        raw.recv(4096)
        raw.sendall(b"\x82\xfe\xff\xff" + b"\0" * 100)  # says 65,535 bytes, sends 96
        _until(lambda: server.metric("univla_connections") == 2)
        raw.close()
        _until(lambda: server.metric("univla_connections") == 1)
        assert infer(good, observation(1))["actions_valid"]


def test_a_robot_that_does_not_read_is_cut_off():
    """It asks and asks; the answers fill its buffers, and it is not waited for."""
    with running(CountingPolicy(), send_seconds=0.3) as server, server.connect() as good:
        raw = server.connect(max_queue=1)
        raw.recv_events_paused = True
        message = wire.pack(observation(1, prompt="at length"))
        stop = threading.Event()

        def flood():
            with contextlib.suppress(exceptions.ConnectionClosed, OSError):
                while not stop.is_set():
                    raw.send(message)

        thread = threading.Thread(target=flood, daemon=True)
        thread.start()
        before = resident_megabytes()
        for _ in range(20):
            assert infer(good, observation(1))["actions_valid"]
            time.sleep(0.02)
        _until(lambda: server.metric("univla_connections") == 1)
        stop.set()
        raw.socket.close()
        thread.join(10)
        assert resident_megabytes() - before < 50


FULL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")


def test_a_call_that_finds_no_memory_is_repeated_without_caches():
    policy = CountingPolicy()
    with running(policy) as server, server.connect() as robot:
        assert infer(robot, observation(1))["actions"][0, 1] == 1
        policy.failures = [FULL]
        assert infer(robot, observation(1))["actions"][0, 1] == 2
        assert policy.dropped == 1 and server.metric("univla_out_of_memory_total") == 1


def test_who_finds_no_memory_at_all_is_told_and_may_try_again(caplog):
    policy = CountingPolicy()
    with running(policy) as server, server.connect() as robot:
        policy.failures = [FULL, MemoryError()]
        assert infer(robot, observation(1)).startswith("busy: the server is out of memory; try")
        with pytest.raises(exceptions.InvalidStatus, match="503"):
            server.connect()
        assert infer(robot, observation(1))["actions"][0, 1] == 1
    assert "all caches are dropped: RESOURCE_EXHAUSTED" in caplog.text


def test_reading_ahead_without_memory_drops_the_caches_and_ends_nothing():
    class Greedy(CountingPolicy):
        def prefill_ahead(self):
            super().prefill_ahead()
            raise FULL

    policy = Greedy()
    with running(policy) as server, server.connect() as robot:
        for call in (1, 2):
            assert infer(robot, observation(1))["actions"][0, 1] == call
            _until(lambda call=call: policy.dropped == policy.ahead >= call)


def _until(condition, seconds=10.0):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)
