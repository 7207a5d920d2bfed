"""Trains on GPU nodes of a Slurm cluster: one process per node, requeued until the run is finished.

    python launch/slurm.py --nodes=8 --gpus=8 --time=24:00:00 --partition=gpu \\
        -- train --config=configs/libero.py:video --workdir=/shared/libero

Submits a batch job whose processes find each other through Slurm; each uses all GPUs of its node.
Two minutes before its time limit, or when it is preempted, the run saves its step and exits with
status 83; the job then requeues itself and resumes from there, as it does when a node or a network
fails. A mistake of the user ends it, and so does scancel. Run it in a checkout on a file system
that all nodes mount, with the project and its extra `cuda12` or `cuda13` installed in `.venv`. With
--dry_run the job is printed and not submitted.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys

import job
from job import ExitStatus
from shell import Shell, split_command

REQUEUED = "|".join(str(int(status)) for status in job.RESUMABLE)
_BODY = r"""
# Ahead of a time limit or a preemption Slurm signals the steps alone. Signaled itself, the script
# belongs to a job that Slurm ends, and would bring a cancelled one back to life.
ending=""
trap 'ending=1' TERM
export RUNS={runs}/$SLURM_JOB_ID
rm -rf "$RUNS"
srun --kill-on-bad-exit=0 --export=ALL bash -c \
  'STATE="$RUNS/$SLURM_PROCID" exec bash launch/worker.sh run "$@"' run {command}
status=$?
# srun returns the largest status; a mistake of the user on one node is one of the run.
if cat "$RUNS"/*/exit_status 2>/dev/null | grep -qx {user_error}; then
  status={user_error}
fi
rm -rf "$RUNS"
restarts=${{SLURM_RESTART_COUNT:-0}}
case $status in
  0 | {user_error}) exit $status ;;
  {requeued}) most={restarts} ;;
  *) most={retries} ;; # a crash
esac
if ((restarts >= most)); then
  echo "error: ended with status $status after $restarts restarts; giving up" >&2
  exit $status
fi
if [[ -n $ending ]]; then
  exit $status
fi
echo "ended with status $status; restart $((restarts + 1))"
scontrol requeue "$SLURM_JOB_ID"
exit $status
"""


def script(options: argparse.Namespace) -> str:
    """The batch script that the command line asks for."""
    settings = {
        "job-name": options.name,
        "nodes": options.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": options.gpus,
        "cpus-per-task": options.cpus,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "output": f"{options.name}-%j.log",
        "open-mode": "append",
        "signal": "TERM@120",
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in settings.items() if value]
    body = _BODY.format(
        runs=shlex.quote(str(job.REPOSITORY / ".run")),
        command=shlex.join(job.arguments(options.command)),
        user_error=int(ExitStatus.USER_ERROR),
        requeued=REQUEUED,
        restarts=options.restarts,
        retries=options.retries,
    )
    change = f"cd {shlex.quote(str(job.REPOSITORY))} || exit 2"
    return "\n".join(["#!/bin/bash", *lines, "#SBATCH --requeue", change]) + body


def main() -> None:
    """Submits the job."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("slurm.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("--name", default="univla", help="name of the job")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="per node; 0 for nodes without")
    parser.add_argument("--cpus", type=int, default=0, help="per node; default: the cluster's")
    parser.add_argument("--time", default="24:00:00")
    parser.add_argument("--partition", default="")
    parser.add_argument("--account", default="")
    parser.add_argument("--restarts", type=int, default=1000, help="after which it gives up")
    parser.add_argument("--retries", type=int, default=5, help="the same where it crashed")
    job.add_options(parser)
    own, command = split_command(sys.argv[1:])
    options = parser.parse_args(own, argparse.Namespace(command=command))
    # Slurm hands the environment of sbatch on to the job and keeps it for restarts: no value
    # stands in the script or on a command line.
    defaults = dict(job.GPU_ENVIRONMENT) if options.gpus else {}
    if options.gpus and "XLA_FLAGS" in os.environ:
        defaults["XLA_FLAGS"] += f" {os.environ['XLA_FLAGS']}"
    variables = job.environment(options, defaults)
    if options.dry_run:
        for key in variables:
            print(f"# with {key} set")
    Shell(options.dry_run).run(["sbatch", "--export=ALL"], stdin=script(options), env=variables)


if __name__ == "__main__":
    main()
