"""The cameras of the tabletop."""

from __future__ import annotations

import numpy as np

from tests.simulators.tabletop.test_tabletop_env import scene
from univla_jax.simulators.tabletop import tabletop_render
from univla_jax.simulators.tabletop.tabletop_env import BLOCK_RGB


def test_the_fixed_camera_shows_each_block_where_it_is():
    table = scene({"red": (0.25, 0.75)}, gripper_at=(0.8, 0.2))
    image = tabletop_render.render_fixed(table, 110)
    row, column = round((1.05 - 0.75) * 100), round((0.05 + 0.25) * 100)
    distance = np.abs(image[row - 4, column - 4].astype(int) - BLOCK_RGB["red"]).max()
    assert distance < 60


def test_points_of_the_frame_and_of_the_table_are_inverse():
    view = tabletop_render.View((0.3, 0.6), 0.4, 64)
    np.testing.assert_allclose(view.to_frame([0.3, 0.6]), [0.5, 0.5])
    np.testing.assert_allclose(view.to_frame([0.1, 0.8]), [0, 0], atol=1e-12)  # left, far
    points = np.random.default_rng(0).random((5, 2))
    np.testing.assert_allclose(view.to_table(view.to_frame(points)), points)


def test_the_wrist_camera_moves_with_the_gripper_and_widens_with_height():
    near = scene({"red": (0.5, 0.6)}, height=0.05)
    far = scene({"red": (0.5, 0.6)}, height=0.3)
    elsewhere = scene({"red": (0.5, 0.6)}, gripper_at=(0.1, 0.1), height=0.05)

    def reds(table):
        image = tabletop_render.render_wrist(table, 64).astype(int)
        return int(((image[..., 0] > 150) & (image[..., 1] < 90)).sum())

    assert reds(near) > reds(far) > reds(elsewhere) == 0


def test_a_turned_camera_shows_the_picture_turned():
    table = scene({"red": (0.25, 0.75), "blue": (0.6, 0.4)}, gripper_at=(0.8, 0.2))
    plain = tabletop_render.render_fixed(table, 64).astype(int)
    quarter = tabletop_render.Look(angle=np.pi / 2)
    turned = tabletop_render.render_fixed(table, 64, quarter).astype(int)
    # A camera turned counterclockwise sees everything turned clockwise.
    assert np.abs(np.rot90(plain, -1) - turned).max() <= 1


def test_light_scales_the_colors_and_stays_in_range():
    table = scene({"red": (0.25, 0.75)}, gripper_at=(0.8, 0.2))
    plain = tabletop_render.render_fixed(table, 32).astype(int)
    bright = tabletop_render.render_fixed(table, 32, tabletop_render.Look(gain=(2.0, 1.0, 0.5)))
    assert np.abs(np.minimum(2 * plain[..., 0], 255) - bright[..., 0]).max() <= 1
    np.testing.assert_array_equal(plain[..., 1], bright[..., 1])
