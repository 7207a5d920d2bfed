"""CALVIN's packages on Python 3.11: stand-ins for what is not needed, the scene, the chains.

``calvin_env`` and ``calvin_agent`` import packages that the evaluation does not use, some of which
no longer install. ``open_calvin`` puts empty modules in their place, so it belongs in a process of
its own.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from univla_jax.errors import UserError
from univla_jax.simulators import commit_of

INSTALL = "launch/simulators/calvin.sh installs it, and prints the --simulator_python to give"
COMPOSED_SCENE = "calvin_scene_D, composed from calvin_env's own configuration"
CAMERAS = ("static", "gripper")
RENDERERS = ("egl", "tiny")
_CHAINS = pathlib.Path(__file__).with_name("chains.json")
_MERGED_CONFIG = pathlib.Path("validation", ".hydra", "merged_config.yaml")
_FNV_PRIME, _UINT32 = 0x01000193, 0xFFFFFFFF

Chain = tuple[dict[str, Any], list[str]]


def official_chains() -> list[Chain]:
    """CALVIN's 1,000 chains: conditions of the first state, and five names of tasks, in order.

    They are what ``calvin_agent.evaluation.multistep_sequences.get_sequences(1000)`` computes in
    two minutes.
    """
    data, states = _chain_data(), first_conditions()
    return [(states[first], [data["tasks"][t] for t in tasks]) for first, *tasks in data["chains"]]


def first_conditions() -> list[dict[str, Any]]:
    """The 192 conditions of a first state that CALVIN's chains begin in."""
    data = _chain_data()
    return [dict(zip(data["conditions"], values, strict=True)) for values in data["states"]]


@functools.cache
def _chain_data() -> dict[str, Any]:
    return json.loads(_CHAINS.read_text(encoding="utf-8"))


def fnv1_32(text: str) -> int:
    """The hash of ``pyhash.fnv1_32``, from which CALVIN seeds the places of its blocks.

    It starts at 0, not at FNV's offset basis, and takes the bytes of UTF-16.
    """
    value = 0
    for byte in text.encode("utf-16-le"):
        value = (value * _FNV_PRIME & _UINT32) ^ byte
    return value


@dataclasses.dataclass(frozen=True)
class Calvin:
    """An open scene, and what decides on its tasks.

    Attributes:
      env: ``calvin_env``'s environment; its only one in this process.
      oracle: says which tasks were done between two states.
      instructions: task -> words.
      initial_state: conditions -> state of the robot [15] and of the scene [24].
      scene: which one, for the report.
      commits: of the two repositories.
    """

    env: Any
    oracle: Any
    instructions: dict[str, str]
    initial_state: Callable[[dict[str, Any]], tuple[np.ndarray, np.ndarray]]
    scene: str
    commits: dict[str, str]

    def begin(self, robot: np.ndarray, scene: np.ndarray) -> dict[str, Any]:
        """Loads everything anew, at states of the robot [15] and of the scene [24].

        ``env.reset`` leaves what was before in the physics engine, and its gripper: so no episode
        depends on another.
        """
        self.env.load()
        self.env.robot.gripper_action = 1
        return self.env.reset(robot_obs=robot, scene_obs=scene)


def open_calvin(dataset: str | None, renderer: str) -> Calvin:
    """Opens scene D.

    Args:
      dataset: folder of CALVIN's data set, whose ``validation`` describes the scene; None composes
        the scene from the configuration of ``calvin_env``.
      renderer: ``"egl"`` as CALVIN's authors render, or ``"tiny"``, pybullet's own.

    Raises:
      UserError: a package is missing, or installed without its configuration files.
    """
    _install_stand_ins()
    try:
        import calvin_agent
        import calvin_env
        import hydra
        from calvin_agent.evaluation import utils
        from omegaconf import OmegaConf
    except ModuleNotFoundError as error:
        raise UserError(f"CALVIN needs the package {error.name}; {INSTALL}") from error
    conf = _configuration(calvin_agent)
    tasks = OmegaConf.load(conf / "callbacks/rollout/tasks/new_playtable_tasks.yaml")
    words = OmegaConf.load(conf / "annotations/new_playtable_validation.yaml")
    config = _dataset_config(dataset) if dataset else _composed_config(_configuration(calvin_env))
    # A data set's file may name a tactile camera, which needs packages that no policy here does.
    for name in set(config.cameras) - set(CAMERAS):
        del config.cameras[name]
    config.env.use_egl = renderer == "egl"
    env = hydra.utils.instantiate(config.env, show_gui=False, use_vr=False, use_scene_info=True)
    env.get_camera_obs()  # EGL draws the first picture of a process without shadows
    return Calvin(
        env=env,
        oracle=hydra.utils.instantiate(tasks),
        instructions={task: str(texts[0]) for task, texts in words.items()},
        initial_state=utils.get_env_state_for_initial_condition,
        scene=f"validation of {dataset}" if dataset else COMPOSED_SCENE,
        commits={
            package.__name__: commit_of(package.__file__) for package in (calvin_agent, calvin_env)
        },
    )


def check_renderer(renderer: str, name: str) -> None:
    """Raises UserError, which names the option, unless ``renderer`` is one of ``RENDERERS``."""
    if renderer not in RENDERERS:
        raise UserError(f"{name}: {renderer!r}, calvin has {', '.join(RENDERERS)}")


def check_dataset(dataset: str) -> None:
    """Raises UserError unless ``dataset`` describes CALVIN's scene D."""
    path = pathlib.Path(dataset) / _MERGED_CONFIG
    if not path.is_file():
        raise UserError(
            f"--assets: {dataset!r} holds no {_MERGED_CONFIG} of CALVIN's data set; without "
            "--assets the same scene is composed from calvin_env"
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    if "calvin_table_D" not in text:
        raise UserError(
            f"--assets: {path} describes another scene than D, in which all splits are evaluated"
        )


def _dataset_config(dataset: str) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.load(pathlib.Path(dataset) / _MERGED_CONFIG)


def _composed_config(conf: pathlib.Path) -> Any:
    """The configuration of scene D with both cameras, as Hydra would compose it."""
    from omegaconf import OmegaConf

    def load(name: str) -> Any:
        return OmegaConf.load(conf / f"{name}.yaml")

    robot = OmegaConf.merge(load("robot/panda"), load("robot/panda_longer_finger"))
    robot.pop("defaults")
    cameras = {name: load(f"cameras/cameras/{name}") for name in CAMERAS}
    parts = {"robot": robot, "scene": load("scene/calvin_scene_D"), "env": load(_ENV)}
    return OmegaConf.create({"data_path": "data", "use_vr": False, "cameras": cameras, **parts})


_ENV = "env/play_table_env"


def _configuration(package: types.ModuleType) -> pathlib.Path:
    """The folder ``conf`` beside a package, which only its checkout has."""
    conf = pathlib.Path(os.fspath(package.__file__)).resolve().parents[1] / "conf"
    if not conf.is_dir():
        raise UserError(
            f"{package.__name__} is installed without its folder 'conf', at {conf}; use a checkout "
            f"of its repository: {INSTALL}"
        )
    return conf


# ----------------------------------------------------------------------------
# Stand-ins for modules that are imported but not used on this path, or that do not install.


def _install_stand_ins() -> None:
    def stand_in(name: str, **content: Any) -> None:
        if name in sys.modules:
            return
        module = types.ModuleType(name)
        module.__dict__.update(content)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)

    def np_random(seed: int | None) -> tuple[np.random.Generator, int | None]:
        return np.random.default_rng(seed), seed

    stand_in("gym", Env=object)
    stand_in("gym.utils")
    stand_in("gym.utils.seeding", np_random=np_random)
    stand_in("cv2")
    stand_in("quaternion")
    # The environment logs its commit and ends where it is not in a repository.
    head = types.SimpleNamespace(object=types.SimpleNamespace(hexsha="unknown"))
    index = types.SimpleNamespace(diff=lambda other: [])
    stand_in("git", Repo=lambda **_: types.SimpleNamespace(head=head, index=index))
    stand_in("torch", Tensor=type("Tensor", (), {}))  # SciPy looks for the class
    stand_in("pyhash", fnv1_32=lambda: fnv1_32)
    try:
        importlib.import_module("calvin_agent")
    except ModuleNotFoundError as error:
        raise UserError(f"CALVIN needs the package {error.name}; {INSTALL}") from error
    stand_in("calvin_agent.models")
    stand_in("calvin_agent.models.mcil", MCIL=None)
    stand_in("calvin_agent.utils")
    stand_in("calvin_agent.utils.utils", add_text=None, format_sftp_path=None)
