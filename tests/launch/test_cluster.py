"""The launch scripts beside fake gcloud, kubectl, docker and sbatch that record what they get."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

PROGRAMS = ("gcloud", "kubectl", "docker", "sbatch")
TRAIN = ("--", "train", "--config=configs/libero.py:video", "--workdir=/mnt/shared/libero")
FAKE = """#!{python}
import json, pathlib, sys
folder = pathlib.Path({folder!r})
given = "" if sys.stdin.isatty() else sys.stdin.read()
with (folder / "calls.jsonl").open("a") as file:
    file.write(json.dumps([{program!r}, *sys.argv[1:], *([given] if given else [])]) + "\\n")
answers = folder / "answers.json"
if answers.exists():
    known = json.loads(answers.read_text())
    for key, replies in known.items():
        if any(key in argument for argument in sys.argv) and replies:
            reply = replies.pop(0)
            answers.write_text(json.dumps(known))
            print(reply) if reply is not None else sys.exit(1)
            break
"""


@pytest.fixture
def launch(tmp_path):
    """``launch(script, *arguments)`` runs a script; ``launch.calls()`` is what the fakes got."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for program in PROGRAMS:
        file = binaries / program
        text = FAKE.format(python=sys.executable, folder=str(tmp_path), program=program)
        file.write_text(text)
        file.chmod(0o755)

    def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, f"launch/{script}", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls() -> list[list[str]]:
        file: pathlib.Path = tmp_path / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    run.calls = calls
    run.answers = lambda answers: (tmp_path / "answers.json").write_text(json.dumps(answers))
    return run


@pytest.mark.parametrize("script", ["tpu_vm.py", "gke.py", "slurm.py"])
def test_help(launch, script):
    done = launch(script, "--help")
    assert done.returncode == 0 and "--dry_run" in done.stdout
    assert not launch.calls()


BASH = ("quickstart.sh", "test.sh", "local_multiprocess.sh")


@pytest.mark.parametrize("script", BASH)
def test_help_of_what_runs_here(script):
    done = _bash(script, "--help")
    assert done.returncode == 0 and "--dry_run" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("quickstart.sh", "--dry_run", "NOWHERE"), ["univla_jax.train", "univla_jax.summarize"]),
        (("test.sh", "--dry_run", "-m", "slow"), ["-m pytest", "-m slow"]),
        (
            ("local_multiprocess.sh", "--dry_run", "2", "train", "--workdir=NOWHERE"),
            ["--processes=2 --process=0", "--processes=2 --process=1"],
        ),
    ],
)
def test_a_dry_run_here_prints_the_commands(arguments, expected):
    done = _bash(*arguments)
    assert done.returncode == 0, done.stderr
    for part in expected:
        assert part in done.stdout
    assert not (REPOSITORY / "NOWHERE").exists()


def _bash(script, *arguments):
    return subprocess.run(
        ["bash", f"launch/{script}", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        (
            "tpu_vm.py",
            ("keep", "mine", "--zone=z", "--type=v6e-64", *TRAIN),
            ["queued-resources create", "scp", "install_project tpu", "--distributed", "delete"],
        ),
        ("gke.py", ("build", "--image=registry/image"), ["docker build", "docker push"]),
        ("gke.py", ("apply", "mine", *TRAIN), ["kubectl apply -f -", "kind: JobSet"]),
        ("slurm.py", TRAIN, ["sbatch", "srun", "--distributed"]),
    ],
)
def test_a_dry_run_prints_every_command_and_runs_none(launch, script, arguments, expected):
    at = arguments.index("--") if "--" in arguments else len(arguments)
    done = launch(script, *arguments[:at], "--dry_run", *arguments[at:])
    assert done.returncode == 0, done.stderr
    for part in expected:
        assert part in done.stdout
    assert not launch.calls()


def test_creating_a_slice(launch):
    done = launch("tpu_vm.py", "create", "mine", "--zone=z", "--type=v5p-128", "--spot")
    assert done.returncode == 0, done.stderr
    assert launch.calls() == [
        [
            *("gcloud", "compute", "tpus", "queued-resources", "create", "mine", "--zone=z"),
            *("--node-id=mine", "--accelerator-type=v5p-128"),
            *("--runtime-version=v2-alpha-tpuv5", "--spot"),
        ]
    ]


def test_an_unknown_type_is_named(launch):
    done = launch("tpu_vm.py", "create", "mine", "--zone=z", "--type=v9-8")
    assert done.returncode == 2
    assert "'v9'" in done.stderr and "v6e" in done.stderr
    assert not launch.calls()


def test_a_run_survives_preemption_and_its_slice_is_deleted_at_the_end(launch):
    """No slice; one comes, and is taken away while the run goes on; the next one finishes."""
    launch.answers(
        {
            "describe": [None, "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", "ACTIVE", "ACTIVE"],
            "exit_status 2>/dev/null": ["", "83", "0"],
        }
    )
    done = launch(
        *("tpu_vm.py", "keep", "mine", "--zone=z", "--type=v6e-64", "--poll_seconds=0"),
        *TRAIN,
    )
    assert done.returncode == 0, done.stderr
    verbs = [call[4] for call in launch.calls() if call[4] in ("create", "delete")]
    assert verbs == ["create", "delete", "create", "delete"]
    starts = [c for c in launch.calls() if "nohup" in c[-1]]
    assert len(starts) == 3  # first, after the preemption, after status 83
    assert all("--workdir=/mnt/shared/libero" in c[-1] for c in starts)
    assert "status 83" in done.stderr


def test_a_run_that_ends_with_a_mistake_of_the_user_is_not_restarted(launch):
    launch.answers({"describe": ["ACTIVE"], "exit_status 2>/dev/null": ["2"]})
    done = launch(
        *("tpu_vm.py", "keep", "mine", "--zone=z", "--type=v6e-64", "--poll_seconds=0"),
        *TRAIN,
    )
    assert done.returncode == 2 and "status 2" in done.stderr
    assert launch.calls()[-1][4] == "delete"


def test_the_manifest_of_a_slice(launch):
    done = launch("gke.py", "apply", "mine", "--topology=v6e:8x8", "--image=registry/image", *TRAIN)
    assert done.returncode == 0, done.stderr
    ((*command, manifest),) = launch.calls()
    assert command == ["kubectl", "apply", "-f", "-"]
    for part in (
        "gke-tpu-accelerator: tpu-v6e-slice",
        "gke-tpu-topology: 8x8",
        "parallelism: 16",
        "google.com/tpu: 4",
        '["univla_jax.train", "--distributed", "--config=configs/libero.py:video"',
    ):
        assert part in manifest
    assert "$" not in manifest


def test_logs_and_deletion_on_gke(launch):
    launch("gke.py", "logs", "mine")
    launch("gke.py", "delete", "mine")
    first, second = launch.calls()
    assert first[:3] == ["kubectl", "logs", "--follow"]
    assert second == ["kubectl", "delete", "jobset", "mine"]


def test_a_slurm_job_requeues_itself(launch):
    done = launch("slurm.py", "--nodes=2", "--partition=gpu", *TRAIN)
    assert done.returncode == 0, done.stderr
    ((program, job),) = launch.calls()
    assert program == "sbatch"
    assert "#SBATCH --nodes=2" in job and "#SBATCH --partition=gpu" in job
    assert "-eq 83" in job and "scontrol requeue" in job


def test_no_command_is_an_error(launch):
    done = launch("slurm.py", "--nodes=2")
    assert done.returncode == 2 and "behind --" in done.stderr
    assert not launch.calls()


def test_processes_on_this_machine_are_printed(launch):
    done = subprocess.run(
        ["bash", "launch/local_multiprocess.sh", "--dry_run", "3", "train", "--workdir=W"],
        cwd=REPOSITORY,
        env={**os.environ, "INSTALLED": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert lines[1].rstrip().endswith("--processes=3 --process=1")
