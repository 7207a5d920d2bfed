"""The judge of imagined tabletop frames finds what the simulator put there."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from univla_jax.evaluation.tabletop_judge import (
    find_blocks,
    find_gripper,
    named_object,
    scene_at,
    scene_of,
    score,
)
from univla_jax.simulators.tabletop.tabletop_env import FAMILIES, TabletopEnv, advance
from univla_jax.simulators.tabletop.tabletop_expert import actions_along, waypoints
from univla_jax.simulators.tabletop.tabletop_render import render_fixed


def task_of(seed):
    env = TabletopEnv(lazy=True)
    env.reset(seed=seed, options={"family": FAMILIES[seed % 5]})
    return env.task


def _other(seed):
    return task_of(seed).others(scene_at(seed))[0].instruction


def drawn(scene, rng, noise=8.0):
    """The picture as a tokenizer might give it back: small, and with errors."""
    small = Image.fromarray(render_fixed(scene, 64)).resize((32, 32), Image.Resampling.BICUBIC)
    noisy = np.asarray(small, np.float64) + rng.normal(0, noise, (32, 32, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("seed", range(5))
def test_gripper_and_blocks_are_found_along_the_experts_path(seed):
    rng, start, scene = np.random.default_rng(seed), scene_at(seed), scene_at(seed)
    path = actions_along(waypoints(task_of(seed), scene), scene)
    for step in range(9):
        picture = drawn(scene, rng)
        error = np.linalg.norm(find_gripper(picture, start) - scene.gripper.position)
        assert error < 0.08, f"step {step}"
        if step == 0:
            found = find_blocks(picture)
            assert set(found) == {block.color for block in scene.blocks}
            for block in scene.blocks:
                assert np.linalg.norm(found[block.color] - block.position) < 0.05
        advance(scene, next(path))


@pytest.mark.parametrize("other", [False, True])
def test_the_expert_visits_the_object_that_it_is_told(other):
    pictures, scenes, instructions = [], [], []
    for seed in range(5, 13):
        rng, scene = np.random.default_rng(seed), scene_at(seed)
        told = task_of(seed).others(scene)[0] if other else task_of(seed)
        path, frames = actions_along(waypoints(told, scene), scene), []
        for step in range(1, 10):
            advance(scene, next(path))
            if step % 3 == 0:
                frames.append(drawn(scene, rng))
        pictures.append(frames)
        scenes.append(scene_at(seed))
        instructions.append(told.instruction)
    found = score(np.array(pictures), scenes, instructions)
    assert found["right_object"] >= 7 / 8 and found["colors_kept"] > 0.75
    told_other = [task_of(s).instruction if other else _other(s) for s in range(5, 13)]
    assert score(np.array(pictures), scenes, told_other)["right_object"] <= 1 / 8


def test_a_color_that_is_not_there_is_not_found():
    scene = scene_at(3)
    gone = scene.blocks.pop()
    assert gone.color not in find_blocks(render_fixed(scene, 64))


def test_an_instruction_names_its_first_object():
    assert named_object("put the red block in the white zone") == ("block", "red")
    assert named_object("reach the black zone") == ("zone", "black")


def test_the_scene_of_a_demonstration_is_found_in_its_world():
    for world, name in (("cells", "tabletop"), ("free", "tabletop-free")):
        positions = [
            np.stack([b.position for b in scene.blocks])
            for scene in (scene_of(f"{name}-0000007"), scene_at(7, world))
        ]
        np.testing.assert_array_equal(*positions)
    assert len(scene_at(7, "free").blocks) == 5
