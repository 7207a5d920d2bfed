"""The robots' client at a server: episodes end, connections break, a server is busy."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
import venv

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.serving.harness import CountingPolicy, observation, running
from univla_jax.client import Refused, RobotClient, ServerGone

QUICK = (0.01, 0.05, 0.1)


def _address(server):
    return f"ws://127.0.0.1:{server.port}"


def _count(reply):
    return reply["actions"][0, 1]


def test_an_episode_lasts_until_it_is_reset():
    serving = running(CountingPolicy(), forget_after_seconds=0)
    with serving as server, RobotClient(_address(server)) as client:
        assert client.metadata == {"protocol": 1}
        assert [_count(client.infer(observation(1))) for _ in range(3)] == [1, 2, 3]
        client.reset()
        assert server.metric('univla_requests_total{outcome="reset"}') == 1
        assert [_count(client.infer(observation(1))) for _ in range(2)] == [1, 2]


def test_a_connection_that_breaks_is_made_again():
    with running(CountingPolicy()) as server, RobotClient(_address(server)) as client:
        assert client.infer(observation(1))["new_episode"]
        client._submit(client._connection.close()).result()
        reply = client.infer(observation(1))
        assert reply["new_episode"] and _count(reply) == 1 and client.connections == 2


def test_calls_that_do_not_block_are_answered_in_order():
    policy = CountingPolicy(seconds=0.1)
    with running(policy) as server, RobotClient(_address(server)) as client:
        futures = [client.infer_async(observation(1)) for _ in range(3)]
        assert not futures[0].done()
        assert [_count(future.result(10)) for future in futures] == [1, 2, 3]


def test_mistakes_are_told_and_the_client_goes_on():
    with running(CountingPolicy()) as server, RobotClient(_address(server)) as client:
        with pytest.raises(Refused, match="bad request: key 'prompt' is missing"):
            client.infer({"observation/image": np.zeros((8, 8, 3), np.uint8)})
        assert _count(client.infer(observation(1))) == 1


def test_a_busy_server_is_asked_again():
    policy = CountingPolicy()
    with running(policy) as server, RobotClient(_address(server), retry_seconds=QUICK) as client:
        policy.failures = [MemoryError()] * 4
        assert _count(client.infer(observation(1))) == 1
        policy.failures = [MemoryError()] * 99
        with pytest.raises(ServerGone, match="busy: the server is out of memory"):
            client.infer(observation(1))
        policy.failures = []
        assert _count(client.infer(observation(1))) == 2


def test_who_is_not_let_in_learns_why():
    with running(CountingPolicy(), api_key="secret", max_connections=1) as server:
        with pytest.raises(ServerGone, match="401 a valid API key is needed"):
            RobotClient(_address(server))
        with RobotClient(_address(server), api_key="secret") as client:
            assert _count(client.infer(observation(1))) == 1
            with pytest.raises(ServerGone, match=r"after 2 attempts \(503 too many robots"):
                RobotClient(_address(server), api_key="secret", retry_seconds=(0.01,))
    with pytest.raises(ServerGone, match="no server after 1 attempts"):
        RobotClient(_address(server), retry_seconds=())
    with pytest.raises(ServerGone, match="no server after 1 attempts"):
        client.close()
        RobotClient("ws://127.0.0.1:1", retry_seconds=())


def test_closing_cancels_nothing_that_hangs():
    with running(CountingPolicy(seconds=0.5)) as server:
        client = RobotClient(_address(server))
        future = client.infer_async(observation(1))
        client.close()
        client.close()
        done, _ = concurrent.futures.wait([future], 0)
        assert not done or future.exception()


@pytest.mark.slow
def test_it_is_a_package_of_its_own(tmp_path):
    """Installed without the rest of the repository, it moves a robot of the server."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", REPOSITORY / "univla_jax" / "client"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no package registry: {done.stderr.strip()[-200:]}")
    program = """
import sys, numpy as np
from univla_client import ChunkQueue, RobotClient
with RobotClient(sys.argv[1]) as client:
    queue = ChunkQueue(client)
    queue.reset()
    seen = {"observation/image": np.ones((8, 8, 3), np.uint8), "prompt": "go"}
    print([queue.step(seen).tolist() for _ in range(2)])
assert "jax" not in sys.modules and "univla_jax" not in sys.modules
"""
    with running(CountingPolicy()) as server:
        command = [python, "-c", program, _address(server)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.stdout.strip() == "[[192.0, 1.0], [384.0, 2.0]]", done.stderr
    assert sys.version_info >= (3, 10)
