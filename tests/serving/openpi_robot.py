"""Run by the Python of an environment with ``openpi-client``: a robot of openpi, nothing of ours.

    python openpi_robot.py PORT FRAME      prints what it saw as one line of JSON

FRAME is a packed message in hexadecimal digits, which it reads and packs again.
"""

import json
import sys

import numpy as np
from openpi_client import action_chunk_broker, msgpack_numpy, websocket_client_policy


def observation(value):
    """A frame of one value, as openpi's examples send it."""
    image = np.full((8, 8, 3), value, np.uint8)
    return {"observation/image": image, "observation/state": np.zeros(8), "prompt": "go"}


def main(port, frame):
    """Connects, asks, errs, and asks again through the chunk broker."""
    policy = websocket_client_policy.WebsocketClientPolicy("127.0.0.1", port)
    first, second = policy.infer(observation(1)), policy.infer(observation(2))
    try:
        policy.infer({"observation/image": observation(1)["observation/image"]})
        error = None
    except RuntimeError as raised:
        error = str(raised)
    broker = action_chunk_broker.ActionChunkBroker(policy, action_horizon=1)
    broker.reset()
    seen = {
        "metadata": policy.get_server_metadata(),
        "actions": [first["actions"].tolist(), second["actions"].tolist()],
        "dtype": str(first["actions"].dtype),
        "valid": first["actions_valid"],
        "timing": [sorted(second["policy_timing"]), sorted(second["server_timing"])],
        "error": error,
        "broker": broker.infer(observation(1))["actions"].tolist(),
        "packed": msgpack_numpy.packb(msgpack_numpy.unpackb(bytes.fromhex(frame))).hex(),
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
