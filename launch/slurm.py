"""Trains on GPU nodes of a Slurm cluster: one process per node, requeued until the run is finished.

    python launch/slurm.py --nodes=8 --gpus=8 --time=24:00:00 --partition=gpu \\
        -- train --config=configs/libero.py:video --workdir=/shared/libero

Submits a batch job whose processes find each other through Slurm. Two minutes before its time
limit, or when it is preempted, the run saves its step and exits with status 83; the job then
requeues itself and resumes from there. Run it in a checkout on a file system that all nodes mount,
with the project and its extra `cuda` installed in `.venv`. With --dry_run the job is printed and
not submitted.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys

from shell import Shell, fail, split_command

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
PREEMPTED, PEER_LOST = 83, 84  # exit statuses after which the job is requeued


def script(options: argparse.Namespace) -> str:
    """The batch script that the command line asks for."""
    if not options.command:
        fail("no command; write it behind --, for example -- train --config=...")
    module, *rest = options.command
    train = shlex.join(
        [options.python, "-m", f"univla_jax.{module}", "--distributed", *rest],
    )
    settings = {
        "job-name": options.name,
        "nodes": options.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": options.gpus,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "output": f"{options.name}-%j.log",
        "open-mode": "append",
        # Slurm signals the steps only, not this script: the script must live on to requeue the job.
        "signal": "TERM@120",
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in settings.items() if value]
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "#SBATCH --requeue",
            f"cd {shlex.quote(str(REPOSITORY))}",
            f"srun --kill-on-bad-exit=0 {train}",
            "status=$?",
            f"if [ $status -eq {PREEMPTED} ] || [ $status -eq {PEER_LOST} ]; then",
            "  scontrol requeue $SLURM_JOB_ID",
            "fi",
            "exit $status",
            "",
        ]
    )


def main() -> None:
    """Submits the job."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("slurm.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("--name", default="univla", help="name of the job")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="per node")
    parser.add_argument("--time", default="24:00:00")
    parser.add_argument("--partition", default="")
    parser.add_argument("--account", default="")
    parser.add_argument("--python", default=".venv/bin/python")
    parser.add_argument("--dry_run", action="store_true", help="print the job, submit nothing")
    own, command = split_command(sys.argv[1:])
    options = parser.parse_args(own, argparse.Namespace(command=command))
    Shell(options.dry_run).run(["sbatch"], stdin=script(options))


if __name__ == "__main__":
    main()
