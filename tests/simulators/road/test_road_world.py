"""The embedded road: the same from the same seed, drivable by the expert, seen by the camera."""

from __future__ import annotations

import numpy as np
import pytest

from univla_jax.errors import UserError
from univla_jax.simulators import StepResult
from univla_jax.simulators.navsim.pdm_closed import Path
from univla_jax.simulators.road.road_map import HALF_CROSSING, TURNS, command_at, crossing, walk
from univla_jax.simulators.road.road_render import FRAME_SIZE, RoadRenderer
from univla_jax.simulators.road.road_world import KINDS, RoadWorld


def test_a_quarter_circle_ends_where_it_should():
    arc = walk(np.zeros(3), [(10 * np.pi / 2, 0.1)])
    np.testing.assert_allclose(arc[-1], [10.0, 10.0, np.pi / 2], atol=1e-9)


@pytest.mark.parametrize("turn", TURNS)
def test_routes_end_in_their_exit(turn):
    road = crossing(np.random.default_rng(0), turn=turn)
    end = road.centerline[-1]
    wanted = {"left": np.pi / 2, "straight": 0.0, "right": -np.pi / 2}[turn]
    np.testing.assert_allclose(np.cos(end[2] - wanted), 1.0)
    assert set(road.route_lanes) <= set(road.drivable.ids)
    route = Path(road.centerline)
    before = np.array([-HALF_CROSSING - 8.0, -1.75, 0.0])
    assert command_at(route, before) == {"left": 0, "straight": 1, "right": 2}[turn]
    assert command_at(route, before - [60.0, 0.0, 0.0]) == 1  # too far away to be told


def test_a_seed_fixes_the_world():
    worlds = [RoadWorld(5, "across") for _ in range(2)]
    for world in worlds:
        world.drive_motions(np.tile([3.0, 0.0, 0.0], (8, 1)))
    assert worlds[0].ego.tolist() == worlds[1].ego.tolist()
    np.testing.assert_array_equal(worlds[0].objects().poses, worlds[1].objects().poses)
    assert RoadWorld(6, "across").road.speed_limit != worlds[0].road.speed_limit


def test_the_world_is_scored_as_it_was_driven():
    world = RoadWorld(0, "curve")
    for _ in range(11):
        world.drive_motions(np.tile([2.0, 0.0, 0.0], (8, 1)))
    scene = world.scene(5, "s", np.zeros((41, 3)))
    assert scene.tracks.boxes.shape == (51, len(world.actors), 4, 2)
    np.testing.assert_array_equal(scene.ego_state[:7], world.states[5][:7])
    assert not scene.ego_state[7:].any()


def test_the_camera_sees_where_it_goes():
    world = RoadWorld(2, "straight")
    world.actors.clear()
    renderer = RoadRenderer(world.road)
    frame = renderer.front(world)
    assert frame.shape == (*FRAME_SIZE, 3) and frame.dtype == np.uint8
    grey = np.abs(frame.astype(int).max(-1) - frame.min(-1)) < 12
    assert grey[-1, 20:70].mean() > 0.8 and not grey[:10].any()  # asphalt below, sky above
    pose = world.ego[:3]
    left, right = (renderer.front_at(world, pose + [0, 0, turn]) for turn in (0.3, -0.3))
    columns = np.arange(frame.shape[1])

    def middle(picture):
        rows = np.abs(picture.astype(int).max(-1) - picture.min(-1))[22:30] < 12
        return (rows * columns).sum() / rows.sum()

    assert middle(left) > middle(frame) > middle(right)  # the road moves the other way
    assert renderer.above(world, (60, 80)).shape == (60, 80, 3)


def test_a_red_light_is_seen_and_ends():
    seed = next(s for s in range(40) if RoadWorld(s, "left").red_ids())
    world = RoadWorld(seed, "left")
    frame = RoadRenderer(world.road).front(world, (96, 192)).astype(int)
    assert ((frame[..., 0] > 150) & (frame[..., 1] < 90)).any()
    for _ in range(18):
        world.drive_motions(np.zeros((8, 3)))
    assert not world.red_ids()


@pytest.mark.slow
def test_the_expert_drives_every_kind():
    from univla_jax.simulators.road.road_benchmark import make_benchmark

    benchmark = make_benchmark(episodes=10)
    simulator = benchmark.variants["expert"]()
    scores = []
    for trial in benchmark.trials:
        simulator.reset(trial)
        for _ in range(8):
            simulator.step(simulator.observe().plan)
        scores.append(simulator.result()["scores"]["PDMS v1.1"])
    assert {KINDS[t.task] for t in benchmark.trials} == set(KINDS)
    assert np.mean(scores) > 0.9


def test_one_plan_is_followed_to_the_end_of_chosen_kinds():
    from univla_jax.simulators.road.road_benchmark import make_benchmark

    benchmark = make_benchmark(tasks=(1,), episodes=2, max_steps=1)
    assert [(t.task, t.trial) for t in benchmark.trials] == [(1, 0), (1, 1)]
    simulator = benchmark.variants["constant_velocity"]()
    simulator.reset(benchmark.trials[0])
    assert simulator.step(simulator.observe().plan) is StepResult.ENDED
    assert simulator.result()["steps"] == 1 and simulator.result()["task"] == KINDS[1]
    with pytest.raises(UserError, match=r"max_steps 9 in 1\.\.\.8"):
        make_benchmark(max_steps=9)
