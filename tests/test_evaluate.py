"""The command that scores a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY
from tests.inference import tiny_checkpoint

CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({
        "benchmark": "tabletop", "episodes": 40, "batch": 2, "max_steps": 20,
        "conditions": ("random", "zero"), "video_episodes": 0,
    })
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint.save(tmp_path_factory.mktemp("policy"), tiny_checkpoint.make_assets())


def _command(checkpoint, out, *arguments):
    command = [sys.executable, "-m", "univla_jax.evaluate", "--config=config.py"]
    return [*command, f"--checkpoint={checkpoint}", f"--out={out}", *arguments]


def _run(folder, checkpoint, out, *arguments):
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY), JAX_PLATFORMS="cpu")
    command = _command(checkpoint, out, *arguments)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def _episodes(out):
    lines = map(json.loads, (out / "episodes.jsonl").read_text().splitlines())
    return sorted(lines, key=lambda line: (line["condition"], line["seed"]))


def test_killed_and_started_again_it_gives_the_same_table(checkpoint, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY), JAX_PLATFORMS="cpu")
    process = subprocess.Popen(
        _command(checkpoint, "killed"),
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    records = tmp_path / "killed" / "episodes.jsonl"
    while process.poll() is None and not (records.exists() and records.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "report.json").exists()

    resumed = _run(tmp_path, checkpoint, "killed")
    assert resumed.returncode == 0, resumed.stderr
    whole = _run(tmp_path, checkpoint, "whole")
    assert whole.returncode == 0, whole.stderr
    assert _episodes(tmp_path / "killed") == _episodes(tmp_path / "whole")
    success = [run.stdout.split("seconds per call")[0] for run in (resumed, whole)]
    assert success[0] == success[1] and "random" in success[0] and "place" in success[0]
    assert "whole/report.html" in whole.stdout

    again = _run(tmp_path, checkpoint, "whole")
    assert again.returncode == 0 and "holds this evaluation already" in again.stdout
    other = _run(tmp_path, checkpoint, "whole", "--max_steps=4")
    assert other.returncode == 2
    assert "whole belongs to another config: max_steps was 20, is 4" in other.stderr


def test_flags_alone_name_an_evaluation_and_mistakes_are_one_line(tmp_path):
    command = [sys.executable, "-m", "univla_jax.evaluate"]
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY), JAX_PLATFORMS="cpu")

    def run(*arguments):
        return subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    flags = ("--benchmark=tabletop", "--policy=zero", "--episodes=5", "--max_steps=3", "--out=out")
    done = run(*flags, "--videos=0")
    assert done.returncode == 0, done.stderr
    assert "5" in done.stdout and (tmp_path / "out" / "report.html").exists()
    compared = run("--compare", "out", "out")
    assert "B - A: 0.0 points" in compared.stdout
    for arguments, message in (
        ((), "give --out=..."),
        (("--out=new",), "give --config=FILE.py[:NAME], or --benchmark=..."),
        ((*flags, "--suite=libero_goal"), "benchmark 'tabletop' has no 'suite'"),
        ((*flags, "--tasks=a"), "--tasks: 'a', expected numbers"),
        (("--benchmark=tabletop", "--out=new"), "needs --checkpoint"),
        (("--benchmark=calvin", "--policy=expert", "--out=new"), "condition 'expert': calvin"),
        (("--benchmark=simpler", "--policy=expert", "--out=new"), "has no 'expert'"),
        (("--benchmark=tabletop", "--out=new", "--top_p=2"), "top_p: 2.0 is not in (0, 1]"),
        (
            ("--benchmark=tabletop", "--policy=ws://a:1", "--out=new", "--temperature=1"),
            "samples as it was started",
        ),
        (("--offline=a", "--checkpoint=b", "--out=new", "--temperature=1"), "leave --temperature"),
    ):
        wrong = run(*arguments)
        assert (wrong.returncode, message in wrong.stderr) == (2, True), wrong.stderr


def test_sampling_flags_arrive(checkpoint, tmp_path):
    """The recorded episode depends on them and on the seed, and is the same when repeated."""
    (tmp_path / "config.py").write_text(CONFIG)
    shared = ("--conditions=policy", "--episodes=1", "--workers=1", "--max_steps=3", "--videos=1")
    hot = ("--temperature=2", "--top_k=40", "--top_p=0.9", "--seed=1")
    videos, reports = {}, {}
    for out, arguments in (("greedy", ()), ("hot", hot), ("again", hot)):
        done = _run(tmp_path, checkpoint, out, *shared, *arguments)
        assert done.returncode == 0, done.stderr
        reports[out] = json.loads((tmp_path / out / "report.json").read_text())["protocol"]
        (video,) = (tmp_path / out / "videos").glob("*.gif")
        videos[out] = video.read_bytes()
    sampling = {"temperature": 2.0, "top_k": 40, "top_p": 0.9, "seed": 1}
    assert reports["hot"]["sampling"] == sampling and "sampling" not in reports["greedy"]
    assert videos["hot"] == videos["again"] != videos["greedy"]


def test_a_policy_is_scored_offline(tmp_path):
    before = REPOSITORY / "tests" / "fixtures" / "before"
    arguments = (f"--offline={before}/tokens/val", f"--checkpoint={before}/policy", "--out=out")
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY), JAX_PLATFORMS="cpu")
    command = [sys.executable, "-m", "univla_jax.evaluate", *arguments, "--episodes=1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "policy_video on 1 episodes" in done.stdout
    assert json.loads((tmp_path / "out" / "offline.json").read_text())["episodes"] == 1
