"""Writes a package ``libero`` that behaves as hf-libero does where the adapter touches it."""

from __future__ import annotations

import pathlib

_ROOT = """
import os
_assets_path_cache = None
if not os.path.exists(os.path.join(os.environ["LIBERO_CONFIG_PATH"], "config.yaml")):
    input("Do you want to specify a custom path? ")
"""
_BENCHMARK = """
import collections
Task = collections.namedtuple("Task", "name language")
class Suite:
    def get_task(self, i): return Task(f"close_drawer_{i}", f"close drawer {i}")
    def get_task_init_states(self, i): return [10 * i + n for n in range(50)]
    def get_task_bddl_file_path(self, i): return f"task_{i}.bddl"
def get_benchmark(name): return Suite
"""
_ENVS = '''
import types
import numpy as np
LOG = []
class Sim:
    def __init__(self):
        quality = types.SimpleNamespace(offsamples=4)
        self.model = types.SimpleNamespace(
            _model=types.SimpleNamespace(vis=types.SimpleNamespace(quality=quality)))
    def render(self, width, height):
        frame = np.zeros((height, width, 3), np.uint8)
        frame[0, 0] = 10, 20, 30
        return frame
class OffScreenRenderEnv:
    """Done once the gripper closed three times; pictures mark their corners."""
    def __init__(self, bddl_file_name, camera_heights, camera_widths, render_gpu_device_id):
        LOG.append(("open", bddl_file_name, camera_heights, camera_widths))
        self.size = {"height": camera_heights, "width": camera_widths}
        self.env = self
        self._initialize_sim()
    def _initialize_sim(self): self.sim = Sim()
    def seed(self, seed): LOG.append(("seed", seed))
    def reset(self):
        LOG.append(("reset",))
        self._initialize_sim()
    def close(self): LOG.append(("close",))
    def set_init_state(self, state):
        LOG.append(("state", state))
        self.closed = 0
        return self._look()
    def step(self, action):
        LOG.append(("step", *action))
        self.closed += action[-1] == 1
        return self._look(), 0.0, self.closed == 3, {}
    def _look(self):
        frame = self.sim.render(**self.size)
        wrist = frame.copy()
        wrist[0, 1] = 200
        return {"agentview_image": frame, "robot0_eye_in_hand_image": wrist,
                "robot0_eef_pos": np.array([0.1, 0.2, 0.3]),
                "robot0_eef_quat": np.array([0.0, 0.0, 1.0, 0.0]),
                "robot0_gripper_qpos": np.array([0.04, -0.04])}
'''


def write(folder: pathlib.Path) -> pathlib.Path:
    """Makes the package in ``folder`` and a folder of assets beside it, which is returned."""
    inner = folder / "libero" / "libero"
    for path, text in (("", _ROOT), ("benchmark", _BENCHMARK), ("envs", _ENVS)):
        (inner / path).mkdir(parents=True)
        (inner / path / "__init__.py").write_text(text)
    (folder / "libero" / "__init__.py").write_text("")
    assets = folder / "assets"
    (assets / "scenes").mkdir(parents=True)
    return assets
