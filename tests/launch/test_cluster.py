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
        (
            ("quickstart.sh", "--dry_run", "--config=configs/road.py", "NOWHERE"),
            ["NOWHERE/tokens/train", "NOWHERE/tokens/swerves", "config=configs/road.py:imagine"],
        ),
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
            [
                "queued-resources create",
                "scp",
                "worker.sh install tpu,gcs",
                "worker.sh start train",
                "--distributed",
                "delete",
            ],
        ),
        ("gke.py", ("build", "--image=registry/image"), ["docker build", "docker push"]),
        ("gke.py", ("apply", "mine", *TRAIN), ["kubectl apply -f -", '"kind": "JobSet"']),
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


@pytest.mark.parametrize(
    ("given", "type_", "runtime"),
    [
        ("v4-64", "v4-64", "tpu-ubuntu2204-base"),
        ("v5e-64", "v5litepod-64", "v2-alpha-tpuv5-lite"),
        ("v5litepod-64", "v5litepod-64", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v5p-128", "v2-alpha-tpuv5"),
        ("v6e-64", "v6e-64", "v2-alpha-tpuv6e"),
    ],
)
def test_creating_a_slice(launch, given, type_, runtime):
    done = launch("tpu_vm.py", "create", "mine", "--zone=z", f"--type={given}", "--spot")
    assert done.returncode == 0, done.stderr
    assert launch.calls() == [
        [
            *("gcloud", "compute", "tpus", "queued-resources", "create", "mine", "--node-id=mine"),
            *(f"--accelerator-type={type_}", f"--runtime-version={runtime}", "--spot", "--zone=z"),
        ]
    ]


def test_several_slices_are_one_request_and_one_mesh(launch):
    options = ("--zone=z", "--type=v6e-64", "--node-count=2", "--dry_run")
    done = launch("tpu_vm.py", "keep", "mine", *options, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "--node-count=2 --node-prefix=mine" in done.stdout
    for node in ("mine-0", "mine-1"):
        (start,) = [li for li in done.stdout.splitlines() if f"ssh {node}" in li and "start" in li]
        assert "--config.mesh.replica=2" in start


@pytest.mark.parametrize(
    ("type_", "message"), [("v9-8", "unknown 'v9'; known: v4, v5litepod"), ("tpu7x-64", "gke.py")]
)
def test_an_unknown_type_is_named(launch, type_, message):
    done = launch("tpu_vm.py", "create", "mine", "--zone=z", f"--type={type_}")
    assert done.returncode == 2 and message in done.stderr
    assert not launch.calls()


def test_logs_and_deletion_on_gke(launch):
    launch("gke.py", "logs", "mine")
    launch("gke.py", "delete", "mine")
    first, second, _ = launch.calls()
    assert first[:3] == ["kubectl", "logs", "--follow"]
    assert second == ["kubectl", "delete", "jobset", "mine"]


def test_a_secret_is_on_no_command_line_and_in_no_dry_run(launch, monkeypatch):
    monkeypatch.setenv("TOKEN", "pass'word")
    assert launch("gke.py", "apply", "mine", "--env=TOKEN", *TRAIN).returncode == 0
    delete, (*command, manifest) = launch.calls()
    assert "pass'word" in manifest and "pass'word" not in str((delete, command))
    for script in (("gke.py", "apply", "mine"), ("slurm.py",)):
        done = launch(*script, "--env=TOKEN", "--dry_run", *TRAIN)
        assert done.returncode == 0 and "pass'word" not in done.stdout


@pytest.mark.parametrize(
    ("option", "message"),
    [("--env=ABSENT", "not set here"), ("--env=1=2", "expected KEY or KEY=VALUE")],
)
def test_a_variable_that_cannot_be_set_is_named(launch, option, message):
    done = launch("slurm.py", option, *TRAIN)
    assert done.returncode == 2 and message in done.stderr
    assert not launch.calls()


def test_a_slurm_job_asks_for_what_the_command_line_says(launch):
    done = launch("slurm.py", "--nodes=2", "--partition=gpu", *TRAIN)
    assert done.returncode == 0, done.stderr
    ((program, _, job),) = launch.calls()
    assert program == "sbatch"
    assert "#SBATCH --nodes=2" in job and "#SBATCH --partition=gpu" in job


@pytest.mark.slow
def test_the_gpu_flags_are_known_to_xla():
    """An unknown one would end every process on a GPU at its start."""
    program = "import job, os; os.environ.update(job.GPU_ENVIRONMENT); import jax; jax.devices()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "launch"), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_command_is_an_error(launch):
    done = launch("slurm.py", "--", "trian")
    assert done.returncode == 2 and "no command 'trian'" in done.stderr


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
