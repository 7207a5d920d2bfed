"""The benchmark ``countdown``: simulators that compute nothing but can be relied on."""

from __future__ import annotations

import functools
import os
import pathlib
import time

import numpy as np

from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.simulators import BENCHMARKS, Benchmark, StepResult, Trial

BENCHMARKS["countdown"] = __name__


def _first_time(folder):
    try:
        (pathlib.Path(folder) / "started").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Countdown:
    """Succeeds in even trials after ``task + 2`` actions; ends after 6 at the latest."""

    def __init__(self, trouble: str = "", folder: str = "", other: bool = False) -> None:
        if trouble == "refuse":
            raise UserError("no such assets: 'nowhere'")
        if trouble == "no start" or (trouble == "no first start" and _first_time(folder)):
            raise RuntimeError("out of memory")
        self.trouble, self.folder, self.other = trouble, folder, other

    def reset(self, trial):
        self.rendered = True
        self.trial, self.steps, self.total = trial, 0, 0.0
        if trial == Trial(1, 1) and self.trouble and "start" not in self.trouble:
            self._misbehave()

    def _misbehave(self):
        mark = pathlib.Path(self.folder) / "once"
        if self.trouble.endswith("once") and mark.exists():
            return
        mark.touch()
        if self.trouble.startswith("die"):
            os._exit(9)
        if self.trouble.startswith("hang"):
            time.sleep(60)
        raise RuntimeError("the physics exploded")

    def observe(self):
        assert self.rendered
        frame = np.full((4, 4, 3), self.steps, np.uint8)
        verb = "wait" if self.other else "count"
        return Observation(f"{verb} to {self.trial.task + 2}", {"image": frame})

    def step(self, action, *, render=True):
        self.steps, self.rendered = self.steps + 1, render
        self.total += float(action.sum())
        return StepResult.ENDED if self._success() or self.steps == 6 else StepResult.CONTINUES

    def _success(self):
        return self.trial.trial % 2 == 0 and self.steps >= self.trial.task + 2

    def result(self):
        outcome = {"success": self._success(), "steps": self.steps, "total": round(self.total, 4)}
        return {"task": f"task {self.trial.task}", **outcome}

    def video_frame(self):
        assert self.rendered
        return np.full((32, 32, 3), 40 * self.steps, np.uint8)

    def versions(self):
        return {"countdown": "1"}


def make_benchmark(*, suite="", assets="", tasks=(0, 1), episodes_per_task=3, **fields):
    """``suite`` is the trouble of trial 1 of task 1, ``assets`` the folder where it is marked."""
    if suite == "two dimensions":
        suite, fields["action_dim"] = "", 2
    make = functools.partial(Countdown, suite, assets)
    return Benchmark(
        name="countdown",
        protocol={"benchmark": "countdown"},
        trials=tuple(Trial(task, i) for task in tasks for i in range(episodes_per_task)),
        make=make,
        variants={"other_instruction": functools.partial(make, other=True)},
        **fields,
    )
