"""Client of the policy server, for robots: NumPy, msgpack and websockets are all it needs.

Installed by itself it is the package ``univla_client``; nothing here imports the rest.
"""

from .chunk_queue import ChunkQueue, Execution
from .robot_client import Refused, RobotClient, ServerGone

__all__ = ["ChunkQueue", "Execution", "Refused", "RobotClient", "ServerGone"]
