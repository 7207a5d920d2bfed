"""A LIBERO simulator whose script says what to do next.

The scripts of ``environments/libero_scripts.py`` read the simulator's state before every action, so
they run where the simulator does. A chunk is planned by letting the script act for its length and
going back; what the campaign then sends is executed from the same state. Sent back unchanged, the
actions lead where the script went, to the bit; sent through an action tokenizer they lead near it,
and the next chunk is planned from there.

Axes: H/W pixels, A action dimensions (7).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from univla_jax.environments import libero_scripts
from univla_jax.evaluation.expert import Planned
from univla_jax.evaluation.libero_scene import MujocoScene, bookmark
from univla_jax.evaluation.libero_simulator import LiberoSimulator
from univla_jax.evaluation.simulators import Job, Turn

if TYPE_CHECKING:
    from univla_jax.evaluation.libero import LiberoProtocol


class ScriptedLibero(LiberoSimulator):
    """Observations carry the script's next actions instead of pictures."""

    def __init__(self, rules: LiberoProtocol, assets: str | None = None, *, chunk: int) -> None:
        """Finds the package and its files.

        Args:
          rules: the protocol.
          assets: as for ``LiberoSimulator``.
          chunk: actions planned at once, all of which are to be executed.

        Raises:
          UserError: ``hf-libero`` or a folder of assets is missing.
        """
        super().__init__(rules, assets)
        self._chunk = chunk
        self._script: Iterator[np.ndarray] = iter(())

    def reset(self, job: Job) -> None:
        """Begins the episode and the script of its task."""
        super().reset(job)
        script = libero_scripts.SCRIPTS[self._rules.suite][job.task]
        self._script = libero_scripts.solve(script, MujocoScene(self._env.sim))

    def observe(self) -> Planned:
        """The script's next ``chunk`` actions [chunk, A]."""
        back = bookmark(self._env.env)
        self._shutter.open = False
        plan = []
        for action in itertools.islice(self._script, self._chunk):
            plan.append(np.asarray(action, np.float32))
            self._env.step(self._rules.command(plan[-1]).tolist())
        back()
        return Planned(self._task.language, {}, None, np.stack(plan))

    def step(self, action: np.ndarray, look: bool = True) -> Turn:
        """Executes one action; nothing is drawn, since nobody looks."""
        return super().step(action, look=False)

    def picture(self) -> np.ndarray:
        """The fixed camera upright, at half size, drawn now."""
        self._shutter.open = True
        side = self._rules.render_size
        frame = self._env.sim.render(camera_name="agentview", width=side, height=side)
        return frame[::-2, ::2]
