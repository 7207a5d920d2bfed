"""Runs the commands of the launch scripts, or only prints them; needs nothing but Python."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn


class Shell:
    """Runs programs one after the other; with ``dry_run`` it prints each and runs none."""

    def __init__(self, dry_run: bool) -> None:
        """Keeps whether to run anything."""
        self.dry_run = dry_run

    def run(self, command: Sequence[str], *, given: str | None = None, check: bool = True) -> int:
        """Runs a command that shows its own output.

        Args:
          command: program and arguments.
          given: its standard input.
          check: whether a failure ends the script.

        Returns:
          its exit status, 0 in a dry run.
        """
        if self.dry_run:
            print(shlex.join(command))
            if given is not None:
                print(given.rstrip())
            return 0
        _require(command[0])
        status = subprocess.run(command, input=given, text=True, check=False).returncode
        if status and check:
            fail(f"{shlex.join(command)} ended with status {status}")
        return status

    def read(self, command: Sequence[str]) -> str | None:
        """What a command prints, stripped; None where it fails, the empty string in a dry run."""
        if self.dry_run:
            print(shlex.join(command))
            return ""
        _require(command[0])
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None


def split_command(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before and behind the first ``--``."""
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
