"""Serves a policy checkpoint to robots over a websocket with openpi's protocol.

    python -m univla_jax.serve --checkpoint=WORKDIR --port=8000
    python -m univla_jax.serve --checkpoint=WORKDIR --mesh.tensor=4 --int8
    python -m univla_jax.serve --checkpoint=WORKDIR --mesh.tensor=4 --replicas=2    # eight chips

``openpi_client.websocket_client_policy.WebsocketClientPolicy("localhost", 8000)`` works unchanged;
``serving/protocol.py`` lists the keys. The port opens once all batch sizes are compiled; later
starts find the compiled functions in ``--compiled``. ``GET /healthz`` answers while the server
runs, ``GET /metrics`` is for Prometheus. Connections and refusals are logged on standard error. On
SIGTERM, requests under way are finished. Needs
``pip install '.[serve]'``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging as standard_logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags, logging

from univla_jax import cli
from univla_jax.errors import UserError
from univla_jax.inference.sampling import sampling_flags
from univla_jax.training.model_setup import mesh_flags

_BEGIN = time.perf_counter()
_DEFAULT_COMPILED = "~/.cache/univla_jax/compiled"

CHECKPOINT = cli.string_flag("checkpoint", "policy checkpoint, or the workdir of its training")
CORPUS = cli.string_flag("corpus", "corpus whose cameras and statistics are used", required=False)
HOST = cli.string_flag("host", "address to listen on", default="127.0.0.1")
PORT = flags.DEFINE_integer("port", 8000, "port to listen on; 0 takes a free one")
API_KEY = cli.string_flag("api_key", "key that robots must send", default="")
API_KEY_FILE = cli.string_flag("api_key_file", "file with that key", required=False)
TLS_CERT = cli.string_flag("tls_cert", "PEM certificate", required=False)
TLS_KEY = cli.string_flag("tls_key", "PEM private key", required=False)
EXECUTION = flags.DEFINE_enum(
    "execution",
    "chunk",
    ["chunk", "receding", "ensemble", "realtime"],
    "which actions of a chunk are executed; realtime: robots go on moving while they wait",
)
EXECUTE_STEPS = flags.DEFINE_integer("execute_steps", 1, "actions per call, unless whole chunks")
ENSEMBLE_DECAY = flags.DEFINE_float("ensemble_decay", 0.01, "decay of an ensemble's weights")
SAMPLING = sampling_flags()
MESH = mesh_flags()
REPLICAS = flags.DEFINE_integer(
    "replicas", 1, "copies of the model, each on chips of its own; 0 for as many as the host has"
)
CACHE_GIB = flags.DEFINE_float(
    "cache_gib", 0.0, "GiB per device of caches kept between calls; 0 takes what is free"
)
INT8 = flags.DEFINE_bool("int8", False, "store the weights in eight bits")
MAX_BATCH = flags.DEFINE_integer("max_batch", 8, "most robots in one call of the policy")
WINDOW_MS = flags.DEFINE_float("window_ms", 5.0, "milliseconds a request waits for others")
QUEUE = flags.DEFINE_integer("queue", 64, "most requests that wait; more are refused")
MAX_CONNECTIONS = flags.DEFINE_integer("max_connections", 64, "most robots connected")
MAX_MESSAGE_MB = flags.DEFINE_integer("max_message_mb", 16, "largest request, in MiB")
DRAIN_SECONDS = flags.DEFINE_float("drain_seconds", 20.0, "seconds a stop waits for requests")
IDLE_SECONDS = flags.DEFINE_float(
    "idle_seconds", 3600.0, "seconds after which a silent robot is disconnected; 0 for never"
)
FORGET_AFTER_SECONDS = flags.DEFINE_float(
    "forget_after_seconds",
    0.0,
    "silence that starts an episode of a robot that names none; 0 starts one per request",
)
RELOAD_SECONDS = flags.DEFINE_float(
    "reload_seconds", 0.0, "seconds between looks for a newer checkpoint of the workdir; 0 for none"
)
CAMERA_SIZES = flags.DEFINE_list(
    "camera_sizes", [], "CAMERA=HEIGHTxWIDTH,... of the training data, where not as the policy sees"
)
MAX_INSTRUCTION_TOKENS = flags.DEFINE_integer(
    "max_instruction_tokens", 64, "longest instruction; longer ones are refused"
)
COMPILED = cli.string_flag(
    "compiled",
    f"folder of compiled functions; {_DEFAULT_COMPILED} by default, where it can be written",
    required=False,
)


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    logging.set_verbosity(logging.WARNING)
    standard_logging.getLogger("univla_jax.serving").setLevel(standard_logging.INFO)
    try:
        from univla_jax.serving import startup
        from univla_jax.serving.server import ServerConfig
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs the package {error.name}: pip install .[serve]") from error
    from univla_jax.inference.execution import Execution, Executor
    from univla_jax.inference.policy import Policy
    from univla_jax.training.model_setup import replica_devices

    # What can be wrong with the command line is found first: loading and compiling an 8B policy
    # takes minutes, and a port that is taken should not cost them.
    config = ServerConfig(
        host=HOST.value,
        port=PORT.value,
        max_batch=MAX_BATCH.value,
        window_seconds=WINDOW_MS.value / 1e3,
        queue=QUEUE.value,
        max_connections=MAX_CONNECTIONS.value,
        max_message_bytes=MAX_MESSAGE_MB.value * 2**20,
        drain_seconds=DRAIN_SECONDS.value,
        idle_seconds=IDLE_SECONDS.value,
        forget_after_seconds=FORGET_AFTER_SECONDS.value,
        camera_sizes=startup.parse_camera_sizes(CAMERA_SIZES.value),
        api_key=(
            cli.read_secret(API_KEY_FILE.value, "api_key_file")
            if API_KEY_FILE.value
            else API_KEY.value
        ),
    )
    tls = startup.tls_context(TLS_CERT.value, TLS_KEY.value)
    execution = Execution(EXECUTION.value, EXECUTE_STEPS.value, ENSEMBLE_DECAY.value)
    startup.check_port(config.host, config.port)
    _keep_compiled(startup.enable_compilation_cache)

    def load(checkpoint: str, devices: Sequence[Any]) -> Executor:
        policy = Policy.load(
            checkpoint,
            corpus=CORPUS.value,
            sampling=SAMPLING(),
            int8=INT8.value,
            place=functools.partial(MESH(), devices=devices),
            max_instruction_tokens=MAX_INSTRUCTION_TOKENS.value,
        )
        return Executor(policy, execution)

    parts = replica_devices(MESH().keywords, REPLICAS.value)
    executor, *further = [load(CHECKPOINT.value, devices) for devices in parts]
    max_batch = startup.warmup(executor.policy, config.max_batch, _report)
    config = dataclasses.replace(config, max_batch=max_batch)
    startup.plan_memory(executor.policy, max_batch, CACHE_GIB.value, _report)
    cache_bytes = executor.policy.memory(max_batch)["budget of caches kept"]
    for number, replica in enumerate(further, 2):
        _report(f"replica {number} of {len(parts)}")
        startup.warmup(replica.policy, max_batch, _report)
        replica.policy.set_cache_budget(cache_bytes)

    def load_next(checkpoint: str) -> list[Executor]:
        # Its programs are those of the one before: the shapes are the same, nothing is compiled.
        following = [load(checkpoint, devices) for devices in parts]
        for replica in following:
            replica.policy.warmup(1)
            replica.policy.set_cache_budget(cache_bytes)
        return following

    reloads = None
    if RELOAD_SECONDS.value:
        reloads = startup.Reloads(CHECKPOINT.value, RELOAD_SECONDS.value, load_next)
    if not asyncio.run(
        startup.serve(executor, config, tls, _report, further=further, reloads=reloads)
    ):
        os._exit(0)  # the call under way would be waited for


def _keep_compiled(enable: Callable[[str], None]) -> None:
    """Keeps compiled functions in the folder named, or in the default one if that is possible."""
    if COMPILED.value is not None:
        enable(COMPILED.value)
        return
    try:
        enable(_DEFAULT_COMPILED)
    except UserError as error:
        _report(f"compiled functions are not kept: {error}")


def _report(message: str) -> None:
    print(f"[{time.perf_counter() - _BEGIN:6.1f} s] {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
