"""The server for vla-eval: its observations, and the harness' own client where it is installed."""

from __future__ import annotations

import numpy as np
import pytest

from tests.inference import tiny_checkpoint
from univla_jax.errors import UserError
from univla_jax.inference.loaded_model import LoadedModel
from univla_jax.inference.policy import Policy
from univla_jax.serving.vla_eval_server import camera_names, make_server, observation_of

FRAME, WRIST = np.zeros((8, 8, 3), np.uint8), np.ones((8, 8, 3), np.uint8)


def test_cameras_go_by_name_by_place_or_as_given():
    message = {"images": {"agentview": FRAME, "wrist": WRIST}, "task_description": "lift"}
    views = ("image", "wrist_image")
    found = observation_of(message, views, {})
    assert found.frames["wrist_image"] is WRIST and found.instruction == "lift"
    assert found.state is None
    other = observation_of(message, views, {"image": "wrist", "wrist_image": "agentview"})
    assert other.frames["image"] is WRIST
    named = {"images": {"wrist_image": WRIST, "image": FRAME}, "states": [1, 2]}
    found = observation_of(named, views, {})
    assert found.frames["image"] is FRAME and found.state.tolist() == [1.0, 2.0]
    assert observation_of({"images": FRAME}, ("image",), {}).frames["image"] is FRAME


def test_what_is_missing_is_named():
    with pytest.raises(UserError, match=r"camera 'wrist_image' is missing, .* sends agentview"):
        observation_of({"images": {"agentview": FRAME}}, ("image", "wrist_image"), {})
    with pytest.raises(UserError, match="--views: 'top=a', expected one of image=THEIR_NAME"):
        camera_names(["top=a"], ("image",))
    assert camera_names(["image=agentview"], ("image",)) == {"image": "agentview"}


@pytest.mark.slow
def test_the_harness_gets_the_policys_actions(tmp_path):
    anyio = pytest.importorskip("anyio")
    pytest.importorskip("vla_eval", reason="needs pip install vla-eval")
    from vla_eval.connection import Connection
    from vla_eval.model_servers.serve import serve_async

    folder = tiny_checkpoint.save(tmp_path, tiny_checkpoint.make_assets(), scale=20)
    policy = Policy(LoadedModel.from_checkpoint(folder))
    seen = policy.example()
    rng = np.random.default_rng(0)
    steps = [
        {view: rng.integers(256, size=f.shape, dtype=np.uint8) for view, f in seen.frames.items()}
        for _ in range(2 * policy.chunk_size)
    ]

    async def play() -> list[list[np.ndarray]]:
        episodes = []
        async with anyio.create_task_group() as group:
            server = make_server(policy)
            port = await group.start(
                lambda *, task_status: serve_async(server, "127.0.0.1", 0, task_status=task_status)
            )
            async with Connection(f"ws://127.0.0.1:{port}") as connection:
                for _ in range(2):  # the second begins without history
                    await connection.start_episode({"task": {"name": "t"}})
                    actions = []
                    for frames in steps:
                        message = {"images": frames, "task_description": "touch green"}
                        actions.append((await connection.act(message))["actions"])
                    await connection.end_episode({"success": True})
                    episodes.append(actions)
            group.cancel_scope.cancel()
        return episodes

    first, second = anyio.run(play)
    session, expected = policy.start(), []
    for frames in (steps[0], steps[policy.chunk_size]):
        observation = observation_of(
            {"images": frames, "task_description": "touch green"}, policy.views, {}
        )
        expected += list(policy.act([observation], [session])[0].actions)
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(second, expected)
