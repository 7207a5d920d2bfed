"""From a checkpoint folder to a running server: checks, compilation, signals."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

import jax

from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.inference.execution import Executor
from univla_jax.inference.policy import Policy
from univla_jax.serving import protocol
from univla_jax.serving.server import PolicyServer, ServerConfig


def enable_compilation_cache(folder: str | os.PathLike[str]) -> None:
    """Lets later starts find what this one compiles.

    Args:
      folder: made where it is missing; only its owner can write there.

    Raises:
      UserError: it cannot be made.
    """
    path = pathlib.Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(f"--compiled={folder}: {error.strerror}; name another folder") from error
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def check_port(host: str, port: int) -> None:
    """Raises UserError where nothing can listen on the address; long before it is needed."""
    try:
        kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port or "
            "--host"
        ) from error


def tls_context(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    """The TLS settings of two PEM files, None where neither is given.

    Raises:
      UserError: only one is given, or they cannot be read.
    """
    if not certificate and not key:
        return None
    if not certificate or not key:
        raise UserError("TLS needs both --tls_cert and --tls_key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise UserError(
            f"TLS: cannot read {certificate} and {key}: {error}; give a PEM certificate and its "
            "private key"
        ) from error
    return context


def warmup(policy: Policy, max_batch: int, report: Callable[[str], None]) -> float:
    """Compiles every shape that requests will need; returns the seconds it took."""
    begin = time.perf_counter()
    rows = 1
    while True:
        policy.warmup(rows)
        report(f"ready for {rows} robot(s) at once after {time.perf_counter() - begin:.1f} s")
        if rows >= max_batch:
            return time.perf_counter() - begin
        rows = min(2 * rows, max_batch)


def describe(executor: Executor) -> dict[str, Any]:
    """What a robot is told when it connects."""
    policy = executor.policy
    loaded, statistics = policy.loaded, policy.statistics
    values = json.dumps(statistics.to_dict(), sort_keys=True)
    return {
        "protocol": protocol.VERSION,
        "checkpoint_step": int(loaded.folder.name) if loaded.folder.name.isdigit() else -1,
        "layout": loaded.record.task,
        "corpus": policy.corpus,
        "control_hz": float(loaded.record.corpora[policy.corpus].control_hz),
        "chunk": policy.chunk_size,
        "execution": executor.execution.mode,
        "actions_per_call": executor.steps,
        "action_dim": statistics.action_dim,
        "action_q01": list(statistics.q01),
        "action_q99": list(statistics.q99),
        "statistics_sha256": hashlib.sha256(values.encode()).hexdigest(),
        "observation_keys": _observation_keys(policy.example()),
        "prompt_key": protocol.PROMPT,
    }


def _observation_keys(example: Observation) -> dict[str, list[int]]:
    """What a request must hold beside its words, and the shapes."""
    request = protocol.write_request(example)
    return {key: list(value.shape) for key, value in request.items() if key != protocol.PROMPT}


async def serve(
    executor: Executor,
    config: ServerConfig,
    tls: ssl.SSLContext | None,
    report: Callable[[str], None],
) -> None:
    """Serves until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = PolicyServer(executor, config, metadata=describe(executor), tls=tls)
    scheme = "wss" if tls else "ws"

    def ready() -> None:
        report(f"listening on {scheme}://{config.host}:{server.port}")

    await server.run(stop, ready)
    report("stopped")


def with_key(config: ServerConfig, file: str | None) -> ServerConfig:
    """The config with the API key of a file, where one is named.

    Raises:
      UserError: the file cannot be read or is empty.
    """
    if not file:
        return config
    try:
        key = pathlib.Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api_key_file={file}: {error}") from error
    if not key:
        raise UserError(f"--api_key_file={file} is empty; write the key into it")
    return dataclasses.replace(config, api_key=key)
