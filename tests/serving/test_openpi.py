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

from tests.serving.harness import CountingPolicy, running
from tests.serving.test_protocol import MESSAGE
from univla_jax.serving import protocol

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
    frame = protocol.pack(MESSAGE)
    with running(CountingPolicy(), metadata={"protocol": 1, "chunk": 1}) as server:
        command = [python, ROBOT, str(server.port), frame.hex()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["metadata"] == {"protocol": 1, "chunk": 1}
    assert seen["actions"] == [[[PIXELS, 1]], [[3 * PIXELS, 2]]] and seen["dtype"] == "float32"
    assert seen["valid"] is True
    assert seen["timing"] == [
        ["infer_ms", "read_ms"],
        ["infer_ms", "prev_total_ms", "queue_ms"],
    ]
    assert "bad request: key 'prompt' is missing" in seen["error"]
    assert seen["broker"] == [4 * PIXELS, 3]
    assert bytes.fromhex(seen["packed"]) == frame
