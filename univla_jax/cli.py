"""Flags, config file, one-line errors and tables of all commands.

In a command module::

    CONFIG = cli.config_flag()
    OUT = cli.string_flag("out", "folder for the result")

    if __name__ == "__main__":
        cli.run(main)
"""

from __future__ import annotations

import errno
import functools
import os
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from univla_jax import buckets, config
from univla_jax.errors import ExitStatus, HangError, TransientError, UserError

_CONFIG = "config"
_NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_FAILED_FOR_NOW = (
    *(errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENOLCK, errno.EAGAIN),
    *(errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
    *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ENOTCONN),
)
_REMEDY = "make room or choose another folder; what was complete before is intact"
_BUCKETS = ("gs://", "s3://", "az://", "hf://")
_defaults: dict[str, str] = {}


def config_flag(default: str | None = None, *, required: bool = True) -> flags.FlagHolder[Any]:
    """Defines ``--config=FILE.py[:NAME]`` with ``--config.a.b=value`` overrides.

    Args:
      default: the file (and name) used when the command line has no ``--config``.
      required: whether the flag must be given where there is no default.

    Returns:
      the flag holder; its ``.value`` is a locked ``ml_collections.ConfigDict`` inside ``main``,
      None where the flag is neither required nor given.
    """
    holder = config_flags.DEFINE_config_file(
        _CONFIG,
        None,
        "Config file, and after a colon the recipe in it: FILE.py[:NAME]",
        allow_override=True,
    )
    if default is None and required:
        flags.register_validator(
            _CONFIG,
            lambda value: value is not None,
            message="missing; give --config=FILE.py[:NAME]",
        )
    elif default is not None:
        _defaults[_CONFIG] = default
    return holder


def string_flag(
    name: str, help_text: str, *, default: str | None = None, required: bool | None = None
) -> flags.FlagHolder[Any]:
    """Defines ``--name=TEXT``; several command modules may define the same one.

    Args:
      name: without dashes.
      help_text: one line.
      default: value where the command line has none.
      required: whether it must be given; by default where there is no default.
    """
    must = default is None if required is None else required
    holder = flags.DEFINE_string(name, default, help_text, allow_override=True)
    if must:
        message = f"missing; give --{name}=..., the {help_text}"
        flags.register_validator(name, lambda value: value is not None, message=message)
    return holder


def read_secret(file: str, flag: str) -> str:
    """The text of a file, such as an API key, without the white space around it.

    Args:
      file: its path.
      flag: that names it, for messages.

    Raises:
      UserError: the file cannot be read or is empty.
    """
    try:
        secret = pathlib.Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--{flag}={file}: {error}") from error
    if not secret:
        raise UserError(f"--{flag}={file} is empty; write the secret into it")
    return secret


def run(main: Callable[[list[str]], Any], *, arguments: int = 0) -> None:
    """Parses the flags, runs ``main(argv)`` and leaves the process.

    A ``UserError``, a flag that does not parse, a missing config file, an override of a key that
    the config lacks and a disk that is full or read-only each become one line on standard error and
    exit status 2; a ``TransientError`` and a disk or network that fails for now, one line and
    status 85; a ``HangError``, one line and status 86. Any other exception is a bug and keeps its
    traceback.

    Args:
      main: gets the command line without its flags; its result becomes the exit status.
      arguments: the most that may stand on the command line beside the flags.
    """
    # config_flags reads its file while the flags are parsed, and only where --config is on the
    # command line; overrides like --config.a=1 need the file too. So a default is put there.
    if _CONFIG in _defaults and _config_argument(sys.argv) is None:
        sys.argv[1:1] = [f"--{_CONFIG}={_defaults[_CONFIG]}"]
    parse = functools.partial(_parse, arguments=arguments)
    app.run(_guarded(main), flags_parser=_guarded(parse))


def report(error: BaseException) -> ExitStatus | None:
    """Prints the line of an error that is no bug.

    Returns:
      the exit status that says what kind of error it is; None, and nothing printed, for a bug.
    """
    message = str(error)
    if isinstance(error, HangError):
        status = ExitStatus.HANG
    elif isinstance(error, TransientError):
        status = ExitStatus.TRANSIENT
    elif isinstance(error, UserError):
        status = ExitStatus.USER_ERROR
    elif isinstance(error, OSError) and error.errno in _NO_WRITING:
        status = ExitStatus.USER_ERROR
        message = f"{error.filename or 'a file'} cannot be written: {error.strerror}; {_REMEDY}"
    elif isinstance(error, OSError) and error.errno in _FAILED_FOR_NOW:
        status = ExitStatus.TRANSIENT
        message = f"{error.filename or 'a file or connection'} failed for now: {error.strerror}"
    elif buckets.is_transient(error):
        status = ExitStatus.TRANSIENT
        message = f"a bucket or the network failed for now: {type(error).__name__}: {error}"
    else:
        return None
    print("error:", " ".join(message.split()), file=sys.stderr, flush=True)
    return status


def _guarded(function: Callable[[list[str]], Any]) -> Callable[[list[str]], Any]:
    """Wraps ``function`` so that an error that is no bug becomes one line and its status."""

    def call(argv: list[str]) -> Any:
        try:
            return function(argv)
        except Exception as error:
            status = report(error)
            if status is None:
                raise
            if status == ExitStatus.HANG:
                # Threads that still wait would keep an ordinary exit from ending.
                sys.stdout.flush()
                os._exit(status)
            sys.exit(int(status))

    return call


def _parse(argv: list[str], arguments: int) -> list[str]:
    """Parses all flags; raises UserError for a mistake of the command line."""
    # What config_flags raises for a mistake depends on it: a missing file surfaces when the config
    # is first used, an unknown key as one of three exceptions that name neither key nor remedy. So
    # the file is checked before, and after a failure the overrides are looked up one by one.
    argument = _config_argument(argv)
    if argument is not None:
        _check_file(argument.split(":", 1)[0])
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        message = _flag_message(error)
        if "Traceback" in message:  # a bug in the config file, worth its traceback
            raise
        raise UserError(message) from error
    except (AttributeError, KeyError, TypeError):
        if argument is not None:
            _check_overrides(argument, argv)
        raise
    if len(rest) > 1 + arguments:
        raise UserError(
            f"unexpected argument {rest[1 + arguments]!r}; options are written --name=value"
        )
    if argument is not None:
        _check_loaded(flags.FLAGS[_CONFIG].value)
    for path in _bucket_paths(flags.FLAGS.flag_values_dict()):
        buckets.check_access(path)
    return rest


def _bucket_paths(value: Any) -> list[str]:
    """One path of every bucket that flags or the config name, before any work is done there."""
    if isinstance(value, str):
        return [value] if value.startswith(_BUCKETS) else []
    if hasattr(value, "items"):
        value = [item for _, item in value.items()]
    if not isinstance(value, (list, tuple)):
        return []
    found = {path.split("/")[2]: path for item in value for path in _bucket_paths(item)}
    return list(found.values())


def _config_argument(argv: list[str]) -> str | None:
    """The value of ``--config`` on the command line, None where it is absent."""
    for i, argument in enumerate(argv):
        match = re.match(rf"--?{_CONFIG}(=(.*))?$", argument, re.DOTALL)
        if match and match[1]:
            return match[2]
        if match and i + 1 < len(argv):
            return argv[i + 1]
    return None


def _check_file(path: str) -> None:
    if not os.path.isfile(path):
        raise UserError(
            f"--{_CONFIG}: no file {path!r} in {os.getcwd()!r}; give the path of a config file"
        )


def _check_loaded(values: Any) -> None:
    """Raises the read error which config_flags keeps back until the config is first used."""
    try:
        getattr(values, "lock", None)
    except OSError as error:
        raise UserError(f"--{_CONFIG}: {error.__cause__ or error}") from error


def _check_overrides(argument: str, argv: list[str]) -> None:
    """Raises UserError for the first ``--config.a.b`` whose key the config lacks."""
    values = flags.FLAGS[_CONFIG].parser.parse(argument)
    _check_loaded(values)
    for item in argv:
        match = re.match(rf"--?(?:no)?{_CONFIG}\.([^=]+)", item)
        if match:
            _check_key(values, match[1])


def _check_key(values: Any, path: str) -> None:
    node, where = values, _CONFIG
    for key in path.split("."):
        key = key.split("[", 1)[0]
        if not isinstance(node, Mapping) and not hasattr(node, "keys"):
            raise UserError(f"--{_CONFIG}.{path}: {where} is a value, it has no key {key!r}")
        if key not in node:
            hint = config.name_hint(key, sorted(map(str, node.keys())), f"{where} has")
            raise UserError(f"--{_CONFIG}.{path}: unknown key {key!r}; {hint}")
        node, where = node[key], f"{where}.{key}"


def _flag_message(error: BaseException) -> str:
    """The message of a flag error, or of the UserError which the config file itself raised."""
    inner: BaseException | None = error
    found = None
    while inner is not None:
        found = inner if isinstance(inner, UserError) else found
        inner = inner.__cause__ or inner.__context__
    return str(found or error)


def format_table(rows: Sequence[Sequence[object]], *, left: int = 1) -> str:
    """Rows as aligned columns: words to the left, numbers to the right.

    Args:
      rows: the first is the heading; all of one length.
      left: how many of the first columns hold words.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        parts = [c.ljust(w) for c, w in zip(row[:left], widths[:left])]
        parts += [c.rjust(w) for c, w in zip(row[left:], widths[left:])]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)
