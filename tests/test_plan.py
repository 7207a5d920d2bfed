"""The plan command as a process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.planning.recipes import needs_compiler


@needs_compiler
@pytest.mark.slow
def test_the_command_refuses_a_batch_that_does_not_divide():
    done = subprocess.run(
        [
            *(sys.executable, "-m", "univla_jax.plan", "--config=configs/libero.py:video"),
            *("--topology=v6e:16x16", "--config.mesh.fsdp=256", "--json"),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "batch size: 192 does not divide into 256 part(s)" in done.stderr
