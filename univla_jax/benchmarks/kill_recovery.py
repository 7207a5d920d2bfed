"""Goodput of a run on several processes of which one is killed again and again.

    python -m univla_jax.benchmarks.kill_recovery --processes=4 --kills=20 --out=DIR \\
        --config=configs/quickstart.py:world_model --config.data.stores="('W/tokens/train',)" ...

The run is started once without kills and once with them, on CPU devices of this machine that are
joined by ``jax.distributed``. A random process is killed (SIGKILL) at a random time behind the
first step of each start; the others have to end by themselves, and all are started again. Both
runs have to write the same metrics. What a kill costs in seconds does not depend on how often one
comes, so the table also says how far apart kills may lie for a goodput of 95 %.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from univla_jax import cli, io
from univla_jax.benchmarks.harness import print_cases, save
from univla_jax.config import build_config
from univla_jax.errors import ExitStatus, UserError
from univla_jax.training import goodput
from univla_jax.training.goodput import GOODPUT_FILE
from univla_jax.training.metrics import METRICS_FILE
from univla_jax.training.train_config import TrainConfig

CONFIG = cli.config_flag()
OUT = cli.string_flag("out", "folder of both runs")
PROCESSES = flags.DEFINE_integer("processes", 4, "Processes of a run", 1, allow_override=True)
KILLS = flags.DEFINE_integer("kills", 20, "How many kills", 0)
SECONDS = flags.DEFINE_float(
    "kill_seconds", 20.0, "A kill comes at most so many seconds behind the first step", 0.0
)
SEED = flags.DEFINE_integer("seed", 0, "Of the times and the processes", allow_override=True)

_ASKED_GOODPUT = 0.95
_LEAVE_SECONDS = 120  # in which processes have to notice that one of them is gone


def measure(
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    processes: int,
    kills: int,
    most_seconds: float,
    seed: int = 0,
) -> dict[str, Any]:
    """Trains without and with kills, and compares.

    Args:
      config: of the training; every step of it is logged.
      out: folder that gets the workdirs ``unbroken`` and ``killed``.
      processes: of a run.
      kills: how many.
      most_seconds: behind the first step of a start within which its kill comes.
      seed: of the times and the processes.

    Returns:
      kills; whether both runs wrote the same metrics; the goodput, the seconds that went into what
      else, and the seconds between two kills that give a goodput of 95 %.

    Raises:
      UserError: a run ends by itself in another way, or before all kills are done.
    """
    out, rng = io.absolute_path(out), np.random.default_rng(seed)
    arguments = [f"--config={_write_config(config, out)}"]
    _finish(_start(arguments, out / "unbroken", processes), out / "unbroken")
    workdir = out / "killed"
    for number in range(kills):
        running = _start(arguments, workdir, processes)
        begun = len(_events(workdir))
        while not any(line["event"] == "step" for line in _events(workdir)[begun:]):
            _require_running(running, workdir)
            time.sleep(0.05)
        time.sleep(float(rng.uniform(0, most_seconds)))
        if running[0].poll() is not None:
            raise UserError(
                f"the run ended after {number} of {kills} kills; raise --config.total_steps"
            )
        # Any process may go, the coordinator too: then the others lose what joined them.
        victim = int(rng.integers(processes))
        running[victim].send_signal(signal.SIGKILL)
        _let_others_leave(running, victim, workdir)
    _finish(_start(arguments, workdir, processes), workdir)
    # Up to the last checkpoint before a kill steps count once; what was done again is lost.
    seconds = goodput.measure(_events(workdir))
    lost = seconds["total"] - seconds["good"]
    return {
        "kills": kills,
        "same metrics": _metrics(workdir) == _metrics(out / "unbroken"),
        "goodput": round(seconds["good"] / seconds["total"], 4),
        **{name: round(seconds[name], 1) for name in ("good", "startup", "redone", "down")},
        "seconds of a kill": round(lost / max(1, kills), 2),
        "apart for 95 %": round(lost / max(1, kills) / (1 - _ASKED_GOODPUT), 1),
    }


def _write_config(config: TrainConfig, out: epath.Path) -> epath.Path:
    """The config as a file, for processes that have flags of their own."""
    values = {**dataclasses.asdict(config), "log_every": 1}
    file = out / "config.py"
    lines = (
        '"""The config that the benchmark was called with."""',
        "",
        "from ml_collections import ConfigDict",
        "",
        "",
        "def get_config() -> ConfigDict:",
        f"    return ConfigDict({values!r})",
        "",
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines))
    return file


def _start(
    arguments: Sequence[str], workdir: epath.Path, processes: int
) -> list[subprocess.Popen[bytes]]:
    """All processes of a run; what each one prints goes into a file beside the workdir."""
    # A port that was free a moment ago: a run that is gone may still hold the one it had.
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "univla_jax.train", *arguments, f"--workdir={workdir}"]
    joined = ["--distributed", f"--coordinator={coordinator}", f"--processes={processes}"]
    started = []
    for number in range(processes):
        with open(_log(workdir, number), "ab") as log:
            own = [*command, *joined, f"--process={number}"]
            started.append(subprocess.Popen(own, stdout=log, stderr=subprocess.STDOUT))
    return started


def _log(workdir: epath.Path, number: int) -> str:
    return f"{workdir}.{number}.log"


def _events(workdir: epath.Path) -> list[dict[str, Any]]:
    file = workdir / GOODPUT_FILE
    return io.read_jsonl(file) if file.exists() else []


def _require_running(running: Sequence[subprocess.Popen[bytes]], workdir: epath.Path) -> None:
    for number, process in enumerate(running):
        if process.poll() is not None:
            for other in running:
                other.kill()
            raise UserError(
                f"process {number} ended with status {process.returncode}; see "
                f"{_log(workdir, number)}"
            )


def _let_others_leave(
    running: Sequence[subprocess.Popen[bytes]], victim: int, workdir: epath.Path
) -> None:
    """Waits until all have ended, each with the status of a lost peer."""
    until = time.monotonic() + _LEAVE_SECONDS
    for number, process in enumerate(running):
        try:
            status = process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            for other in running:
                other.kill()
            raise UserError(
                f"process {number} did not end within {_LEAVE_SECONDS} s of the kill of process "
                f"{victim}; see {_log(workdir, number)}"
            ) from None
        if number != victim and status != ExitStatus.PEER_LOST:
            raise UserError(
                f"process {number} ended with status {status} after the kill of process {victim}; "
                f"see {_log(workdir, number)}"
            )


def _finish(running: Sequence[subprocess.Popen[bytes]], workdir: epath.Path) -> None:
    for number, process in enumerate(running):
        if process.wait() != 0:
            raise UserError(
                f"process {number} ended with status {process.returncode}; see "
                f"{_log(workdir, number)}"
            )


def _metrics(workdir: epath.Path) -> list[dict[str, Any]]:
    return io.read_jsonl(workdir / METRICS_FILE)


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    config = build_config(TrainConfig, CONFIG.value.to_dict())
    figures = measure(
        config,
        OUT.value,
        processes=PROCESSES.value,
        kills=KILLS.value,
        most_seconds=SECONDS.value,
        seed=SEED.value,
    )
    print_cases([figures])
    save([figures])


if __name__ == "__main__":
    cli.run(main)
