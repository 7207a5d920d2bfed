"""Trains on TPU slices of Google Cloud VMs: creates, installs, starts, shows logs, deletes.

    python launch/tpu_vm.py keep NAME --zone=us-east5-a --type=v5p-128 --spot \\
        --nfs=10.0.0.2:/share -- train --config=configs/libero.py:video --workdir=/mnt/shared/libero

``keep`` does everything and waits: when the slice is preempted it creates another one, installs the
same code and resumes from the newest checkpoint; it ends when the run does, saves the log to
NAME.log and deletes the slice. Ended by Ctrl-C and started again, it goes on with the run that it
finds. The same in single steps:

    create   a queued resource (v4-64, v5litepod-256, v5p-128 (64 chips), v6e-64, ...)
    state    its state, such as ACTIVE
    install  this checkout on all workers, in a virtual environment, and the shared folder
    start    the command on all workers
    status   of the command on all workers
    logs     follow the output of worker 0
    stop     SIGTERM: the run saves its step and ends with status 83; keep leaves the slice then
    delete   the queued resource and its VMs

All workers must be able to write --workdir: gs://..., or --nfs mounts a Filestore share at
/mnt/shared. --node-count=N asks for N slices, trained together over the mesh axis replica. With
--dry_run every command is printed and none is run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time

import job
from job import ExitStatus
from shell import Shell, fail, split_command

FOLDER = "univla_jax"  # in the home of every worker: code/, venv/ and run/
WORKER = f"VENV=$HOME/{FOLDER}/venv STATE=$HOME/{FOLDER}/run bash {FOLDER}/code/launch/worker.sh"
PREEMPTED_STATES = ("SUSPENDING", "SUSPENDED", "FAILED")
POLL_SECONDS = 30
LONGEST_WAIT_SECONDS = 600  # between two tries of what fails
CALL_SECONDS, INSTALL_SECONDS = 300, 3600  # after which a call to the cloud counts as failed
STEADY_SECONDS = 1800  # a run that lived so long had no failure at its start
PEER_POLLS = 10  # how often to look again while some workers of an ended run are still at work


class CloudError(Exception):
    """A call to the cloud failed; the next one may not."""


class Slice:
    """A queued resource and the VMs of its nodes."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Stores the options of the command line."""
        self.options, self.shell = options, Shell(options.dry_run)
        count = options.node_count
        self.nodes = [f"{options.name}-{i}" for i in range(count)] if count > 1 else [options.name]

    def _cloud(self, *command: str) -> list[str]:
        project = [f"--project={self.options.project}"] if self.options.project else []
        where = [f"--zone={self.options.zone}", *project]
        return ["gcloud", "compute", "tpus", *command, *where]

    def _resource(self, action: str, *rest: str) -> list[str]:
        return self._cloud("queued-resources", action, self.options.name, *rest)

    def _ssh(self, node: str, command: str, worker: str = "all") -> list[str]:
        return self._cloud("tpu-vm", "ssh", node, f"--worker={worker}", f"--command={command}")

    def _on_all(self, command: str, timeout: float = CALL_SECONDS) -> str:
        """Runs a command on all workers of all nodes at once; returns what they print.

        Raises:
          CloudError: it failed on one of them, or the cloud did not answer.
        """

        def call(node: str) -> subprocess.CompletedProcess[str]:
            return self.shell.output(self._ssh(node, command), timeout=timeout)

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            done = list(pool.map(call, self.nodes))
        for node, result in zip(self.nodes, done, strict=True):
            if result.returncode:
                raise CloudError(f"{node}: {_last_line(result.stderr)}")
        return "".join(result.stdout for result in done)

    # ------------------------------------------------------------------------
    # Single steps.

    def _request(self) -> list[str]:
        options = self.options
        generation, _, size = options.type.partition("-")
        chip = next((tpu for tpu in job.TPUS.values() if generation in tpu.types), None)
        known = ", ".join(tpu.types[0] for tpu in job.TPUS.values() if tpu.runtime)
        if not options.type:
            fail("--type is missing, for example --type=v5p-128")
        if chip is None and not options.runtime:
            fail(
                f"--type={options.type}: unknown {generation!r}; known: {known}; or give --runtime"
            )
        if chip is not None and not chip.runtime and not options.runtime:
            fail(f"--type={options.type}: the cloud offers {generation} on GKE alone; see gke.py")
        generation = chip.types[0] if chip else generation
        if options.node_count > 1:
            nodes = [f"--node-count={options.node_count}", f"--node-prefix={options.name}"]
        else:
            nodes = [f"--node-id={options.name}"]
        return self._resource(
            "create",
            *nodes,
            f"--accelerator-type={generation}-{size}",
            f"--runtime-version={options.runtime or chip.runtime}",
            *(["--spot"] if options.spot else []),
        )

    def create(self) -> None:
        """Requests the slice."""
        self.shell.run(self._request())

    def state(self) -> str:
        """State of the queued resource, such as ACTIVE; "" if there is none.

        Raises:
          CloudError: the cloud did not answer.
        """
        describe = self._resource("describe", "--format=value(state.state)")
        done = self.shell.output(describe, timeout=CALL_SECONDS)
        if done.returncode == 0:
            return done.stdout.strip()
        if re.search(r"NOT_FOUND|not found", done.stderr):
            return ""
        raise CloudError(_last_line(done.stderr))

    def install(self, archive: pathlib.Path | None = None) -> None:
        """Copies this checkout to all workers and installs it.

        Args:
          archive: one that ``pack`` wrote; this checkout as it is now where None.

        Raises:
          CloudError: on one of the workers it failed.
        """
        with tempfile.TemporaryDirectory() as folder:
            archive = archive or pack(pathlib.Path(folder))
            self._copy(archive, f"{FOLDER}.tar.gz")
        unpack = (
            f"rm -rf {FOLDER}/code && mkdir -p {FOLDER}/code {FOLDER}/run && "
            f"chmod 700 {FOLDER}/run && tar xzf {FOLDER}.tar.gz -C {FOLDER}/code"
        )
        nfs = f"NFS={shlex.quote(self.options.nfs)} " if self.options.nfs else ""
        self._on_all(f"{unpack} && {nfs}{WORKER} install tpu,gcs", INSTALL_SECONDS)

    def _copy(self, file: pathlib.Path, to: str) -> None:
        for node in self.nodes:
            copy = self._cloud("tpu-vm", "scp", str(file), f"{node}:{to}", "--worker=all")
            done = self.shell.output(copy, timeout=INSTALL_SECONDS)
            if done.returncode:
                raise CloudError(f"{node}: {_last_line(done.stderr)}")

    def start(self) -> None:
        """Starts the command on all workers and returns.

        Raises:
          CloudError: on one of the workers it failed.
        """
        options = self.options
        arguments = shlex.join(job.arguments(options.command, options.node_count))
        variables = job.environment_file(job.environment(options))
        # In a file, not on a command line: it may hold secrets. Others cannot enter its folder.
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "env"
            file.touch(mode=0o600)
            file.write_text(variables, encoding="utf-8")
            self._copy(file, f"{FOLDER}/run/env")
        self._on_all(f"chmod 600 {FOLDER}/run/env && {WORKER} start {arguments}")

    def workers(self, first: bool = False) -> list[str]:
        """What ``worker.sh status`` says on all workers, or on the first alone.

        Raises:
          CloudError: one of them does not answer.
        """
        if first:
            ssh = self._ssh(self.nodes[0], f"{WORKER} status", "0")
            done = self.shell.output(ssh, timeout=CALL_SECONDS)
            if done.returncode:
                raise CloudError(_last_line(done.stderr))
            output = done.stdout
        else:
            output = self._on_all(f"{WORKER} status")
        found = re.findall(r"^worker \S+ (.+?)\s*$", output, re.MULTILINE)
        if not found and not self.options.dry_run:
            raise CloudError("no worker says how its run is")
        return found

    def status(self) -> None:
        """Prints what every worker says of its run."""
        print(self._on_all(f"{WORKER} status").rstrip())

    def logs(self) -> None:
        """Follows the output of worker 0."""
        follow = f"tail -n +1 -F {FOLDER}/run/log"
        self.shell.run(self._ssh(self.nodes[0], follow, "0"), check=False)

    def save_log(self) -> None:
        """Appends the logs of all workers to NAME.log here.

        Raises:
          CloudError: one of them does not answer.
        """
        output = self._on_all(f"{WORKER} tail 5000")
        if not self.options.dry_run:
            file = pathlib.Path(f"{self.options.name}.log")
            with file.open("a", encoding="utf-8") as log:
                log.write(output)
            _say(f"the log is in {file}")

    def stop(self) -> None:
        """Makes the run save its step and end."""
        print(self._on_all(f"{WORKER} stop", INSTALL_SECONDS).rstrip())

    def delete(self) -> None:
        """Deletes the slice.

        Raises:
          CloudError: it may still be there.
        """
        done = self.shell.output(self._resource("delete", "--force", "--quiet"), timeout=1800)
        if done.returncode and not re.search(r"NOT_FOUND|not found", done.stderr):
            raise CloudError(_last_line(done.stderr))

    # ------------------------------------------------------------------------
    # The whole run.

    def keep(self) -> int:
        """Creates, installs and starts, again after every preemption, until the run has ended."""
        if self.options.dry_run:
            for step in (self.create, self.install, self.start, self.workers):
                step()
            self.save_log()
            self.delete()
            return 0
        self._request()
        job.environment(self.options)
        job.arguments(self.options.command)
        # Packed once: what a restart installs is what the run was begun with.
        with tempfile.TemporaryDirectory() as folder:
            return Keeper(self, pack(pathlib.Path(folder))).run()


class Keeper:
    """Brings a run to its end: no slice, requested, ACTIVE, started, ended; polled."""

    def __init__(self, slice_: Slice, archive: pathlib.Path) -> None:
        """Starts with nothing known of the slice."""
        self.slice, self.options, self.archive = slice_, slice_.options, archive
        self.started = 0.0  # when the run was started or found, 0 where it is not going on
        self.failures = 0  # of runs that ended early, in a row
        self.unstarted = 0  # of installations and starts, in a row
        self.silent = 0  # calls without an answer, in a row
        self.polls = 0  # while some workers have ended and some have not
        self.known = False  # whether the slice was looked at for an earlier run

    def run(self) -> int:
        """Returns the exit status of the run; the slice is deleted unless a person stopped it."""
        try:
            while True:
                ended = self._try_step()
                if ended is not None:
                    return ended
                wait = self.options.poll_seconds * 2 ** min(max(self.silent, self.failures), 5)
                time.sleep(min(wait, LONGEST_WAIT_SECONDS))
        except KeyboardInterrupt:
            _say("the run goes on; the same command watches it again, delete ends it")
            return 130

    def _try_step(self) -> int | None:
        try:
            ended = self._step()
            self.silent = 0
            return ended
        except CloudError as error:
            # Never the end: the slice is paid for until somebody deletes it.
            self.silent += 1
            _say(f"no answer ({error}); trying again")
            return None

    def _step(self) -> int | None:
        """One look at the slice and what it asks for; the exit status of a run that has ended."""
        state = self.slice.state()
        if state in PREEMPTED_STATES:
            _say(f"the slice is {state}; requesting another one")
            self.slice.delete()
            self.started = 0.0
            state = self.slice.state()
        if not state:
            self.started, self.known = 0.0, True
            self._create()
        elif state == "ACTIVE" and not self.started:
            return self._start()
        elif state == "ACTIVE":
            return self._watch()
        return None

    def _create(self) -> None:
        done = self.slice.shell.output(self.slice._request(), timeout=CALL_SECONDS)
        if done.returncode == 0 or "ALREADY_EXISTS" in done.stderr:
            return
        if re.search(r"INVALID_ARGUMENT|PERMISSION_DENIED|UNAUTHENTICATED", done.stderr):
            fail(f"the slice cannot be requested: {_last_line(done.stderr)}")
        raise CloudError(_last_line(done.stderr))

    def _start(self) -> int | None:
        """Starts the run, or finds the one that an earlier ``keep`` started."""
        if not self.known:
            self.known = True
            try:
                if "running" in self.slice.workers():
                    _say("a run goes on there; watching it")
                    self.started = time.monotonic()
                    return None
            except CloudError:
                pass  # nothing is installed there yet
        try:
            self.slice.install(self.archive)
            self.slice.start()
        except CloudError:
            self.unstarted += 1
            if self.unstarted <= self.options.retries:
                raise
            _say(f"{self.unstarted} installations in a row failed; giving up")
            return self._end(ExitStatus.TRANSIENT)
        self.started, self.polls, self.unstarted = time.monotonic(), 0, 0
        _say("started")
        return None

    def _watch(self) -> int | None:
        """Looks at the run; its exit status where it has ended for good."""
        # One worker tells that all are well; only an end is worth asking everyone.
        if self.slice.workers(first=True) == ["running"]:
            self.polls = 0
            return None
        words = self.slice.workers()
        self.polls += 1
        if "running" in words and self.polls < PEER_POLLS:
            return None
        stopped = any(word.startswith("stopped") for word in words)
        numbers = [int(n[0]) if (n := re.findall(r"\d+$", word)) else 1 for word in words]
        status = job.combine(numbers)
        if stopped and status == ExitStatus.PREEMPTED:
            _say(f"the run was stopped; the slice {self.options.name} is still there")
            return status
        steady = time.monotonic() - self.started > STEADY_SECONDS
        self.started = 0.0
        if status in (ExitStatus.FINISHED, ExitStatus.USER_ERROR):
            return self._end(status)
        if status != ExitStatus.PREEMPTED:
            self.failures = 1 if steady else self.failures + 1
        if self.failures > self.options.retries:
            _say(f"{self.failures} starts in a row ended early; giving up")
            return self._end(status)
        _say(f"the run ended with status {status} ({', '.join(words)}); starting it again")
        return None

    def _end(self, status: int) -> int:
        """Saves the log, then deletes the slice, each until it succeeds or plainly cannot."""
        for action, otherwise in (
            (self.slice.save_log, "its log is lost"),
            (
                self.slice.delete,
                f"delete it: python launch/tpu_vm.py delete {self.options.name} "
                f"--zone={self.options.zone}",
            ),
        ):
            for attempt in range(5):
                try:
                    action()
                    break
                except CloudError as error:
                    _say(f"no answer ({error}); trying again")
                    time.sleep(self.options.poll_seconds * 2**attempt)
            else:
                _say(f"error: the slice does not answer; {otherwise}")
        _say(f"the run ended with status {status}")
        return status


def pack(folder: pathlib.Path) -> pathlib.Path:
    """Writes this checkout as it is, but for what git ignores, into an archive."""
    list_files = ["git", "-C", str(job.REPOSITORY), "ls-files", "-z", "-co", "--exclude-standard"]
    names = subprocess.run(list_files, stdout=subprocess.PIPE, text=True, check=True).stdout
    archive = folder / f"{FOLDER}.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=3) as tar:
        for name in sorted(filter(None, names.split("\0"))):
            if os.path.lexists(job.REPOSITORY / name):  # deleted, and not committed yet
                tar.add(job.REPOSITORY / name, name, recursive=False)
    return archive


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"


def _say(message: str) -> None:
    print(f"{time.strftime('%F %T')} {message}", file=sys.stderr, flush=True)


def _parse(arguments: list[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tpu_vm.py", description=__doc__, formatter_class=formatter)
    actions = ("keep", "create", "state", "install", "start", "status", "logs", "stop", "delete")
    parser.add_argument("action", choices=actions)
    parser.add_argument("name", help="name of the queued resource and its VMs")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", default="", help="default: gcloud's own")
    parser.add_argument("--type", default="", help="accelerator type, for example v5p-128")
    parser.add_argument("--node-count", type=int, default=1, help="slices of --type")
    parser.add_argument("--runtime", default="", help="TPU software version; default by type")
    parser.add_argument("--spot", action="store_true", help="cheaper, may be preempted")
    parser.add_argument("--nfs", default="", help=f"SERVER:/SHARE to mount at {job.MOUNT}")
    parser.add_argument("--poll_seconds", type=float, default=POLL_SECONDS)
    parser.add_argument("--retries", type=int, default=5, help="of a run that ends early")
    job.add_options(parser)
    own, command = split_command(arguments)
    return parser.parse_args(own, argparse.Namespace(command=command))


def main() -> None:
    """Runs the action of the command line."""
    options = _parse(sys.argv[1:])
    try:
        result = getattr(Slice(options), options.action)()
    except CloudError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(ExitStatus.TRANSIENT)
    if isinstance(result, str) and result:
        print(result)
    sys.exit(result if isinstance(result, int) else 0)


if __name__ == "__main__":
    main()
