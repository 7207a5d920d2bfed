"""LeRobot policy whose actions come from a univla_jax policy server."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import OBS_IMAGE, OBS_IMAGES, OBS_STATE
from univla_client import ChunkQueue, Execution, RobotClient

from .configuration_univla import UnivlaConfig

_PREFIX = "observation/"


def camera_keys(wanted: Sequence[str], sent: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """Which of LeRobot's cameras each camera of the policy is.

    Args:
      wanted: cameras of the policy.
      sent: keys of the batch that hold images, in the order of the environment.
      names: the policy's camera -> LeRobot's; others take the same name, or the same place where
        none is named.

    Raises:
      ValueError: a camera that is not sent, or a name of none.
    """
    short = {key.removeprefix(f"{OBS_IMAGES}."): key for key in sent}
    unknown = [name for name in names if name not in wanted]
    if unknown:
        raise ValueError(
            f"--policy.cameras names {unknown[0]!r}; the policy has {', '.join(wanted)}"
        )
    found = []
    for place, view in enumerate(wanted):
        name = names.get(view, view)
        if name not in short and not names and place < len(sent):
            name = list(short)[place]
        if name not in short:
            raise ValueError(
                f"camera {name!r} is missing, LeRobot sends {', '.join(short) or 'none'}; "
                'say which is which: --policy.cameras=\'{"OURS": "THEIRS"}\''
            )
        found.append(short[name])
    return found


def frames_of(images: torch.Tensor) -> np.ndarray:
    """uint8 [B, H, W, 3] of LeRobot's float [B, 3, H, W] in 0 … 1."""
    scaled = (images.detach().cpu() * 255).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(scaled.permute(0, 2, 3, 1).numpy())


class UnivlaPolicy(PreTrainedPolicy):
    """One robot at the server for every environment of the batch; they are answered together."""

    config_class = UnivlaConfig
    name = "univla"

    def __init__(self, config: UnivlaConfig, **_: Any) -> None:
        """Connects.

        Raises:
          univla_client.ServerGone: there is no server, or it refuses this robot.
        """
        super().__init__(config)
        self._robots: list[tuple[RobotClient, ChunkQueue]] = []
        self._gripper_is_sign = config.gripper == "sign"
        self._add_robot()
        keys = self._robots[0][0].metadata["observation_keys"]
        self._needs_state = OBS_STATE.replace(".", "/") in keys
        self._views = [
            key.removeprefix(_PREFIX)
            for key in keys
            if key.startswith(_PREFIX) and key != _PREFIX + "state"
        ]

    def _add_robot(self) -> None:
        key = os.environ.get(self.config.api_key_variable, "")
        client = RobotClient(self.config.address, api_key=key)
        queue = ChunkQueue(client, Execution(replan_steps=self.config.replan_steps))
        self._robots.append((client, queue))

    def reset(self) -> None:
        """Begins an episode in every environment."""
        for _, queue in self._robots:
            queue.reset()

    def select_action(self, batch: dict[str, Any], **_: Any) -> torch.Tensor:
        """The actions of this step, float32 [B, A].

        Args:
          batch: ``observation.images.NAME`` float [B, 3, H, W] in 0 … 1; ``task``, B strings, where
            there are instructions; ``observation.state`` [B, P] where the policy wants it.

        Raises:
          ValueError: a camera, the state or the instruction is missing.
          univla_client.Refused: the server refuses the request.
        """
        asking = self._asking(batch)
        # All ask before any waits, so that the server answers them in one batch.
        for _, queue, request in asking:
            queue.ask(request)
        actions = np.stack([queue.take() for _, queue, _ in asking])
        if self._gripper_is_sign:
            actions[:, -1] = np.where(actions[:, -1] > 0, 1.0, -1.0)
        return torch.from_numpy(actions)

    def _asking(
        self, batch: Mapping[str, Any]
    ) -> list[tuple[RobotClient, ChunkQueue, dict[str, Any]]]:
        """The robot of each environment, with what it sees; new ones are added as needed."""
        requests = self._requests(batch)
        while len(self._robots) < len(requests):
            self._add_robot()
        return [(*robot, request) for robot, request in zip(self._robots, requests)]

    def _requests(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        sent = [key for key in batch if key == OBS_IMAGE or key.startswith(f"{OBS_IMAGES}.")]
        keys = camera_keys(self._views, sent, self.config.cameras)
        frames = [frames_of(batch[key]) for key in keys]
        prompts = batch.get("task") or [""] * len(frames[0])
        if self.config.instruction:
            prompts = [self.config.instruction] * len(prompts)
        if not all(prompts):
            raise ValueError("the environment gives no instruction; set --policy.instruction")
        if self._needs_state and OBS_STATE not in batch:
            raise ValueError(f"{OBS_STATE!r} is missing, the policy needs the robot's state")
        requests = []
        for row, prompt in enumerate(prompts):
            request: dict[str, Any] = {
                _PREFIX + view: frame[row] for view, frame in zip(self._views, frames, strict=True)
            }
            request["prompt"] = prompt
            if self._needs_state:
                request[_PREFIX + "state"] = batch[OBS_STATE][row].cpu().numpy()
            requests.append(request)
        return requests

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: UnivlaConfig | None = None, **_: Any
    ) -> UnivlaPolicy:
        """The policy of a saved config; its weights stay at the server."""
        return cls(config or UnivlaConfig.from_pretrained(pretrained_name_or_path))

    def get_optim_params(self) -> dict[str, Any]:
        """Raises RuntimeError: the weights are at the server."""
        raise RuntimeError("this policy is trained with python -m univla_jax.train")

    def forward(self, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any] | None]:
        """Raises RuntimeError: the weights are at the server."""
        raise RuntimeError("this policy is trained with python -m univla_jax.train")

    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> torch.Tensor:
        """The whole chunks, float32 [B, T, A]; for callers with a queue of their own.

        Raises:
          ValueError: as ``select_action``.
        """
        futures = [client.infer_async(request) for client, _, request in self._asking(batch)]
        chunks = np.stack([np.asarray(future.result()["actions"]) for future in futures])
        return torch.from_numpy(chunks.astype(np.float32))
