"""CALVIN itself, against its authors' loop and our scripts, from ``launch/simulators/calvin.sh``.

``CALVIN_PYTHON`` names its interpreter; by default ``.venv-calvin/bin/python`` is tried.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import sysconfig

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.readers import open_reader

pytestmark = [pytest.mark.slow, pytest.mark.simulators]


@pytest.fixture(scope="module")
def python():
    """The interpreter of CALVIN's environment."""
    path = pathlib.Path(os.environ.get("CALVIN_PYTHON", REPOSITORY / ".venv-calvin/bin/python"))
    if not path.exists():
        pytest.skip("no CALVIN: bash launch/simulators/calvin.sh CALVIN, or set CALVIN_PYTHON")
    return str(path)


def test_solved_counts_states_and_pictures_are_those_of_the_authors_loop(python):
    done = subprocess.run(
        [python, "-m", "tests.simulators.calvin.compare_with_authors"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "solved [1, 0, 0, 0]" in done.stdout.splitlines()


def test_the_expert_solves_chains_of_the_scripted_tasks(python, tmp_path):
    """Through the command, in the real scene; zero actions solve none of them."""
    command = [sys.executable, "-m", "univla_jax.evaluate", "--benchmark=calvin", "--videos=0"]
    command += ["--suite=scripted", "--renderer=tiny", f"--simulator_python={python}"]
    solved = {}
    for policy, options in (("expert", []), ("zero", ["--max_steps=30"])):
        out = tmp_path / policy
        done = subprocess.run(
            [*command, f"--policy={policy}", "--tasks=990,991,992", f"--out={out}", *options],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        lines = (out / "episodes.jsonl").read_text().splitlines()
        solved[policy] = [json.loads(line)["solved"] for line in lines]
    assert solved == {"expert": [5, 5, 5], "zero": [0, 0, 0]}


def test_demonstrations_are_written_in_calvins_environment(python, tmp_path):
    recipe = REPOSITORY / "configs" / "calvin_scratch.py"
    # CALVIN's environment has this package where it was installed into it; here its requirements
    # are lent by the environment of the test.
    paths = [str(REPOSITORY), sysconfig.get_path("purelib")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    can = [python, "-c", "import tensorflow_datasets, array_record"]
    if subprocess.run(can, env=environment, capture_output=True).returncode:
        pytest.skip("this package's requirements cannot be imported by CALVIN's interpreter")
    done = subprocess.run(
        [
            *(python, "-m", "univla_jax.demonstrate", "--benchmark=calvin", f"--out={tmp_path}"),
            *(f"--config={recipe}:demonstrations", "--config.train_episodes=1"),
            *("--config.val_episodes=1", "--config.tasks=('turn_on_led','move_slider_left')"),
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reader = open_reader(tmp_path / "calvin_sim", find_dataset_config("calvin_sim"), "train")
    episodes = list(reader)
    assert {episode.episode_id.split("/")[0] for episode in episodes} == {
        "turn_on_led",
        "move_slider_left",
    }
    for episode in episodes:
        assert len(episode) % 10 == 0 and episode.actions.shape[1] == 7
        for frames in episode.frames.values():
            assert frames.std() > 10  # drawn, not black
            changes = np.flatnonzero((frames[1:] != frames[:-1]).any(axis=(1, 2, 3))) + 1
            assert set(changes) <= set(range(10, len(episode), 10))
