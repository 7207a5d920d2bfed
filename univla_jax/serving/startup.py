"""Startup of the policy server: address check, TLS, API key, compilation, metadata, signals."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
import signal
import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from univla_jax.buckets import require_local
from univla_jax.checkpoints import checkpoint_identity, newest_checkpoint
from univla_jax.errors import UserError
from univla_jax.inference.execution import Executor
from univla_jax.inference.memory import GIB, cache_budget, is_out_of_memory
from univla_jax.inference.policy import Policy
from univla_jax.inference.sampler import batch_bucket
from univla_jax.serving import protocol
from univla_jax.serving.server import PolicyServer, ServerConfig

_log = logging.getLogger(__name__)


def enable_compilation_cache(folder: str | os.PathLike[str]) -> None:
    """Keeps compiled functions in a folder, where later starts find them.

    Args:
      folder: created if it is missing; only its owner can write there.

    Raises:
      UserError: it cannot be made or written.
    """
    require_local(folder, "the folder of compiled functions")
    try:
        path = pathlib.Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--compiled={folder}: {reason}; name another folder") from error
    # JAX keeps by default only what took more than a second to compile. A policy is many small
    # programs, one per shape, which together are most of a start.
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def check_port(host: str, port: int) -> None:
    """Checks that the address is free, before a policy is loaded and compiled for minutes.

    Raises:
      UserError: nothing can listen there.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port or "
            "--host"
        ) from error


def tls_context(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    """TLS settings from a certificate and its key, both PEM files; None if neither is given.

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


def warmup(policy: Policy, max_batch: int, report: Callable[[str], None]) -> int:
    """Compiles every shape that requests will need.

    Args:
      policy: whose functions are compiled.
      max_batch: most robots in one call.
      report: gets a line of progress per batch size.

    Returns:
      the most robots in one call for which there is memory, at most ``max_batch``.

    Raises:
      UserError: there is too little memory for one robot.
    """
    # Calls are padded to a few batch sizes; compiling each of them now means that no robot ever
    # waits for the compiler.
    begin, usable = time.perf_counter(), 0
    for size in sorted({batch_bucket(rows) for rows in range(1, max_batch + 1)}):
        try:
            policy.warmup(size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if not usable:
                raise UserError(
                    f"the memory is too small to answer one robot ({str(error)[:200]}); store the "
                    "weights in eight bits (--int8) or split them over more chips (--mesh.tensor)"
                ) from error
            report(f"out of memory for {size} robots at once; at most {usable} are answered")
            return usable
        usable = min(size, max_batch)
        report(f"ready for {size} robot(s) at once after {time.perf_counter() - begin:.1f} s")
    return usable


def plan_memory(
    policy: Policy, max_batch: int, cache_gib: float, report: Callable[[str], None]
) -> None:
    """Sets the budget of the caches kept between calls, and reports what takes memory.

    Args:
      policy: after ``warmup``, whose peak is what calls need.
      max_batch: most robots in one call.
      cache_gib: budget in GiB per device; 0 takes what weights and calls leave.
      report: gets one line.
    """
    policy.set_cache_budget(int(cache_gib * GIB) or cache_budget())
    parts = policy.memory(max_batch).items()
    sizes = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts)
    report(f"GiB per device: {sizes}")


def server_metadata(executor: Executor, config: ServerConfig) -> dict[str, Any]:
    """The first message to every robot: what to send, what it gets, and of which checkpoint."""
    policy = executor.policy
    loaded, statistics = policy.loaded, policy.statistics
    example = policy.example()
    frames = {
        view: np.zeros((*config.camera_sizes.get(view, size), 3), np.uint8)
        for view, size in policy.frame_sizes.items()
    }
    request = protocol.request_message(dataclasses.replace(example, frames=frames))
    statistics_json = json.dumps(statistics.to_dict(), sort_keys=True)
    return {
        "protocol": protocol.VERSION,
        "checkpoint": checkpoint_identity(loaded.folder),
        "checkpoint_step": int(loaded.folder.name) if loaded.folder.name.isdigit() else -1,
        "layout": loaded.record.task,
        "corpus": policy.corpus,
        "control_hz": float(loaded.record.corpora[policy.corpus].control_hz),
        "chunk": policy.chunk_size,
        "execution": executor.execution.mode,
        "actions_per_call": executor.steps,
        "max_committed": executor.max_committed,
        "action_dim": statistics.action_dim,
        "absolute_dims": list(policy.absolute_dims),
        "action_q01": list(statistics.q01),
        "action_q99": list(statistics.q99),
        "statistics_sha256": hashlib.sha256(statistics_json.encode()).hexdigest(),
        "observation_keys": {
            key: list(value.shape) for key, value in request.items() if key != protocol.PROMPT
        },
        "prompt_key": protocol.PROMPT,
        "optional_keys": list(protocol.OPTIONAL),
        "keeps_history": executor.keeps_history,
        "forget_after_seconds": float(config.forget_after_seconds),
    }


@dataclasses.dataclass(frozen=True)
class Reloads:
    """Where newer checkpoints are looked for.

    Attributes:
      workdir: of the training.
      seconds: between two looks.
      load: loads and compiles the replicas of the policy of a checkpoint folder.
    """

    workdir: str
    seconds: float
    load: Callable[[str], Sequence[Executor]]


async def watch(
    server: PolicyServer, executor: Executor, config: ServerConfig, reloads: Reloads
) -> None:
    """Replaces the policy of a server whenever its workdir has a newer checkpoint; runs for ever.

    A checkpoint that cannot be loaded, or whose tokens mean something else, is logged and left: the
    server goes on with what it has.
    """
    served, tried = executor, str(executor.policy.loaded.folder)
    while True:
        await asyncio.sleep(reloads.seconds)
        folder = await asyncio.to_thread(newest_checkpoint, reloads.workdir)
        if folder is None or str(folder) == tried:
            continue
        tried = str(folder)
        try:
            new, *further = await asyncio.to_thread(reloads.load, tried)
            _check_same_meaning(served, new)
        except Exception:
            _log.exception("checkpoint %s is not served; the one before is", tried)
            continue
        await server.reload(new, server_metadata(new, config), further=further)
        served = new


def _check_same_meaning(old: Executor, new: Executor) -> None:
    """Raises UserError where robots' histories mean something else to a new checkpoint."""
    # An adapter moves weights alone: another one, and its base itself, read the same tokens.
    loaded = (executor.policy.loaded.assets for executor in (old, new))
    one, other = (dataclasses.replace(assets, adapter={}) for assets in loaded)
    if one.fingerprint != other.fingerprint:
        raise UserError(
            "its tokenizers, statistics or cameras are others; start a server of its own for it"
        )


async def serve(
    executor: Executor,
    config: ServerConfig,
    tls: ssl.SSLContext | None,
    report: Callable[[str], None],
    *,
    further: Sequence[Executor] = (),
    reloads: Reloads | None = None,
) -> bool:
    """Serves until SIGTERM or SIGINT.

    Args:
      executor: a policy that ``warmup`` has compiled.
      config: address, limits and timeouts.
      tls: certificate and key, or None for plain connections.
      report: gets a line when the server listens and when it has stopped.
      further: replicas of the policy on other devices.
      reloads: where newer checkpoints appear; nowhere by default.

    Returns:
      whether no call of the policy is under way any more.

    Raises:
      UserError: the port is taken.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    metadata = server_metadata(executor, config)
    server = PolicyServer(executor, config, metadata=metadata, tls=tls, further=further)
    scheme = "wss" if tls else "ws"
    watching: list[asyncio.Task[None]] = []

    def on_ready() -> None:
        report(f"listening on {scheme}://{config.host}:{server.port}")
        if reloads is not None:
            watching.append(asyncio.create_task(watch(server, executor, config, reloads)))

    await server.run(stop, on_ready)
    for task in watching:
        task.cancel()
    report("stopped, with a call of the policy under way" if server.call_under_way else "stopped")
    return not server.call_under_way


def parse_camera_sizes(items: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Sizes ``CAMERA=HEIGHTxWIDTH`` by camera.

    Raises:
      UserError: an item of another form.
    """
    sizes = {}
    for item in items:
        found = re.fullmatch(r"(.+)=(\d+)x(\d+)", item)
        if not found:
            raise UserError(f"--camera_sizes: {item!r}, expected CAMERA=HEIGHTxWIDTH")
        sizes[found[1]] = (int(found[2]), int(found[3]))
    return sizes
