"""The state of a robosuite simulation as scripts read it, and how to go back to an earlier one.

Axes: N corners.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from univla_jax.environments.arm import Box

_HAND = "gripper0_grip_site"


class MujocoScene:
    """``Scene`` of a robosuite simulation."""

    def __init__(self, sim: Any) -> None:
        """Reads ``sim`` whenever it is asked."""
        self._sim = sim
        self._shapes: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def hand(self) -> tuple[np.ndarray, Rotation]:
        """Centre between the fingertips [3] and where the hand is turned."""
        data = self._sim.data
        turn = Rotation.from_matrix(data.get_site_xmat(_HAND).copy())
        return data.get_site_xpos(_HAND).copy(), turn

    def place(self, name: str) -> np.ndarray:
        """Position [3] of a body or site."""
        data = self._sim.data
        read = data.get_body_xpos if name in self._sim.model.body_names else data.get_site_xpos
        return read(name).copy()

    def box(self, name: str) -> Box:
        """What a body takes up, by the shapes that collide."""
        if name not in self._shapes:
            self._shapes[name] = self._measure(name)
        middle, half = self._shapes[name]
        axes = self._sim.data.get_body_xmat(name).copy()
        return Box(self._sim.data.get_body_xpos(name) + axes @ middle, axes, half)

    def _measure(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Middle and half lengths [3] of the box along the axes of a body."""
        model = self._sim.model._model
        body = self._sim.model.body_name2id(name)
        shapes = [
            shape
            for shape in range(model.ngeom)
            if model.geom_bodyid[shape] == body and model.geom_contype[shape]
        ]
        corners = np.concatenate([self._corners(shape, body) for shape in shapes])
        low, high = corners.min(0), corners.max(0)
        return (low + high) / 2, (high - low) / 2

    def _corners(self, shape: int, body: int) -> np.ndarray:
        """Points [N, 3] on the box around a collision shape, in the axes of its body."""
        import mujoco

        model, data = self._sim.model._model, self._sim.data._data
        axes = data.xmat[body].reshape(3, 3)
        turn = axes.T @ data.geom_xmat[shape].reshape(3, 3)
        centre = axes.T @ (data.geom_xpos[shape] - data.xpos[body])
        kinds = mujoco.mjtGeom
        kind, half = model.geom_type[shape], model.geom_size[shape].copy()
        if kind == kinds.mjGEOM_MESH:
            mesh = model.geom_dataid[shape]
            first = model.mesh_vertadr[mesh]
            points = model.mesh_vert[first : first + model.mesh_vertnum[mesh]]
            return points @ turn.T + centre
        if kind == kinds.mjGEOM_CYLINDER:
            half = half[[0, 0, 1]]
        elif kind == kinds.mjGEOM_SPHERE:
            half = half[[0, 0, 0]]
        reach = np.abs(turn) @ half
        return np.stack([centre - reach, centre + reach])


def bookmark(env: Any) -> Callable[[], None]:
    """Remembers where a robosuite environment is.

    Beside MuJoCo's own state that is the controllers' goals, how far the grippers are told to
    open, and the clock; all else follows from these at the next step.

    Args:
      env: a robosuite environment.

    Returns:
      a function that goes back there, to the bit.
    """
    import mujoco

    model, data = env.sim.model._model, env.sim.data._data
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, state, kind)
    holders = [
        (env, ("timestep", "cur_time", "done")),
        *((robot.controller, ("goal_pos", "goal_ori", "new_update")) for robot in env.robots),
        *((robot.gripper, ("current_action",)) for robot in env.robots),
    ]
    values = [
        (holder, name, _copy(getattr(holder, name))) for holder, names in holders for name in names
    ]

    def back() -> None:
        mujoco.mj_setState(model, data, state, kind)
        mujoco.mj_forward(model, data)
        mujoco.mj_setState(model, data, state, kind)  # the solver's start, which that changed
        for holder, name, value in values:
            setattr(holder, name, _copy(value))

    return back


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, np.ndarray) else value
