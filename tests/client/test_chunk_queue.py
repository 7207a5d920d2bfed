"""One action per control step, whatever the answers do."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import pytest

from univla_jax.client import ChunkQueue, Execution
from univla_jax.client.chunk_queue import hold


class Server:
    """Chunks of six: call ``k`` answers 10 k, 10 k + 1, …; the test decides when."""

    def __init__(self, at_once=True, **metadata):
        self.metadata = {"actions_per_call": 6, "action_dim": 1, **metadata}
        self.at_once, self.requests, self.futures, self.resets = at_once, [], [], 0

    def reset(self, episode_id=None):
        self.resets += 1

    def infer_async(self, request):
        self.requests.append(request)
        self.futures.append(concurrent.futures.Future())
        if self.at_once:
            self.answer()
        return self.futures[-1]

    def answer(self, valid=True):
        first = 10 * (len(self.futures) - 1)
        actions = np.arange(first, first + 6, dtype=np.float32)[:, None]
        self.futures[-1].set_result({"actions": actions, "actions_valid": valid})


def _steps(queue, count):
    actions = [queue.step({"prompt": "go"}) for _ in range(count)]
    return [None if action is None else float(action[0]) for action in actions]


def _told(server):
    return [r["executed"][:, 0].tolist() if "executed" in r else None for r in server.requests]


def test_whole_chunks():
    server = Server()
    assert _steps(ChunkQueue(server), 8) == [0, 1, 2, 3, 4, 5, 10, 11]
    assert _told(server) == [None, [0, 1, 2, 3, 4, 5]]


def test_a_part_of_each_chunk():
    server = Server()
    queue = ChunkQueue(server, Execution(replan_steps=2))
    assert _steps(queue, 5) == [0, 1, 10, 11, 20]
    assert _told(server) == [None, [0, 1], [10, 11]]


def test_the_next_chunk_is_asked_for_ahead_and_joined_at_its_step():
    server = Server()
    queue = ChunkQueue(server, Execution(ahead_steps=2))
    assert _steps(queue, 4) == [0, 1, 2, 3]
    server.at_once = False
    assert _steps(queue, 1) == [4] and len(server.requests) == 2
    assert _told(server)[1] == [0, 1, 2, 3]
    assert _steps(queue, 1) == [5]
    server.answer()
    assert _steps(queue, 2) == [12, 13]  # the time of 10 and 11 was over: 4 and 5 were executed
    server.at_once = True
    assert _steps(queue, 2) == [20, 21]
    assert _told(server)[2] == [4, 5, 12, 13]


def test_a_robot_without_an_answer_holds_still():
    server = Server(absolute_dims=[0])
    queue = ChunkQueue(server, Execution(ahead_steps=1))
    _steps(queue, 5)
    server.at_once = False
    assert _steps(queue, 3) == [5, 5, 5] and queue.holding
    server.answer(valid=False)
    assert _steps(queue, 2) == [11, 12] and not queue.holding and queue.invalid == 1
    server.at_once = True
    _steps(queue, 3)
    assert _told(server)[2] == [5, 11, 12, 13, 14]  # a pause is no action


def test_a_pause_without_any_action_is_told_as_none():
    server = Server()
    queue = ChunkQueue(server, Execution(ahead_steps=6, blocking=False))
    server.at_once = False
    assert _steps(queue, 2) == [0, 0] and queue.holding
    server.answer()
    assert _steps(queue, 1) == [0] and not queue.holding
    assert server.requests[1]["executed"] == 0


class RealTime(Server):
    """Repeats what is committed, as a policy in real time does, and goes on with a chunk of six."""

    def __init__(self, **metadata):
        super().__init__(False, max_committed=3, **metadata)

    def answer(self, valid=True):
        first = 10.0 * (len(self.futures) - 1)
        committed = self.requests[-1].get("committed", np.zeros((0, 1), np.float32))
        chunk = np.arange(first, first + 6, dtype=np.float32)[:, None]
        actions = np.concatenate([committed, chunk])
        self.futures[-1].set_result({"actions": actions, "actions_valid": valid})


def _real_time(latency, steps, **execution):
    """The actions of some steps with answers ``latency(call)`` steps after each request."""
    server = RealTime()
    queue = ChunkQueue(server, Execution(realtime=True, **execution))
    found, due = [], {}
    for step in range(steps):
        queue.ask({"prompt": "go"})
        due.setdefault(len(server.requests) - 1, step + latency(len(server.requests) - 1))
        if not server.futures[-1].done() and due[len(server.futures) - 1] <= step:
            server.answer()
        action = queue.take()
        found.append(None if queue.holding else float(action[0]))
    return found, server


def test_in_real_time_an_answer_begins_with_what_is_executed_meanwhile():
    found, server = _real_time(lambda call: 2, 17, ahead_steps=2)
    # The first answer is waited for; from then on no step is without an action, and each answer
    # goes on where what was committed ends.
    assert found == [None, None, 0, 1, 2, 3, 4, 5, *range(10, 16), 20, 21, 22]
    committed = [r["committed"][:, 0].tolist() for r in server.requests[1:]]
    assert committed == [[4, 5], [14, 15], [24, 25]][: len(committed)] and len(committed) >= 2
    assert _told(server)[1] == [0, 1, 2, 3] and _told(server)[2] == [4, 5, 10, 11, 12, 13]


def test_in_real_time_the_longest_of_the_last_latencies_is_bridged():
    found, server = _real_time(lambda call: 3 if call == 1 else 1, 22)
    # The second answer came two steps late: the robot stood still, then went on.
    assert found[:10] == [None, 0, 1, 2, 3, 4, 5, None, None, 10]
    assert [len(r.get("committed", ())) for r in server.requests[1:3]] == [1, 3]
    assert None not in found[9:]


def test_in_real_time_a_late_answer_is_faded_over_to():
    server = RealTime()
    queue = ChunkQueue(server, Execution(realtime=True, ahead_steps=1, replan_steps=3))
    queue.ask({"prompt": "go"})
    server.answer()
    assert _steps(queue, 5) == [0, 1, 2, 3, 4]  # asked at step 2, and 2 alone was committed
    server.answer()
    after = _steps(queue, 2)
    # In the answer 2, 10, 11, 12, … these steps are 12 and 13; the old chunk had 5 left.
    assert after == [pytest.approx((5 + 12) / 2), 13]


def test_real_time_needs_a_server_that_takes_committed_actions():
    with pytest.raises(ValueError, match="takes 0 committed actions; it needs --execution=realti"):
        ChunkQueue(Server(), Execution(realtime=True))
    with pytest.raises(ValueError, match="takes 3 committed actions"):
        ChunkQueue(RealTime(), Execution(realtime=True, ahead_steps=4))


def test_a_reset_drops_what_was_under_way():
    server = Server()
    queue = ChunkQueue(server, Execution(ahead_steps=2))
    _steps(queue, 6)
    queue.reset()
    assert server.resets == 1 and _steps(queue, 1) == [20] and "executed" not in server.requests[-1]


def test_holding_still():
    last = np.array([1.0, 2.0, 3.0], np.float32)
    assert hold(last, {"absolute_dims": [2]}).tolist() == [0, 0, 3]
    assert hold(None, {"action_dim": 2}).tolist() == [0, 0]
    assert hold(None, {"action_dim": 2, "absolute_dims": [1]}) is None
    assert hold(None, {}) is None


def test_numbers_that_fit_no_chunk_are_refused():
    for bad in ({"replan_steps": -1}, {"ahead_steps": 2, "replan_steps": 2}):
        with pytest.raises(ValueError, match=r"expected no negative|less than replan_steps"):
            Execution(**bad)
    with pytest.raises(ValueError, match="answers 6 actions per call"):
        ChunkQueue(Server(), Execution(replan_steps=7))
