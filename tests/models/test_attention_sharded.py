"""Attention split over a mesh, the sequence included, equals the plain formula."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.conftest import REPOSITORY


def test_rows_heads_and_sequence_split_over_eight_devices():
    """Packed rows; two key heads over four parts; a part that is no multiple of a block."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.mesh_attention"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 4
    assert max(errors.values()) < 2e-5, errors
