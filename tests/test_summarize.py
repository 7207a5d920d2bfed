"""The command that gathers all stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from tests.conftest import REPOSITORY
from univla_jax import summarize
from univla_jax.errors import UserError

SUCCESS = {"successes": 9, "episodes": 10, "rate": 0.9, "low": 0.6, "high": 0.98}
TEXT = {"vocabulary_size": 300, "mean_tokens": 6.2, "distinct_instructions": 24}
MEANS = {"psnr": 25.0, "ssim": 0.9, "token_accuracy": 0.8}


def _write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture
def workdir(tmp_path):
    for run, modality in (("world_model", "visual"), ("unified", "action")):
        lines = [
            {"step": n, "loss": 3 / (n + 1), f"{modality}_accuracy": n / 40, "grad_norm": 1}
            for n in range(40)
        ]
        lines.append({"step": 40, "eval/loss": 0.2})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        _write(tmp_path / run / "metrics.jsonl", text)
    conditions = {
        "another": {"success": SUCCESS, "tasks": []},
        "policy": {"success": SUCCESS, "tasks": [{"task": "push", **SUCCESS}]},
        "random": {"success": {**SUCCESS, "successes": 0, "rate": 0.0}, "tasks": []},
    }
    _write(tmp_path / "evaluation" / "report.json", {"conditions": conditions})
    _write(tmp_path / "evaluation" / "report.html", "")
    overall = {"imagined": MEANS, "repeat_context": {**MEANS, "psnr": 20.0}}
    found = {"overall": overall, "true_state": {"right_object": 0.875}}
    _write(tmp_path / "imagination" / "imagine.json", found)
    views = {"image": {"given actions": {**MEANS, "psnr": 27.5}}}
    _write(tmp_path / "obedience" / "obey.json", {"views": views})
    for name, size in (("imagination/imagined.png", (30, 20)), ("obedience/obeyed.png", (20, 10))):
        Image.new("RGB", size, "red").save(tmp_path / name)
    vision = {"psnr": {"image": 28.123456, "wrist": 20.0}, "codes_used": 0.5, "perplexity": 90.0}
    _write(tmp_path / "tokenizers" / "vision" / "fit.json", {"report": vision})
    action = {"vocabulary_size": 384, "mean_tokens": 9.51, "max_tokens": 17}
    _write(tmp_path / "tokenizers" / "action" / "fit.json", {"report": action})
    _write(tmp_path / "tokenizers" / "text" / "fit.json", {"report": {}})
    stages = [
        {"stage": "unified", "seconds": 20.0, "peak_gigabytes": 2.5},
        {"stage": "unified", "seconds": 70.0, "peak_gigabytes": 1.5},
        {"stage": "tokens", "seconds": 30.0, "peak_gigabytes": 1.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in stages) + '{"stage": "pol'
    _write(tmp_path / "stages.jsonl", text)
    return tmp_path


def test_everything_is_gathered(workdir):
    report = summarize.write_summary(workdir)
    policy = report["training"]["unified"]
    assert policy["steps"] == 40 and policy["held_out"] == {"eval/loss": 0.2}
    assert policy["mean_of_last_tenth"]["action_accuracy"] == pytest.approx(37.5 / 40)
    assert report["stages"]["each"]["unified"] == {"seconds": 90.0, "peak_gigabytes": 2.5}
    assert (report["stages"]["seconds"], report["stages"]["peak_gigabytes"]) == (120.0, 2.5)
    assert set(report["files"]) == {
        *("report", "learning_curve", "evaluation", "imagined", "pictures")
    }
    assert json.loads((workdir / "report.json").read_text()) == report
    with Image.open(workdir / "learning_curve.png") as picture:
        assert picture.size[0] > 900
    with Image.open(workdir / "pictures.png") as picture:
        assert picture.size == (30, 30) and picture.getpixel((29, 29)) == (255, 255, 255)
    table = summarize.summary_table(report)
    vision = "image 28.1 dB, wrist 20.0 dB; 50 % of the codes used"
    for words in (
        vision,
        "384 ids, 9.5 per chunk (at most 17)",
        "90.0 % (9/10",
        "25.00 dB",
        "20.00 dB",
        "given actions, image",
        "27.50 dB",
        "87.5 %",
        "2.0 min, peak 2.50 GB",
        "  push ",
    ):
        assert words in table
    assert table.index("success, policy") < table.index("success, another")


def test_what_is_absent_is_left_out(tmp_path):
    _write(tmp_path / "tokenizers" / "text" / "fit.json", {"report": TEXT})
    report = summarize.write_summary(tmp_path)
    assert set(report) == {"tokenizers", "files"}
    assert "300 ids, 6.2 per instruction (24 different ones)" in summarize.summary_table(report)
    with pytest.raises(UserError, match="holds no results"):
        summarize.write_summary(tmp_path / "nothing")


def test_the_command_prints_the_table_and_the_paths(workdir):
    command = [sys.executable, "-m", "univla_jax.summarize", f"--workdir={workdir}"]
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{workdir}/evaluation/report.html"
    assert "success, policy" in done.stdout


def test_learning_curves(tmp_path):
    lines = [
        {"step": n, "loss": 2.0 / (n + 1), "visual_accuracy": n / 50, "grad_norm": 1.0}
        for n in range(50)
    ]
    lines += [{"step": 50, "eval/loss": 0.1}]
    summarize.write_learning_curves(
        tmp_path / "curve.png", {"world model": lines, "policy": lines[:1]}
    )
    with Image.open(tmp_path / "curve.png") as image:
        assert image.format == "PNG" and image.size[0] > 900
