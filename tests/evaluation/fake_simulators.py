"""Simulators that compute nothing but can be counted on."""

from __future__ import annotations

import os
import pathlib
import time

import numpy as np

from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.simulators.base import Benchmark, StepResult, Trial


class Countdown:
    """Succeeds in even trials after ``task + 2`` actions; ends after 6 at the latest."""

    def __init__(self, trouble: str = "", folder: str = "") -> None:
        if trouble == "refuse":
            raise UserError("no such assets: 'nowhere'")
        self.trouble, self.folder = trouble, folder

    def reset(self, job):
        self.looked = True
        self.job, self.steps, self.total = job, 0, 0.0
        if job == Trial(1, 1) and self.trouble:
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
        assert self.looked
        frame = np.full((4, 4, 3), self.steps, np.uint8)
        return Observation(f"count to {self.job.task + 2}", {"image": frame})

    def step(self, action, look=True):
        self.steps, self.looked = self.steps + 1, look
        self.total += float(action.sum())
        return StepResult.ENDED if self._success() or self.steps == 6 else StepResult.CONTINUES

    def _success(self):
        return self.job.trial % 2 == 0 and self.steps >= self.job.task + 2

    def result(self):
        outcome = {"success": self._success(), "steps": self.steps, "total": round(self.total, 4)}
        return {"task": f"task {self.job.task}", **outcome}

    def picture(self):
        assert self.looked
        return np.full((32, 32, 3), 40 * self.steps, np.uint8)

    def versions(self):
        return {"countdown": "1"}


class MakeCountdown:
    """A factory that travels to the worker."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __call__(self):
        return Countdown(*self.arguments)


def countdown(*arguments, tasks=2, trials=3, **changes):
    """The benchmark of these simulators."""
    jobs = tuple(Trial(t, i) for t in range(tasks) for i in range(trials))
    make = MakeCountdown(*map(str, arguments))
    return Benchmark("countdown", {"benchmark": "countdown"}, jobs, make, **changes)
