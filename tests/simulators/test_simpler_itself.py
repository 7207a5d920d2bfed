"""SimplerEnv itself, against its authors' loop; needs what ``launch/simulators/simpler.sh`` makes.

``SIMPLER_PYTHON`` names its interpreter; by default ``.venv-simpler/simulator_python`` is tried.
"""

from __future__ import annotations

import os
import pathlib
import subprocess

import pytest

from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.simulators]


def test_outcomes_states_and_pictures_are_those_of_the_authors_loop():
    default = REPOSITORY / ".venv-simpler/simulator_python"
    python = pathlib.Path(os.environ.get("SIMPLER_PYTHON", default))
    if not python.exists():
        pytest.skip("no SimplerEnv: bash launch/simulators/simpler.sh MANISKILL, or SIMPLER_PYTHON")
    done = subprocess.run(
        [str(python), "-m", "tests.simulators.compare_simpler"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("solved [False, False, False, False")
