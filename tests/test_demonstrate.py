"""The command that writes demonstrations."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.conftest import REPOSITORY

CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({"train_episodes": 2, "val_episodes": 1, "first_seed": 40})
"""


def test_the_command_runs_and_names_mistakes(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)

    def run(*arguments):
        command = [sys.executable, "-m", "univla_jax.demonstrate", "--config=config.py"]
        environment = dict(os.environ, PYTHONPATH=str(REPOSITORY))
        return subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    done = run("--out=data")
    assert done.returncode == 0, done.stderr
    assert f"2 + 1 demonstrations in {tmp_path}/data/tabletop/1.0.0" in done.stdout
    assert run().stderr.splitlines()[-1].endswith("give --out=..., the folder for the dataset")
    wrong = run("--out=data", "--config.trian_episodes=2")
    assert (wrong.returncode, "did you mean 'train_episodes'?" in wrong.stderr) == (2, True)
