"""CALVIN itself, against its authors' loop; needs what ``launch/simulators/calvin.sh`` makes.

``CALVIN_PYTHON`` names its interpreter; by default ``.venv-calvin/bin/python`` is tried.
"""

from __future__ import annotations

import os
import pathlib
import subprocess

import pytest

from tests.conftest import REPOSITORY

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
