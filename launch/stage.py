"""Runs one stage of a recipe as a subprocess and records its time and memory.

    python launch/stage.py --record=stages.jsonl --name=policy --output=DIR -- COMMAND ...

Appends one JSON line per attempt: stage, command, seconds, peak_gigabytes (largest resident size
of the stage's processes), exit_status. A stage whose last line says that the same command finished,
and whose output is there, is not run again. The exit status is the command's.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time


def main() -> int:
    """Runs the stage of the command line unless it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=pathlib.Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if arguments.output.exists() and is_done(arguments.record, arguments.name, command):
        print(f"[{arguments.name}] done before, skipped", flush=True)
        return 0
    print(f"[{arguments.name}] {' '.join(command)}", flush=True)
    start = time.monotonic()
    status = run(command)
    line = {
        "stage": arguments.name,
        "command": command,
        "seconds": round(time.monotonic() - start, 1),
        "peak_gigabytes": round(peak_gigabytes(), 3),
        "exit_status": status,
    }
    append(arguments.record, line)
    print(f"[{arguments.name}] {line['seconds']} s, {line['peak_gigabytes']} GB", flush=True)
    return status


def is_done(record: pathlib.Path, name: str, command: list[str]) -> bool:
    """Whether the last attempt at the stage was this command, and finished."""
    attempts = []
    if record.exists():
        for text in record.read_text(encoding="utf-8").splitlines():
            try:
                attempts.append(json.loads(text))
            except json.JSONDecodeError:
                continue  # a line cut short by a crash
    mine = [a for a in attempts if a["stage"] == name]
    return bool(mine) and mine[-1]["command"] == command and mine[-1]["exit_status"] == 0


def append(record: pathlib.Path, line: dict) -> None:
    """Adds a line; one that a crash cut short before is ended first."""
    before = record.read_text(encoding="utf-8") if record.exists() else ""
    cut_short = bool(before) and not before.endswith("\n")
    with record.open("a", encoding="utf-8") as file:
        file.write("\n" * cut_short + json.dumps(line) + "\n")


def run(command: list[str]) -> int:
    """Runs the command, passing SIGTERM and SIGINT on, and returns its exit status."""
    process = subprocess.Popen(command)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: process.send_signal(received))
    status = process.wait()
    return status if status >= 0 else 128 - status


def peak_gigabytes() -> float:
    """Largest resident set among the processes this one waited for."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
