"""Trains on GPU nodes of a Slurm cluster: one process per node, requeued until the run has ended.

    python launch/slurm.py --nodes=8 --gpus=8 --time=24:00:00 --partition=gpu \\
        -- train --config=configs/libero.py:video --workdir=/shared/libero

Submits a batch job whose processes find each other through Slurm. Two minutes before the time is
over, or when it is preempted, the run saves its step and ends with status 83; the job then puts
itself back into the queue and goes on from there. Run it from the repository, in which
`bash launch/environment.sh` made `.venv` with the extra `cuda`, on a file system that all nodes
see. With --dry_run the job is printed and not submitted.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys

from shell import Shell, fail, split_command

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
SAVED, LOST = 83, 84  # exit statuses after which the job goes on


def script(options: argparse.Namespace) -> str:
    """The batch job of the command line."""
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
            f"if [ $status -eq {SAVED} ] || [ $status -eq {LOST} ]; then",
            "  scontrol requeue $SLURM_JOB_ID",
            "fi",
            "exit $status",
            "",
        ]
    )


def main() -> None:
    """Submits the job of the command line."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("slurm.py", description=__doc__, formatter_class=shape)
    parser.add_argument("--name", default="univla", help="of the job")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="per node")
    parser.add_argument("--time", default="24:00:00")
    parser.add_argument("--partition", default="")
    parser.add_argument("--account", default="")
    parser.add_argument("--python", default=".venv/bin/python")
    parser.add_argument("--dry_run", action="store_true", help="print the job, submit nothing")
    mine, command = split_command(sys.argv[1:])
    options = parser.parse_args(mine, argparse.Namespace(command=command))
    Shell(options.dry_run).run(["sbatch"], given=script(options))


if __name__ == "__main__":
    main()
