"""Trains on a TPU slice of Google Cloud VMs: creates it, installs, starts, shows logs, deletes it.

    python launch/tpu_vm.py keep NAME --zone=us-east5-a --type=v5p-128 --spot \\
        --nfs=10.0.0.2:/share -- train --config=configs/libero.py:video --workdir=/mnt/shared/libero

``keep`` does everything and waits: when the slice is preempted it creates another one, installs and
resumes from the newest checkpoint; it ends when the run does. The same in single steps:

    create   a queued resource (v5litepod-256, v5p-128 (64 chips), v6e-64, ...)
    install  this checkout on all workers, in a virtual environment, and the shared folder
    start    the command on all workers; output goes to train.log
    logs     follow train.log of worker 0
    stop     SIGTERM: the run saves its step and exits with status 83
    delete   the queued resource and its VMs

All workers must be able to write --workdir: --nfs mounts a Filestore share at /mnt/shared. With
--dry_run every command is printed and none is run.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys
import time

from shell import Shell, fail, split_command

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
ARCHIVE = "univla_jax.tar.gz"
HOME = "univla_jax"
MOUNT = "/mnt/shared"
RUNTIMES = {
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
TERMINATED = ("SUSPENDED", "SUSPENDING", "FAILED")
FINISHED, USER_ERROR = "0", "2"  # exit statuses after which a restart is of no use
POLL_SECONDS = 30


class Slice:
    """A queued resource and its VMs."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Stores the options of the command line."""
        self.options, self.shell = options, Shell(options.dry_run)

    def _cloud(self, group: str, action: str, *rest: str) -> list[str]:
        project = [f"--project={self.options.project}"] if self.options.project else []
        where = [self.options.name, f"--zone={self.options.zone}", *project]
        return ["gcloud", "compute", "tpus", group, action, *where, *rest]

    def _ssh(self, command: str, worker: str = "all") -> list[str]:
        return self._cloud("tpu-vm", "ssh", f"--worker={worker}", f"--command={command}")

    def create(self) -> None:
        """Requests the slice."""
        options = self.options
        if not options.type:
            fail("--type is missing, for example --type=v5p-128")
        generation = options.type.split("-")[0]
        runtime = options.runtime or RUNTIMES.get(generation)
        if runtime is None:
            fail(
                f"--type={options.type}: no runtime known for {generation!r}; known: "
                f"{', '.join(RUNTIMES)}; or give --runtime"
            )
        request = [f"--node-id={options.name}", f"--accelerator-type={options.type}"]
        spot = ["--spot"] if options.spot else []
        command = self._cloud("queued-resources", "create", *request)
        self.shell.run([*command, f"--runtime-version={runtime}", *spot])

    def state(self) -> str | None:
        """State of the queued resource, such as ACTIVE; None if there is none."""
        return self.shell.output(
            self._cloud("queued-resources", "describe", "--format=value(state.state)")
        )

    def install(self) -> None:
        """Copies this checkout to all workers and installs it."""
        archive = REPOSITORY / ARCHIVE
        pack = ["git", "-C", str(REPOSITORY), "archive", "--format=tar.gz", f"--output={archive}"]
        self.shell.run([*pack, "HEAD"])
        to = f"{self.options.name}:{ARCHIVE}"
        where = [f"--zone={self.options.zone}", "--worker=all"]
        project = [f"--project={self.options.project}"] if self.options.project else []
        copy = ["gcloud", "compute", "tpus", "tpu-vm", "scp", str(archive), to, *where, *project]
        self.shell.run(copy)
        if not self.options.dry_run:
            archive.unlink()
        self.shell.run(self._ssh(_install_command(self.options.nfs)))

    def start(self) -> None:
        """Starts the command on all workers and returns."""
        self.shell.run(self._ssh(_start_command(self.options.command)))

    def exit_status(self) -> str | None:
        """Exit status on worker 0; "" while the run goes on, None if the worker does not answer."""
        return self.shell.output(self._ssh(f"cat {HOME}/exit_status 2>/dev/null || true", "0"))

    def logs(self) -> None:
        """Follows the output of worker 0."""
        self.shell.run(self._ssh(f"tail -n +1 -F {HOME}/train.log", "0"), check=False)

    def stop(self) -> None:
        """Makes the run save its step and exit."""
        self.shell.run(self._ssh("pkill -TERM -f univla_jax[.] || true"))

    def delete(self) -> None:
        """Deletes the slice."""
        self.shell.run(self._cloud("queued-resources", "delete", "--force", "--quiet"))

    def keep(self) -> None:
        """Creates, installs and starts, again after every preemption, until the run has ended."""
        # A small polled state machine: no slice, requested, ACTIVE, started, ended. A preempted
        # slice must be deleted before its name can be requested again. A run that ended with
        # another status than the two below (preempted, lost a worker, crashed) is started once
        # more on the same slice; the training command resumes by itself.
        started = False
        while True:
            state = self.state()
            if state in TERMINATED:
                self.delete()
                state = None
            if not state:
                self.create()
                started = False
            if self.options.dry_run or (state == "ACTIVE" and not started):
                self.install()
                self.start()
                started = True
            ended = self.exit_status() if started else ""
            if self.options.dry_run or ended in (FINISHED, USER_ERROR):
                break
            if ended:
                print(f"the run ended with status {ended}; restarting it", file=sys.stderr)
                started = False
                continue
            time.sleep(self.options.poll_seconds)
        self.delete()
        if ended == USER_ERROR:
            fail("the run ended with status 2; its message is in train.log")


def _install_command(nfs: str) -> str:
    share = (
        f"sudo mkdir -p {MOUNT} && (mountpoint -q {MOUNT} || "
        f"(sudo apt-get -qq install -y nfs-common && sudo mount -t nfs {shlex.quote(nfs)} {MOUNT}))"
    )
    steps = [
        "sudo apt-get -qq update",
        "sudo apt-get -qq install -y python3.11 python3.11-venv",
        *([share] if nfs else []),
        f"mkdir -p {HOME} && tar xzf {ARCHIVE} -C {HOME}",
        f"cd {HOME}",
        "source launch/environment.sh",
        "PYTHON=python3.11 install_project tpu",
    ]
    return " && ".join(steps)


def _start_command(command: list[str]) -> str:
    if not command:
        fail("no command; write it behind --, for example -- train --config=... ")
    module, *rest = command
    train = shlex.join([".venv/bin/python", "-m", f"univla_jax.{module}", "--distributed", *rest])
    # Detached from the SSH session, with its exit status in a file, so that ``keep`` can be ended
    # and started again. A run left over from before is killed first: two must not share a workdir.
    inner = f"{train} > train.log 2>&1; echo $? > exit_status"
    return (
        f"cd {HOME} && (pkill -KILL -f univla_jax[.] || true) && rm -f exit_status && "
        f"setsid nohup bash -c {shlex.quote(inner)} > /dev/null 2>&1 < /dev/null &"
    )


def _parse(arguments: list[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tpu_vm.py", description=__doc__, formatter_class=formatter)
    actions = ["keep", "create", "state", "install", "start", "logs", "stop", "delete"]
    parser.add_argument("action", choices=actions)
    parser.add_argument("name", help="name of the queued resource and its VMs")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", default="", help="default: gcloud's own")
    parser.add_argument("--type", default="", help="accelerator type, for example v5p-128")
    parser.add_argument("--runtime", default="", help="TPU software version; default by type")
    parser.add_argument("--spot", action="store_true", help="cheaper, may be preempted")
    parser.add_argument("--nfs", default="", help=f"SERVER:/SHARE to mount at {MOUNT}")
    parser.add_argument("--poll_seconds", type=float, default=POLL_SECONDS)
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run none")
    own, command = split_command(arguments)
    return parser.parse_args(own, argparse.Namespace(command=command))


def main() -> None:
    """Runs the action of the command line."""
    options = _parse(sys.argv[1:])
    result = getattr(Slice(options), options.action)()
    if result:
        print(result)


if __name__ == "__main__":
    main()
