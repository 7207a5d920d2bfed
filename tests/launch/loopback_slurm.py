"""A real Slurm on loopback: munged, slurmctld and some slurmd, all in one folder."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
CONFIG = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={controller}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=10
MinJobAge=60
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """The programs that are absent, as a reason to skip; empty where all are there."""
    names = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "flock")
    absent = [name for name in names if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"absent: {', '.join(absent)} (Debian: slurm-wlm, munge)"
    return "" if os.geteuid() == 0 else "a Slurm of its own needs root"


class LoopbackSlurm:
    """A cluster of ``nodes`` nodes, all of them this machine."""

    def __init__(self, folder: pathlib.Path, nodes: int) -> None:
        """Starts the daemons and waits until the nodes are idle."""
        self.folder, self.nodes = folder, [f"node{i}" for i in range(nodes)]
        self._daemons: dict[str, subprocess.Popen] = {}
        host = socket.gethostname().split(".")[0]
        controller, *ports = _free_ports(nodes + 1)
        described = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2"
            for name, port in zip(self.nodes, ports, strict=True)
        )
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(
            CONFIG.format(
                host=host, folder=folder, user="root", controller=controller, nodes=described
            )
        )
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        self.env = {
            **os.environ,
            "PATH": _PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self._start(
            *("munge", "munged", "-F", "-f", f"--key-file={folder}/munge.key"),
            *(f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid"),
            *(f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"),
        )
        _wait_until((folder / "munge.socket").exists, 20, self.logs)
        self._start("controller", "slurmctld", "-D")
        for name in self.nodes:
            self.start_node(name)
        _wait_until(lambda: set(self.states()) == {"idle"}, 60, self.logs)

    def start_node(self, name: str) -> None:
        """Starts the daemon of a node."""
        self._start(name, "slurmd", "-D", "-N", name)

    def _start(self, name: str, *command: str) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        self._daemons[name] = subprocess.Popen(
            command, env=self.env, stdout=log, stderr=log, start_new_session=True
        )

    def kill_node(self, name: str) -> None:
        """The end of a node as the others see it: daemon, steps and processes gone at once."""
        self._daemons.pop(name).kill()
        for process in _processes():
            environment = _read(process / "environ")
            if f"SLURMD_NODENAME={name}\0" in environment or _is_step_of(process, name):
                _kill(int(process.name))

    def states(self) -> list[str]:
        """State of every node."""
        return self.run("sinfo", "--noheader", "--Node", "--format=%T").split()

    def job(self, number: str) -> str:
        """What `scontrol` says of a job."""
        return self.run("scontrol", "show", "job", number)

    def run(self, *command: str) -> str:
        """Output of a command of Slurm's."""
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, check=False, timeout=60
        )
        return done.stdout

    def logs(self) -> str:
        """The ends of all logs."""
        files = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"== {f.name}\n{_read(f)[-1500:]}" for f in files)

    def close(self) -> None:
        """Ends the daemons and every process of their jobs."""
        for name in self.nodes:
            if name in self._daemons:
                self.kill_node(name)
        for daemon in self._daemons.values():
            daemon.terminate()
            daemon.wait(timeout=20)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for probe in sockets:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports


def _processes() -> list[pathlib.Path]:
    return [path for path in pathlib.Path("/proc").iterdir() if path.name.isdigit()]


def _is_step_of(process: pathlib.Path, name: str) -> bool:
    """Whether a process is the daemon of a step: its spool folder names the node."""
    return "slurmstepd" in _read(process / "comm") and f"spool.{name}" in " ".join(
        _link(file) for file in (process / "fd").glob("*")
    )


def _link(file: pathlib.Path) -> str:
    try:
        return os.readlink(file)
    except OSError:
        return ""


def _read(file: pathlib.Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _wait_until(condition, seconds, explain) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, explain()
        time.sleep(0.2)
