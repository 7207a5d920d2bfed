"""A stand-in for `gcloud`: queued resources in a file, and workers behind a real sshd on loopback.

Every worker is a folder that its commands see as their home. What `gcloud compute tpus tpu-vm ssh`
and `scp` get is run by `ssh` and `scp`, so quoting, detaching and file modes are the real ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

GCLOUD = """#!{python} -IS
import json, os, pathlib, subprocess, sys, time
folder = pathlib.Path({folder!r})
given = sys.argv[1:]
with (folder / "calls.jsonl").open("a") as file:
    file.write(json.dumps(given) + "\\n")
cloud = json.loads((folder / "cloud.json").read_text())
def save():
    new = folder / f"cloud.json.{{os.getpid()}}"
    new.write_text(json.dumps(cloud))
    new.rename(folder / "cloud.json")
action = " ".join(given[2:4])
if cloud["failures"].get(action, 0) > 0:
    cloud["failures"][action] -= 1
    save()
    sys.exit("ERROR: UNAVAILABLE: the service is currently unavailable")
option = lambda name: next((a.split("=", 1)[1] for a in given if a.startswith(name + "=")), None)
if action == "queued-resources describe":
    if cloud["state"] is None:
        sys.exit("ERROR: NOT_FOUND: Resource was not found")
    print(cloud["state"])
elif action == "queued-resources create":
    if cloud["state"] is not None:
        sys.exit("ERROR: ALREADY_EXISTS: Resource already exists")
    for number in range({workers}):
        (folder / f"worker{{number}}").mkdir()
    cloud["state"] = "ACTIVE"
    save()
elif action == "queued-resources delete":
    for home in folder.glob("worker?"):
        home.rename(folder / f"deleted{{time.time_ns()}}")
    cloud["state"] = None
    save()
else:
    worker = option("--worker")
    numbers = range({workers}) if worker == "all" else [int(worker)]
    status = 0
    for number in numbers:
        home = folder / f"worker{{number}}"
        options = ["-F", str(folder / "ssh_config"), "-o", f"SetEnv=WORKER_HOME={{home}}"]
        if action == "tpu-vm ssh":
            call = ["ssh", "-n", *options, "worker", option("--command")]
        else:
            source, to = given[4], given[5].split(":", 1)[1]
            call = ["scp", "-q", *options, source, f"worker:{{to}}"]
        status = subprocess.run(call).returncode or status
    sys.exit(status)
"""
REMOTE = """#!/bin/bash
export HOME="$WORKER_HOME"
cd "$HOME" || exit 255
set -a; source {folder}/remote_env; set +a
exec bash -c "$SSH_ORIGINAL_COMMAND"
"""


class LoopbackCloud:
    """One slice of ``workers`` workers; ``environment`` is what their machines have set."""

    def __init__(self, folder: pathlib.Path, workers: int, environment: dict[str, str]) -> None:
        """Starts sshd."""
        self.folder, self.workers = folder, workers
        self.launchers: list[subprocess.Popen] = []
        self._set(state=None, failures={})
        for name, text in {
            "bin/gcloud": GCLOUD.format(python=sys.executable, folder=str(folder), workers=workers),
            "remote.sh": REMOTE.format(folder=folder),
            "remote_env": "".join(f"{key}={value}\n" for key, value in environment.items()),
        }.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        for key in ("host_key", "user_key"):
            keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
            subprocess.run(keygen, check=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (folder / "sshd_config").write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile none\n"
            f"AuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\nUsePAM no\n"
            "PermitRootLogin yes\nPasswordAuthentication no\nMaxStartups 100\n"
            "AcceptEnv WORKER_HOME\n"
            f"ForceCommand {folder}/remote.sh\nSubsystem sftp {_sftp_server()}\n"
        )
        (folder / "ssh_config").write_text(
            f"Host worker\n HostName 127.0.0.1\n Port {port}\n IdentityFile {folder}/user_key\n"
            " StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
            " BatchMode yes\n IdentitiesOnly yes\n"
        )
        if os.geteuid() == 0:
            pathlib.Path("/run/sshd").mkdir(exist_ok=True)  # where sshd of root gives up privileges
        command = [shutil.which("sshd", path=_PATH), "-D", "-e", "-f", str(folder / "sshd_config")]
        self._log = (folder / "sshd.log").open("wb")
        self._sshd = subprocess.Popen(command, stderr=self._log, start_new_session=True)
        self._wait_for(port)

    def _wait_for(self, port: int) -> None:
        limit = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            except OSError:
                log = (self.folder / "sshd.log").read_text()
                assert time.monotonic() < limit and self._sshd.poll() is None, log
                time.sleep(0.05)

    def close(self) -> None:
        """Ends the launchers, the workers' processes and sshd."""
        for process in self.launchers:
            process.kill()
            process.wait()
        self._kill_all()
        self._sshd.kill()
        self._sshd.wait()
        self._log.close()

    @property
    def env(self) -> dict[str, str]:
        """The environment in which `gcloud` is the stand-in."""
        return {**os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}

    @property
    def state(self) -> str | None:
        """State of the queued resource, None where there is none."""
        return json.loads((self.folder / "cloud.json").read_text())["state"]

    def _set(self, **changes) -> None:
        file = self.folder / "cloud.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        (self.folder / "new").write_text(json.dumps({**before, **changes}))
        (self.folder / "new").rename(file)

    def fail(self, action: str, times: int) -> None:
        """Makes the next calls of an action such as ``tpu-vm ssh`` fail."""
        cloud = json.loads((self.folder / "cloud.json").read_text())
        self._set(failures={**cloud["failures"], action: times})

    def preempt(self) -> None:
        """Takes the machines away: their processes are killed and their disks are gone."""
        self._set(state="SUSPENDED")
        self._kill_all()
        for number in range(self.workers):
            self.home(number).rename(self.folder / f"lost{time.monotonic_ns()}")

    def home(self, number: int) -> pathlib.Path:
        """Home of a worker."""
        return self.folder / f"worker{number}"

    def pid(self, number: int) -> int:
        """Process of the command on a worker."""
        return int((self.home(number) / "univla_jax/run/pid").read_text())

    def calls(self) -> list[list[str]]:
        """What `gcloud` was called with."""
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def _kill_all(self) -> None:
        for file in self.folder.glob("worker*/univla_jax/run/group"):
            for target in (-int(file.read_text()), _number(file.with_name("pid"))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(target, signal.SIGKILL) if target else None


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"


def missing() -> str:
    """The programs that are absent, as a reason to skip; empty where all are there."""
    names = ("sshd", "ssh", "scp", "ssh-keygen", "flock", "setsid")
    absent = [name for name in names if shutil.which(name, path=_PATH) is None]
    return f"absent: {', '.join(absent)} (Debian: openssh-server, util-linux)" if absent else ""


def _sftp_server() -> str:
    for file in ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server"):
        if pathlib.Path(file).exists():
            return file
    return "internal-sftp"


def _number(file: pathlib.Path) -> int:
    return int(file.read_text()) if file.exists() else 0
