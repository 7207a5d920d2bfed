"""The command that imagines held-out episodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.conftest import REPOSITORY

CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({"episodes": 3, "frames": 3, "batch": 2, "shown": 2})
"""


@pytest.mark.slow
def test_the_command_runs_names_mistakes_and_is_done_once(
    demonstrations, world_model_checkpoint, tmp_path
):
    (tmp_path / "config.py").write_text(CONFIG)

    def run(*arguments):
        command = [sys.executable, "-m", "univla_jax.imagine", "--config=config.py"]
        command += [
            f"--checkpoint={world_model_checkpoint}",
            f"--source={demonstrations}",
            "--out=out",
        ]
        environment = dict(os.environ, PYTHONPATH=str(REPOSITORY), JAX_PLATFORMS="cpu")
        return subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    done = run()
    assert done.returncode == 0, done.stderr
    assert "3 held-out episodes" in done.stdout and "out/imagined.png" in done.stdout
    report = json.loads((tmp_path / "out" / "imagine.json").read_text())
    assert report["episodes"] == 3 and report["frames"] == 9
    assert report["per_frame"][2]["seconds"] == 3.0
    overall = report["overall"]
    assert overall["real_reconstruction"]["token_accuracy"] == 1.0
    assert np.isfinite([m["psnr"] for m in overall.values()]).all()
    for name, frames in (("imagined.png", 1), ("imagined.gif", None)):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.size[0] > 500
            assert frames is None or getattr(picture, "n_frames", 1) == frames
    again = run()
    assert again.returncode == 0 and "holds these results already" in again.stdout
    assert report["sampling"] == {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    hot = ("--temperature=2", "--top_k=9", "--top_p=0.9", "--out=hot")
    sampled = [run(*hot, *more) for more in ((), ("--out=again",), ("--out=other", "--seed=5"))]
    assert [s.returncode for s in sampled] == [0] * 3, sampled
    reports = [
        json.loads((tmp_path / out / "imagine.json").read_text())
        for out in ("hot", "again", "other")
    ]
    assert reports[2]["sampling"] == {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "seed": 5}
    frames = [r["per_frame"] for r in (*reports, report)]
    assert frames[0] == frames[1] and frames[0] != frames[2] and frames[0] != frames[3]
    assert "top_p was None, is 0.9" in run(*hot[:3]).stderr
    other = run("--config.frames=2")
    assert other.returncode == 2 and "frames was 3, is 2" in other.stderr
    wrong = run("--config.frame=2")
    assert wrong.returncode == 2 and "did you mean 'frames'?" in wrong.stderr
