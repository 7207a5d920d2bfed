"""Every flag of the server's command, changed, arrives where it acts."""

from __future__ import annotations

import ast
import dataclasses
import inspect

import pytest
from absl import flags

from univla_jax import serve
from univla_jax.inference import policy
from univla_jax.serving import startup

# Flag -> value on the command line, and where it arrives with which value.
TABLE = {
    "checkpoint": ("there", "checkpoint", "there"),
    "corpus": ("c", "corpus", "c"),
    "host": ("0.0.0.0", "config.host", "0.0.0.0"),
    "port": ("1234", "config.port", 1234),
    "api_key": ("k", "config.api_key", "k"),
    "api_key_file": ("FILE", "config.api_key", "from the file"),
    "tls_cert": ("cert", "tls", ("cert", None)),
    "tls_key": ("key", "tls", (None, "key")),
    "execution": ("receding", "execution.mode", "receding"),
    "execute_steps": ("3", "execution.steps", 3),
    "ensemble_decay": ("0.5", "execution.decay", 0.5),
    "speculative_block": ("3", "speculative_block", 3),
    "temperature": ("0.5", "sampling.temperature", 0.5),
    "top_k": ("7", "sampling.top_k", 7),
    "top_p": ("0.5", "sampling.top_p", 0.5),
    "seed": ("9", "sampling.seed", 9),
    "mesh.tensor": ("2", "place.tensor", 2),
    "mesh.fsdp": ("4", "place.fsdp", 4),
    "cache_gib": ("1.5", "cache_gib", 1.5),
    "int8": ("true", "int8", True),
    "max_batch": ("3", "config.max_batch", 3),
    "window_ms": ("7", "config.window_seconds", 0.007),
    "queue": ("5", "config.queue", 5),
    "max_connections": ("6", "config.max_connections", 6),
    "max_message_mb": ("2", "config.max_message_bytes", 2**21),
    "drain_seconds": ("4", "config.drain_seconds", 4.0),
    "idle_seconds": ("8", "config.idle_seconds", 8.0),
    "forget_after_seconds": ("9", "config.forget_after_seconds", 9.0),
    "reload_seconds": ("11", "reloads.seconds", 11.0),
    "camera_sizes": ("image=4x6", "config.camera_sizes", {"image": (4, 6)}),
    "max_instruction_tokens": ("12", "max_instruction_tokens", 12),
    "compiled": ("folder", "compiled", "folder"),
}


class _Policy:
    """Stands for a loaded policy."""

    chunk_size, history_window = 10, 1

    def memory(self, batch_size):
        return {"budget of caches kept": 0}


@pytest.fixture
def arrived(monkeypatch):
    """Runs the command on its flags; what reached the parts that act on them."""
    found = {}

    def load(checkpoint, **options):
        place = options.pop("place").keywords
        found.update(options, checkpoint=checkpoint)
        found.update({f"place.{name}": value for name, value in place.items()})
        found.update(_fields("sampling", options["sampling"]))
        return _Policy()

    async def run(executor, config, tls, report, *, reloads=None):
        found.update(_fields("config", config) | _fields("execution", executor.execution))
        found.update({} if reloads is None else _fields("reloads", reloads))
        return True

    monkeypatch.setattr(policy.Policy, "load", load)
    monkeypatch.setattr(startup, "serve", run)
    monkeypatch.setattr(startup, "warmup", lambda policy, max_batch, report: max_batch)
    monkeypatch.setattr(startup, "check_port", lambda host, port: None)
    monkeypatch.setattr(startup, "tls_context", lambda *files: found.update(tls=files))
    monkeypatch.setattr(
        startup, "enable_compilation_cache", lambda folder: found.update(compiled=folder)
    )
    monkeypatch.setattr(
        startup, "plan_memory", lambda policy, batch, gib, report: found.update(cache_gib=gib)
    )

    def command(arguments):
        found.clear()
        # Each by itself: parsing a whole command line would also ask for the flags that other
        # commands, imported by other tests, cannot do without.
        flags.FLAGS.mark_as_parsed()
        for argument in arguments:
            name, value = argument.removeprefix("--").split("=", 1)
            flags.FLAGS[name].parse(value)
        serve.main([])
        return dict(found)

    kept = flags.FLAGS.flag_values_dict()
    yield command
    for name, value in kept.items():
        flags.FLAGS[name].value = value
        flags.FLAGS[name].present = 0


def _fields(name, value):
    return {f"{name}.{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)}


def test_every_flag_arrives(arrived, tmp_path):
    (tmp_path / "key").write_text("from the file\n")
    default = arrived(["--checkpoint=here"])
    for flag, (value, where, expected) in TABLE.items():
        argument = f"--{flag}={tmp_path / 'key' if value == 'FILE' else value}"
        for name in TABLE:
            flags.FLAGS[name].unparse()
        found = arrived(["--checkpoint=here", argument])
        assert found[where] == expected, flag
        assert default.get(where) != expected, f"--{flag}: the value tested is the default"


def test_the_table_has_every_flag_of_the_command():
    shared = {"temperature", "top_k", "top_p", "seed", "mesh.tensor", "mesh.fsdp"}
    calls = [n for n in ast.walk(ast.parse(inspect.getsource(serve))) if isinstance(n, ast.Call)]
    defined = {
        call.args[0].value
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and (call.func.attr == "string_flag" or call.func.attr.startswith("DEFINE_"))
    }
    assert len(defined) > 20 and defined | shared == TABLE.keys()
