"""NAVSIM agent that drives exported predictions; copy it to ``navsim/agents`` of your environment.

    python -m univla_jax.evaluate --benchmark=navsim --assets=DATA --suite=navtest \\
        --checkpoint=WORKDIR --out=OUT --export=PREDICTIONS
    python navsim/planning/script/run_pdm_score.py train_test_split=navtest \\
        agent=prediction_agent agent.folder=PREDICTIONS metric_cache_path=CACHE

Each ``<token>.json`` holds ``action``, 8 motions as DriveVLA-W0's ``emu_vla_agent`` reads them, and
``poses``, the 8 absolute poses that they compose to, which are what is driven here.
"""

import json
import pathlib

import numpy as np
from navsim.agents.abstract_agent import AbstractAgent
from navsim.common.dataclasses import AgentInput, Scene, SensorConfig, Trajectory
from nuplan.planning.simulation.trajectory.trajectory_sampling import TrajectorySampling


class PredictionAgent(AbstractAgent):
    """Looks the trajectory of a scene up by the token of its present frame."""

    requires_scene = True

    def __init__(self, folder: str) -> None:
        """Takes the folder of the predictions."""
        self._folder = pathlib.Path(folder)
        sampling = TrajectorySampling(time_horizon=4, interval_length=0.5)
        try:
            super().__init__(sampling)
        except TypeError:  # v1.1
            super().__init__()
        self._trajectory_sampling = sampling

    def name(self) -> str:
        """For logs."""
        return self.__class__.__name__

    def initialize(self) -> None:
        """Has nothing to load."""

    def get_sensor_config(self) -> SensorConfig:
        """No sensor is read: the predictions are made."""
        return SensorConfig.build_no_sensors()

    def compute_trajectory(self, agent_input: AgentInput, scene: Scene) -> Trajectory:
        """The exported poses."""
        del agent_input
        token = scene.scene_metadata.initial_token
        values = json.loads((self._folder / f"{token}.json").read_text())
        return Trajectory(np.array(values["poses"], np.float32), self._trajectory_sampling)
