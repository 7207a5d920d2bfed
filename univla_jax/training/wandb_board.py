"""Metrics to Weights & Biases, beside TensorBoard."""

from __future__ import annotations

import pathlib
from typing import Any

from univla_jax.errors import UserError

FILE = "wandb_id"


class WandbBoard:
    """One run of a project; a workdir that is resumed goes on with its run."""

    def __init__(self, project: str, workdir: pathlib.Path, config: dict[str, Any]) -> None:
        """Opens the run of ``workdir``.

        Raises:
          UserError: wandb is not installed.
        """
        try:
            import wandb
        except ImportError as error:
            raise UserError("--wandb needs wandb; pip install 'univla_jax[wandb]'") from error
        file = workdir / FILE
        if not file.exists():
            file.write_text(wandb.util.generate_id(), "utf-8")
        self._run = wandb.init(
            project=project,
            dir=workdir,
            id=file.read_text("utf-8"),
            name=workdir.name,
            config=config,
            resume="allow",
        )
        self._step, self._values = -1, {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Adds one point to the curve ``tag``; points of one step are sent together."""
        if step != self._step:
            self.flush()
            self._step = step
        self._values[tag] = value

    def flush(self) -> None:
        """Sends what is buffered."""
        if self._values:
            self._run.log(self._values, step=self._step)
        self._values = {}

    def close(self) -> None:
        """Ends the run."""
        self.flush()
        self._run.finish()
