"""openpi's client, unchanged from the registry, at this server.

It asks for a NumPy below 2 and JAX for one above, so it gets an environment of its own.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import venv

import pytest

from tests.client.test_wire import MESSAGE
from tests.serving.harness import CountingPolicy, running
from univla_jax.client import wire

CLIENT = "openpi-client==0.1.2"
FORGOTTEN = "typing-extensions"  # it imports this without asking for it
PIXELS = 8 * 8 * 3
ROBOT = pathlib.Path(__file__).with_name("openpi_robot.py")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of an environment with the client and what it asks for."""
    if sys.version_info >= (3, 13):
        pytest.skip(f"{CLIENT} needs NumPy below 2, which has no wheel for Python 3.13")
    folder = tmp_path_factory.mktemp("openpi")
    venv.create(folder, with_pip=True)
    program = folder / "bin" / "python"
    install = [program, "-m", "pip", "install", "--quiet", "--only-binary=:all:"]
    done = subprocess.run([*install, CLIENT, FORGOTTEN], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{CLIENT} could not be installed: {done.stderr.strip()[-200:]}")
    return program


def test_the_client_of_openpi_works_unchanged(python):
    """It cannot say where an episode ends, so that nothing of one reaches the next."""
    frame = wire.pack(MESSAGE)
    metadata = {"protocol": 1, "chunk": 1}
    with running(CountingPolicy(), metadata=metadata, forget_after_seconds=0) as server:
        command = [python, ROBOT, str(server.port), frame.hex()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["metadata"] == {"protocol": 1, "chunk": 1}
    assert seen["actions"] == [[[PIXELS, 1]], [[2 * PIXELS, 1]]] and seen["dtype"] == "float32"
    assert seen["valid"] is True
    assert seen["timing"] == [
        ["infer_ms", "read_ms"],
        ["infer_ms", "prev_total_ms", "queue_ms"],
    ]
    assert "bad request: key 'prompt' is missing" in seen["error"]
    assert seen["broker"] == [PIXELS, 1]
    assert bytes.fromhex(seen["packed"]) == frame
