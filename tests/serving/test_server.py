"""The server as robots see it; the policy behind it only counts."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
import time
import urllib.error
import urllib.request

import msgpack
import numpy as np
import pytest
import trustme
from websockets import exceptions
from websockets.asyncio import client as asyncio_client

from tests.serving.harness import CountingPolicy, infer, observation, running
from univla_jax.cli import read_secret
from univla_jax.client import ChunkQueue, Execution, RobotClient, wire
from univla_jax.episode import ActionChunk
from univla_jax.errors import UserError
from univla_jax.serving.server import PolicyServer, ServerConfig
from univla_jax.serving.startup import check_port, tls_context

PIXELS = 8 * 8 * 3


def _get(port, path, **headers):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.status, response.read().decode()


def test_each_connection_has_an_episode_of_its_own_and_can_end_it():
    with running(CountingPolicy()) as server, server.connect() as a, server.connect() as b:

        def count(robot, **more):
            return infer(robot, observation(1, **more))["actions"][0, 1]

        assert [count(a), count(a), count(b)] == [1, 2, 1]
        assert infer(a, {"reset": True}) == {"reset": True}
        assert [count(a), count(b)] == [1, 2]
        assert count(a, reset=True) == 1
        assert [count(a, episode_id=i) for i in ("x", "x", "y")] == [1, 2, 1]


def test_questions_are_answered_and_change_no_episode():
    with running(CountingPolicy()) as server, server.connect() as robot:
        assert infer(robot, observation(1))["actions"][0, 1] == 1
        words = infer(robot, observation(1, prompt="how many?", task="question", extra=1))
        assert words["answer"] == "1 frames" and words["places"] is None
        assert words["ignored_keys"] == ["extra"] and "actions" not in words
        box = infer(robot, observation(1, prompt="where is it?", task="question"))
        np.testing.assert_array_equal(box["places"], np.float32([[0, 0, 0.5, 1]]))
        for message, error in (
            (observation(1, prompt="refuse me", task="question"), "refused"),
            (observation(1, task="dance"), "'task' is 'dance', expected act or question"),
            ({"task": "question", "prompt": "what?"}, "'observation/image' is missing"),
        ):
            reply = infer(robot, message)
            assert reply.startswith("bad request: ") and error in reply
        assert infer(robot, observation(1))["actions"][0, 1] == 2


def test_mistakes_are_answered_and_the_connection_stays():
    policy = CountingPolicy()
    with running(policy) as server, server.connect() as robot:
        small = {"observation/image": np.zeros((4, 8, 3), np.uint8), "prompt": "go"}
        infer(robot, observation(1))
        for message, error in (
            (observation(1, resets=True), "unknown key 'resets'; did you mean 'reset'?"),
            (observation(1, executed=2), "more actions executed than answered"),
            (observation(1, prompt="refuse me"), "observation: refused"),
            (small, "'observation/image' has 4 x 8 pixels, the policy sees 8 x 8"),
            ([1, 2], "the message is a list"),
        ):
            reply = infer(robot, message)
            assert reply.startswith("bad request: ") and error in reply
        assert infer(robot, observation(1))["actions"][0, 1] == 2
        assert policy.batches == [1, 1]
        assert server.metric('univla_requests_total{outcome="bad_request"}') == 5


def test_mistakes_without_end_end_the_connection():
    with running(CountingPolicy()) as server, server.connect() as robot:
        with pytest.raises(exceptions.ConnectionClosed) as closed:
            for _ in range(40):
                assert infer(robot, [1, 2]).startswith("bad request: the message is a list")
        assert closed.value.rcvd.code == 1008
        assert server.metric('univla_requests_total{outcome="bad_request"}') == 32


def test_keys_of_other_policies_are_ignored_and_said_so():
    with running(CountingPolicy()) as server, server.connect() as robot:
        keys = {"observation/joint_position": np.zeros(7), "observation/gripper": 1.0}
        reply = infer(robot, observation(1, **keys))
        assert reply["actions"][0, 1] == 1 and reply["ignored_keys"] == list(keys)


def _counts(robot, **more):
    reply = infer(robot, observation(1, **more))
    return reply["actions"][0, 1], reply["new_episode"]


def test_a_robot_that_names_no_episode_carries_nothing_into_the_next(caplog):
    """openpi's client: its ``reset`` sends nothing."""
    with running(CountingPolicy(), forget_after_seconds=0) as server:
        with server.connect() as robot:
            assert [_counts(robot) for _ in range(3)] == [(1, True)] * 3
        with server.connect() as robot:  # one that does keeps its history
            assert _counts(robot, episode_id="a") == (1, True)
            assert [_counts(robot, episode_id="a"), _counts(robot)] == [(2, False), (3, False)]
        with server.connect() as robot:
            assert [_counts(robot, reset=i == 0) for i in range(2)] == [(1, True), (2, False)]
    assert caplog.text.count("names no episodes") == 1


def test_episodes_are_inferred_from_silence_where_the_server_is_told_to():
    server = running(CountingPolicy(), forget_after_seconds=0.2)
    with server as server, server.connect() as robot:
        assert _counts(robot) == (1, True)
        time.sleep(0.25)
        assert _counts(robot) == (1, True)


def test_the_policy_learns_what_was_executed():
    policy, seen = CountingPolicy(), []
    start = policy.start
    policy.start = lambda seed=0: seen.append(start()) or seen[-1]
    with running(policy) as server, server.connect() as robot:
        infer(robot, observation(1, executed=5))  # nothing was answered before
        infer(robot, observation(1, executed=1))
        assert seen[0].executed == 1
        infer(robot, observation(1, executed=np.ones((2, 2), np.float64)))
    assert len(seen) == 1 and seen[0].executed.tolist() == [[1, 1], [1, 1]]


def test_frames_of_a_declared_camera_size_are_taken_alone():
    sizes = {"image": (6, 12)}
    with running(CountingPolicy(), camera_sizes=sizes) as server, server.connect() as robot:
        wide = {"observation/image": np.ones((6, 12, 3), np.uint8), "prompt": "go"}
        assert infer(robot, wide)["actions_valid"]
        assert "sees 6 x 12; send exactly this size" in infer(robot, observation(1))
    with pytest.raises(UserError, match=r"--camera_sizes: no camera 'wrist'; .* has image"):
        PolicyServer(CountingPolicy(), ServerConfig(camera_sizes={"wrist": (1, 1)}), metadata={})


def test_robots_that_ask_nothing_make_room():
    with running(CountingPolicy(), idle_seconds=0.2) as server, server.connect() as robot:
        with pytest.raises(exceptions.ConnectionClosed) as closed:
            robot.recv(timeout=10)
        assert closed.value.rcvd.code == 1001 and "no request for 0.2 s" in closed.value.rcvd.reason


def test_connections_are_logged(caplog):
    caplog.set_level("INFO")
    with running(CountingPolicy()) as server, server.connect() as robot:
        infer(robot, observation(1))
    assert " connected, 1 in all" in caplog.text and "after 1 episode(s)" in caplog.text


def test_frames_that_cannot_be_read_end_their_connection_only():
    with running(CountingPolicy(), max_message_bytes=2000) as server, server.connect() as good:
        for frame, code, error in (
            (b"\xc1", 1007, "no msgpack message"),
            (msgpack.packb({b"__npgeneric__": 1, b"data": 1, b"dtype": "ü" * 9}), 1007, "dtype"),
            ("text", 1003, "expected a binary msgpack frame"),
            (b"\0" * 3000, 1009, None),
        ):
            with server.connect() as robot:
                robot.send(frame)
                if error:
                    assert error in robot.recv(timeout=10)
                with pytest.raises(exceptions.ConnectionClosed) as closed:
                    robot.recv(timeout=10)
                assert closed.value.rcvd.code == code
        assert infer(good, observation(1))["actions"][0, 1] == 1


def test_errors_of_the_policy_tell_nothing_and_spare_the_others(caplog):
    with running(CountingPolicy(), window_seconds=1.0) as server:
        with server.connect() as good, server.connect() as bad:
            good.send(wire.pack(observation(1)))
            reply = infer(bad, observation(1, prompt="crash"))
            assert reply.startswith("internal error") and "secret" not in reply
            assert wire.unpack(good.recv(timeout=10))["actions"][0, 0] == PIXELS
            with pytest.raises(exceptions.ConnectionClosed):
                bad.recv(timeout=10)
        assert "secret details" in caplog.text


def test_health_and_metrics_answer_while_the_policy_computes():
    policy = CountingPolicy(seconds=1.0)
    with running(policy) as server, server.connect() as robot:
        robot.send(wire.pack(observation(1)))
        assert policy.running.wait(10)
        begin = time.perf_counter()
        assert _get(server.port, "/healthz") == (200, "OK\n")
        status, page = _get(server.port, "/metrics")
        assert time.perf_counter() - begin < 0.5
        assert status == 200 and "univla_connections 1.0" in page
        assert wire.unpack(robot.recv(timeout=10))["actions_valid"]
        assert 'univla_requests_total{outcome="ok"} 1.0' in _get(server.port, "/metrics")[1]


def test_robots_that_ask_together_are_answered_together():
    policy = CountingPolicy()
    with running(policy, window_seconds=5.0, max_batch=3) as server:
        robots = [server.connect() for _ in range(3)]
        for i, robot in enumerate(robots):
            robot.send(wire.pack(observation(i)))
        totals = [wire.unpack(r.recv(timeout=10))["actions"][0, 0] for r in robots]
        assert totals == [0, PIXELS, 2 * PIXELS] and policy.batches == [3]
        for robot in robots:
            robot.close()


def test_a_full_queue_refuses_and_the_robot_may_try_again():
    policy = CountingPolicy(seconds=0.5)
    with running(policy, queue=1, max_batch=1) as server:
        robots = [server.connect() for _ in range(3)]
        robots[0].send(wire.pack(observation(1)))
        assert policy.running.wait(10)
        robots[1].send(wire.pack(observation(1)))
        time.sleep(0.1)
        reply = infer(robots[2], observation(1))
        assert reply.startswith("busy: 1 requests are waiting; try again")
        for robot in robots[:2]:
            assert wire.unpack(robot.recv(timeout=10))["actions"][0, 1] == 1
        assert infer(robots[2], observation(1))["actions"][0, 1] == 1
        for robot in robots:
            robot.close()


def test_only_robots_with_the_key_get_in():
    with running(CountingPolicy(), api_key="geheim") as server:
        for headers in (
            {},
            {"Authorization": "Api-Key other"},
            {"Authorization": "Api-Key gehe\xefm"},
        ):
            with pytest.raises(exceptions.InvalidStatus, match="401"):
                server.connect(additional_headers=headers)
            with pytest.raises(urllib.error.HTTPError, match="401"):
                _get(server.port, "/metrics", **headers)
        headers = {"Authorization": "Api-Key geheim"}
        with server.connect(additional_headers=headers) as robot:
            assert infer(robot, observation(1))["actions_valid"]
        assert (
            _get(server.port, "/healthz")[0] == _get(server.port, "/metrics", **headers)[0] == 200
        )


def _until_free(server):
    ends = time.monotonic() + 10
    while server.metric("univla_connections"):
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_web_pages_and_one_robot_too_many_stay_outside():
    with running(CountingPolicy(), max_connections=1) as server:
        own = f"127.0.0.1:{server.port}"
        for origin in ("http://evil.example", "http://127.0.0.1", "null"):
            with pytest.raises(exceptions.InvalidStatus, match="403"):
                server.connect(origin=origin)
        # A name that its owner lets point here: page and address agree, and yet it is refused.
        rebound = {"Host": "evil.example:1", "Origin": "http://evil.example:1"}
        with pytest.raises(urllib.error.HTTPError, match="403"):
            _get(server.port, "/metrics", **rebound)
        server.connect(origin=f"http://{own}").close()  # a client that sends the server's own
        _until_free(server)
        with server.connect(), pytest.raises(exceptions.InvalidStatus, match="503"):
            server.connect()


def test_encrypted(tmp_path):
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    files = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)

    # From one thread: before Python 3.13 an SSL object may not be read and written by two, which is
    # what the client of websockets.sync does.
    async def ask(port):
        async with asyncio_client.connect(f"wss://127.0.0.1:{port}", ssl=trusting) as robot:
            metadata = wire.unpack(await robot.recv())
            await robot.send(wire.pack(observation(1)))
            return metadata, wire.unpack(await robot.recv())

    with running(CountingPolicy(), tls=tls_context(*files)) as server:
        metadata, reply = asyncio.run(asyncio.wait_for(ask(server.port), 20))
    assert metadata == {"protocol": 1} and reply["actions_valid"]
    with pytest.raises(UserError, match="both --tls_cert and --tls_key"):
        tls_context(files[0], None)
    with pytest.raises(UserError, match="cannot read"):
        tls_context(files[0], str(tmp_path / "none.pem"))


def test_stopping_finishes_what_runs():
    policy = CountingPolicy(seconds=0.5)
    with running(policy) as server:
        working, idle = server.connect(), server.connect()
        working.send(wire.pack(observation(1)))
        assert policy.running.wait(10)
        server.stop()
        with pytest.raises(exceptions.ConnectionClosed) as closed:
            idle.recv(timeout=10)
        assert closed.value.rcvd.code == 1001
        assert wire.unpack(working.recv(timeout=10))["actions_valid"]
        with pytest.raises(exceptions.ConnectionClosed):
            working.recv(timeout=10)
        with pytest.raises((OSError, exceptions.InvalidStatus)):
            server.connect()


def test_a_call_that_outlasts_the_drain_is_left_behind():
    policy = CountingPolicy(seconds=1.5)
    with running(policy, drain_seconds=0.1) as server:
        working = server.connect()
        working.send(wire.pack(observation(1)))
        assert policy.running.wait(10)
        server.stop()
        assert working.recv(timeout=10) == "busy: the server stops; try again later"
        with pytest.raises(exceptions.ConnectionClosed):
            working.recv(timeout=10)
        server.thread.join(10)
        assert server.server.call_under_way and not policy.batches


def test_taken_ports_and_bad_settings_are_named(tmp_path):
    with running(CountingPolicy()) as server:
        message = f"cannot listen on 127.0.0.1:{server.port}"
        with pytest.raises(UserError, match=message):
            check_port("127.0.0.1", server.port)
        with pytest.raises(UserError, match=message), running(CountingPolicy(), port=server.port):
            pass
    with pytest.raises(UserError, match="--queue: 0"):
        ServerConfig(queue=0)
    with pytest.raises(UserError, match="--port: 70000"):
        ServerConfig(port=70000)
    with pytest.raises(UserError, match="--api_key_file"):
        read_secret(str(tmp_path / "none"), "api_key_file")
    (tmp_path / "key").write_text("geheim\n")
    assert read_secret(str(tmp_path / "key"), "api_key_file") == "geheim"


class _Checkpoint(CountingPolicy):
    """Answers with the number of a checkpoint."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def act(self, observations, sessions, *, timer=None):
        super().act(observations, sessions, timer=timer)
        number = self.number
        time.sleep(0.002)
        return [ActionChunk(np.array([[number, len(s), self.number]])) for s in sessions]


def test_a_reload_under_load_drops_no_request_and_mixes_no_answer():
    with running(_Checkpoint(0), metadata={"checkpoint": "0"}, window_seconds=0.0) as server:
        answers, errors = [[] for _ in range(3)], []

        def ask(number):
            try:
                with server.connect() as robot:
                    while len(answers[number]) < 40 or answers[number][-1]["checkpoint"] != "3":
                        answers[number].append(infer(robot, observation(1, episode_id="a")))
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for number in (1, 2, 3):
            time.sleep(0.05)
            following = server.server.reload(_Checkpoint(number), {"checkpoint": str(number)})
            asyncio.run_coroutine_threadsafe(following, server.loop()).result(10)
        for thread in threads:
            thread.join(30)
        assert not errors and server.metric("univla_reloads_total") == 3
        with server.connect() as late:
            assert infer(late, observation(1))["checkpoint"] == "3"
    for robot in answers:
        assert [reply["actions"][0, 1] for reply in robot] == list(range(1, len(robot) + 1))
        for reply in robot:
            assert reply["actions"][0, [0, 2]].tolist() == [int(reply["checkpoint"])] * 2
        numbers = [int(reply["checkpoint"]) for reply in robot]
        assert numbers == sorted(numbers)


def test_robots_are_spread_over_replicas_and_stay_with_theirs():
    policies = [CountingPolicy() for _ in range(3)]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running(policies[0], further=policies[1:]))
        robots = [stack.enter_context(server.connect()) for _ in range(6)]
        for call in range(1, 4):
            for robot in robots:
                assert infer(robot, observation(1))["actions"][0].tolist() == [call * PIXELS, call]
        assert [sum(policy.batches) for policy in policies] == [6, 6, 6]
        replacing = [_Checkpoint(7), _Checkpoint(7), _Checkpoint(7)]
        following = server.server.reload(replacing[0], {"checkpoint": "7"}, further=replacing[1:])
        asyncio.run_coroutine_threadsafe(following, server.loop()).result(10)
        assert all(infer(robot, observation(1))["checkpoint"] == "7" for robot in robots)
        assert [sum(policy.batches) for policy in replacing] == [2, 2, 2]
    assert all(policy.dropped == 1 for policy in policies)


class _Ramp(CountingPolicy):
    """Counts on from what is committed, or was executed: six further numbers."""

    def act(self, observations, sessions, *, timer=None):
        super().act(observations, sessions, timer=timer)
        answers = []
        for seen, session in zip(observations, sessions):
            committed = np.zeros((0, 1)) if seen.committed is None else seen.committed
            known = committed if len(committed) else session.executed
            first = 0 if known is None else known[-1, 0] + 1
            further = first + np.arange(6)[:, None]
            answers.append(ActionChunk(np.concatenate([committed, further]).astype(np.float32)))
        return answers


def test_a_control_loop_in_real_time_neither_waits_nor_jumps():
    metadata = {"actions_per_call": 6, "action_dim": 1, "max_committed": 3}
    with (
        running(_Ramp(seconds=0.004), metadata=metadata, window_seconds=0.0) as server,
        RobotClient(f"ws://127.0.0.1:{server.port}") as robot,
    ):
        queue = ChunkQueue(robot, Execution(realtime=True))
        executed = []
        while len(executed) < 60:
            action = queue.step(observation(1))
            executed += [] if queue.holding else [float(action[0])]
            time.sleep(0.002)
        assert executed == list(range(60)) and queue.answers >= 5
