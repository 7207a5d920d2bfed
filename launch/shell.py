"""Runs or prints the commands of the launch scripts; needs the standard library only."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn


class Shell:
    """Runs programs one after the other; with ``dry_run`` it prints each and runs none."""

    def __init__(self, dry_run: bool) -> None:
        """Stores whether commands are only printed."""
        self.dry_run = dry_run

    def run(
        self,
        command: Sequence[str],
        *,
        stdin: str | None = None,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> int:
        """Runs a command whose output goes to the terminal.

        Args:
          command: program and arguments.
          stdin: its standard input.
          check: whether a failure ends the script.
          env: variables added to its environment.
          timeout: seconds after which it is killed.

        Returns:
          The exit status, 0 in a dry run, 124 after ``timeout``.
        """
        if self.dry_run:
            print(shlex.join(command))
            if stdin is not None:
                print(stdin.rstrip())
            return 0
        _require(command[0])
        environment = {**os.environ, **(env or {})}
        try:
            status = subprocess.run(
                command, input=stdin, text=True, check=False, env=environment, timeout=timeout
            ).returncode
        except subprocess.TimeoutExpired:
            status = 124
        if status and check:
            fail(f"{shlex.join(command)} ended with status {status}")
        return status

    def output(
        self, command: Sequence[str], *, timeout: float | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command and returns its status, output and errors; nothing in a dry run."""
        if self.dry_run:
            print(shlex.join(command))
            return subprocess.CompletedProcess(command, 0, "", "")
        _require(command[0])
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            message = f"no answer within {timeout:g} s"
            return subprocess.CompletedProcess(command, 124, "", message)


def split_command(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line at its first ``--`` into the script's options and the command."""
    # By hand: argparse would take the options of a command without ``--`` for the script's own.
    arguments = list(arguments)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def _require(program: str) -> None:
    if shutil.which(program) is None:
        fail(f"no {program!r} on PATH; install it, or see --dry_run")


def fail(message: str) -> NoReturn:
    """Ends the script with one line and status 2, as the commands of the package do."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
