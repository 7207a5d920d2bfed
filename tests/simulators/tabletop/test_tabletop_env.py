"""The tabletop: determinism, physics in small cases, task families."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from univla_jax.simulators.tabletop import tabletop_env
from univla_jax.simulators.tabletop.tabletop_env import (
    FAMILIES,
    Block,
    Gripper,
    Scene,
    TabletopEnv,
    TabletopTask,
    Zone,
    advance,
)


def scene(blocks, gripper_at=(0.5, 0.5), height=0.2, is_open=True) -> Scene:
    placed = [Block(color, np.array(xy, float)) for color, xy in blocks.items()]
    gripper = Gripper(np.array(gripper_at, float), height, np.zeros(3), is_open)
    return Scene(placed, [Zone("white", np.array([0.8, 0.8]))], gripper)


def act(target, dx=0.0, dy=0.0, dz=0.0, grip=-1.0, times=1):
    for _ in range(times):
        advance(target, np.array([dx, dy, dz, 0.0, 0.0, 0.0, grip]))


def test_gymnasium_finds_nothing_to_complain_about():
    check_env(TabletopEnv(), skip_render_check=True)


def test_the_same_seed_and_actions_give_the_same_episode():
    actions = np.random.default_rng(0).uniform(-0.1, 0.1, (15, 7))
    runs = []
    for _ in range(2):
        env = TabletopEnv()
        observation, info = env.reset(seed=7)
        frames = [observation["image"]]
        for action in actions:
            observation, *_, info = env.step(action)
            frames += [observation["image"], observation["wrist_image"]]
        runs.append((frames, observation["state"], info))
    for first, second in zip(runs[0][0], runs[1][0]):
        np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(runs[0][1], runs[1][1])
    assert runs[0][2] == runs[1][2]


def test_objects_start_apart_and_in_different_colors():
    env = TabletopEnv()
    for seed in range(50):
        env.reset(seed=seed)
        things = [*env.scene.blocks, *env.scene.zones]
        assert len({b.color for b in env.scene.blocks}) == tabletop_env.BLOCK_COUNT
        for i, one in enumerate(things):
            for other in things[:i]:
                assert np.linalg.norm(one.position - other.position) > 0.22


def test_a_lazy_environment_draws_when_it_is_observed():
    lazy, eager = TabletopEnv(lazy=True), TabletopEnv()
    assert lazy.reset(seed=7)[0] == {}
    eager.reset(seed=7)
    assert lazy.step(np.full(7, 0.05))[0] == {}
    expected = eager.step(np.full(7, 0.05))[0]
    for name, value in lazy.observe().items():
        np.testing.assert_array_equal(value, expected[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_can_be_asked_for(family):
    _, info = TabletopEnv().reset(seed=3, options={"family": family})
    assert info["family"] == family and not info["success"]


def test_an_unknown_family_is_named():
    with pytest.raises(ValueError, match=r"'juggle'.*touch, lift, push, place, reach"):
        TabletopEnv().reset(seed=0, options={"family": "juggle"})


@pytest.mark.parametrize("action", [np.zeros(6), np.full(7, np.nan)])
def test_a_broken_action_is_refused(action):
    env = TabletopEnv()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="7 finite numbers"):
        env.step(action)


def test_actions_are_clipped_to_the_action_space():
    env = TabletopEnv()
    env.reset(seed=0)
    before = env.scene.gripper.position.copy()
    env.step(np.array([5.0, 0, 0, 0, 0, 0, -1]))
    assert env.scene.gripper.position[0] - before[0] <= tabletop_env.MAX_STEP + 1e-6


def test_an_open_gripper_lowers_around_a_block_grasps_it_and_lifts_it():
    table = scene({"red": (0.5, 0.5)})
    act(table, dz=-0.1, times=2)
    act(table, grip=1.0)
    assert table.held == 0 and table.touched == [0]
    act(table, dz=0.1, grip=1.0, times=2)
    assert table.blocks[0].height > 0.12
    act(table, dx=0.1, grip=1.0)
    np.testing.assert_allclose(table.blocks[0].position, [0.6, 0.5])
    act(table, grip=-1.0)
    assert table.held is None and table.blocks[0].height == 0.0


def test_a_closed_gripper_rests_on_a_block_and_touches_it():
    table = scene({"red": (0.5, 0.5)}, is_open=False)
    act(table, dz=-0.1, grip=1.0, times=3)
    assert table.gripper.height == pytest.approx(tabletop_env.BLOCK_TOP)
    assert table.touched == [0] and table.held is None


def test_a_low_gripper_pushes_a_block_and_leaves_far_ones():
    table = scene({"red": (0.5, 0.5), "blue": (0.9, 0.9)}, gripper_at=(0.3, 0.5), is_open=False)
    act(table, dz=-0.1, grip=1.0, times=2)
    act(table, dx=0.1, grip=1.0, times=2)
    np.testing.assert_allclose(table.blocks[0].position, [0.5 + tabletop_env.PUSH_REACH, 0.5])
    np.testing.assert_allclose(table.blocks[1].position, [0.9, 0.9])


def test_closing_above_the_blocks_grasps_nothing():
    table = scene({"red": (0.5, 0.5)})
    act(table, grip=1.0)
    assert table.held is None and not table.touched


def test_touching_another_block_first_fails_the_task():
    table = scene({"red": (0.5, 0.5), "blue": (0.2, 0.2)}, is_open=False)
    task = TabletopTask("touch", "blue", "", (0.2, 0.2))
    act(table, dz=-0.1, grip=1.0, times=3)
    assert table.touched == [0]
    table.touched.append(1)
    assert not task.succeeded(table)
    assert TabletopTask("touch", "red", "", (0.5, 0.5)).succeeded(table)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (TabletopTask("touch", "red", "", (0, 0)), "touch the red block"),
        (TabletopTask("lift", "blue", "", (0, 0)), "lift the blue block"),
        (TabletopTask("push", "green", "left", (0, 0)), "push the green block to the left"),
        (
            TabletopTask("place", "yellow", "black", (0, 0)),
            "put the yellow block in the black zone",
        ),
        (TabletopTask("reach", "", "white"), "reach the white zone"),
    ],
)
def test_instructions(task, words):
    assert task.instruction == words


def test_success_needs_the_distance_the_direction_and_the_release():
    table = scene({"red": (0.5, 0.5)})
    table.touched = [0]
    push = TabletopTask("push", "red", "left", (0.5, 0.5))
    table.blocks[0].position = np.array([0.45, 0.5])
    assert not push.succeeded(table)
    table.blocks[0].position = np.array([0.38, 0.5])
    assert push.succeeded(table)
    table.blocks[0].position = np.array([0.38, 0.6])  # aside, too
    assert push.succeeded(table) is False  # and no number of NumPy, which JSON does not take
    table.blocks[0].position = np.array([0.38, 0.5])
    assert not TabletopTask("push", "red", "right", (0.5, 0.5)).succeeded(table)
    place = TabletopTask("place", "red", "white", (0.5, 0.5))
    table.blocks[0].position = np.array([0.81, 0.79])
    table.held = 0
    assert not place.succeeded(table)
    table.held = None
    assert place.succeeded(table)


def test_a_zone_is_reached_low_and_with_no_block_touched():
    table = scene({"red": (0.5, 0.5)}, gripper_at=(0.82, 0.78), height=0.12, is_open=False)
    task = TabletopTask("reach", "", "white")
    assert not task.succeeded(table)
    act(table, dz=-0.05, grip=1.0)
    assert task.succeeded(table)
    act(table, dx=-0.1, grip=1.0)
    assert not task.succeeded(table)
    act(table, dx=0.1, grip=1.0)
    table.touched.append(0)
    assert not task.succeeded(table)


def test_the_same_task_can_be_asked_of_every_other_thing():
    table = scene({"red": (0.5, 0.5), "blue": (0.2, 0.2), "green": (0.8, 0.2)})
    assert TabletopTask("push", "red", "left", (0.5, 0.5)).others(table) == [
        TabletopTask("push", "blue", "left", (0.2, 0.2)),
        TabletopTask("push", "green", "left", (0.8, 0.2)),
    ]
    table.zones.append(Zone("black", np.array([0.2, 0.8])))
    assert TabletopTask("reach", "", "white").others(table) == [TabletopTask("reach", "", "black")]
