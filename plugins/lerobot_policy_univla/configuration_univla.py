"""Config of the policy ``univla`` of LeRobot."""

from __future__ import annotations

from dataclasses import dataclass, field

from lerobot.configs.policies import PreTrainedConfig
from lerobot.optim.optimizers import AdamWConfig


@PreTrainedConfig.register_subclass("univla")
@dataclass
class UnivlaConfig(PreTrainedConfig):
    """Where the policy server is, and how it is asked (``--policy.NAME=VALUE``).

    Attributes:
      address: ``ws://host:port`` or ``wss://host:port`` of ``python -m univla_jax.serve``.
      api_key_variable: environment variable with the server's key, which is never saved.
      cameras: the policy's camera -> LeRobot's, the latter without ``observation.images.``; by
        default the same name, else the same place.
      instruction: for environments that give none; it stands for theirs.
      replan_steps: actions executed of each chunk before the next is asked for; 0 for all.
      gripper: ``"raw"``, or ``"sign"`` for +1 above 0 and -1 else in the last dimension, as LIBERO
        wants it.
    """

    address: str = "ws://localhost:8000"
    api_key_variable: str = "UNIVLA_API_KEY"
    cameras: dict[str, str] = field(default_factory=dict)
    instruction: str = ""
    replan_steps: int = 0
    gripper: str = "raw"

    def __post_init__(self) -> None:
        """Raises ValueError for a gripper of another name."""
        super().__post_init__()
        if self.gripper not in ("raw", "sign"):
            raise ValueError(f"--policy.gripper={self.gripper}, expected raw or sign")

    @property
    def observation_delta_indices(self) -> None:
        """None: the server keeps the history."""

    @property
    def action_delta_indices(self) -> None:
        """None: no training here."""

    @property
    def reward_delta_indices(self) -> None:
        """None: no training here."""

    def get_optimizer_preset(self) -> AdamWConfig:
        """LeRobot's default, which nothing uses: training is ``python -m univla_jax.train``."""
        return AdamWConfig()

    def get_scheduler_preset(self) -> None:
        """None."""

    def validate_features(self) -> None:
        """Cameras are compared with the server's when it is asked first."""
