"""Runs one stage of a recipe as a subprocess and records its time and memory.

    python launch/stage.py --record=stages.jsonl --name=policy --output=DIR -- COMMAND ...

Appends one JSON line per attempt: stage, command, seconds, peak_gigabytes (largest resident set of
the stage's processes), exit_status. A stage is skipped if its last line is the same command with
status 0 and its output exists. Exits with the command's status.
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
    """Runs the stage unless it is finished; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=to_path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--output", type=to_path, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if arguments.output.exists() and is_finished(arguments.record, arguments.name, command):
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


def to_path(text: str) -> pathlib.Path:
    """A local path, or one in a bucket."""
    if "://" not in text:
        return pathlib.Path(text)
    from univla_jax import io

    return io.absolute_path(text)


def is_finished(record: pathlib.Path, name: str, command: list[str]) -> bool:
    """Whether the last attempt at the stage was this command and succeeded."""
    # Only the last attempt counts: after a change of the command and back again, the output on disk
    # is that of the command in between.
    attempts = []
    if record.exists():
        for text in record.read_text(encoding="utf-8").splitlines():
            try:
                attempts.append(json.loads(text))
            except json.JSONDecodeError:
                continue  # cut short by a crash
    last = next((a for a in reversed(attempts) if a["stage"] == name), None)
    return last is not None and last["command"] == command and last["exit_status"] == 0


def append(record: pathlib.Path, line: dict) -> None:
    """Appends a JSON line, on a line of its own even if a crash cut the last one short."""
    before = record.read_text(encoding="utf-8") if record.exists() else ""
    cut_short = bool(before) and not before.endswith("\n")
    if "://" in str(record):  # in a bucket nothing is appended to; one stage runs at a time
        record.write_text(f"{before}{json.dumps(line)}\n")
        return
    with record.open("a", encoding="utf-8") as file:
        file.write("\n" * cut_short + json.dumps(line) + "\n")


def run(command: list[str]) -> int:
    """Runs the command, forwards SIGTERM and SIGINT to it, and returns its exit status."""
    process = subprocess.Popen(command)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: process.send_signal(received))
    status = process.wait()
    # ``Popen`` gives the negative number of a fatal signal; a shell expects 128 and the number.
    return status if status >= 0 else 128 - status


def peak_gigabytes() -> float:
    """Largest resident set of the processes waited for, those that they waited for included."""
    # ``ru_maxrss`` is in kilobytes on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
