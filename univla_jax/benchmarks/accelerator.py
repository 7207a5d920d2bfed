"""An accelerator's own numbers: decoding, training and encoding at full size on one GPU or TPU.

    python -m univla_jax.benchmarks.accelerator --minutes=8 --out=accelerator.json
    python -m univla_jax.benchmarks.accelerator --parts=decode --batches=1 --out=FILE
    python -m univla_jax.benchmarks.accelerator --preset=tiny --smaller= --vision=quickstart \\
        --prompt=40 --count=4 --length=64 --frames=4 --side=32 --out=FILE         # on any CPU

* ``device``: what plain copies and matrix products reach.
* ``decode``, ``decode_int8``: the 8.5 B decoder with random weights, a prompt of 1,300 tokens and
  50 action tokens, at batch 1 and 8: milliseconds per token and of the whole call, beside what
  reading the weights once takes by the data sheet and by the copies.
* ``lora``, ``full``: a train step of 3,200 tokens per sequence: the 8.5 B decoder with adapters,
  and the largest preset that fits with everything trained; model FLOP/s utilization by our count.
* ``vision``: frames of 200 x 200 per second through the vision tokenizer's encoder.
* ``peer_decode``, ``peer_vision``: transformers on the same device, where PyTorch finds it.

Every part runs in a process of its own with a share of the time that is left, so that none takes
memory or time from the next; what fails is written down and the others go on. ``--out`` is written
anew with every figure. Exit status: 0 every part said something, 1 one of them said nothing.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags, logging

from univla_jax import cli
from univla_jax.benchmarks.accelerator_device import Emit, Sizes, describe_error, measure_device
from univla_jax.benchmarks.accelerator_inference import (
    measure_decoding,
    measure_peer_decoding,
    measure_peer_vision,
    measure_vision,
)
from univla_jax.benchmarks.accelerator_training import (
    full_attempts,
    lora_attempts,
    measure_training,
)
from univla_jax.errors import UserError
from univla_jax.io import write_json

PARTS: dict[str, tuple[Callable[[Sizes, Emit], None], float]] = {
    "device": (measure_device, 1.5),
    "decode": (measure_decoding, 4.0),
    "lora": (functools.partial(measure_training, attempts=lora_attempts), 5.0),
    "decode_int8": (functools.partial(measure_decoding, kind="int8"), 3.0),
    "full": (functools.partial(measure_training, attempts=full_attempts), 5.0),
    "peer_decode": (measure_peer_decoding, 3.0),
    "vision": (measure_vision, 2.0),
    "peer_vision": (measure_peer_vision, 1.5),
}
"""Function of each part and its share of the time, the most wanted first."""

_SHARED = {"allow_override": True}  # other benchmarks have flags of these names
MINUTES = flags.DEFINE_float("minutes", 8.0, "Minutes of all parts together")
OUT = cli.string_flag("out", "file for the figures, JSON")
CHOSEN = flags.DEFINE_list("parts", list(PARTS), "What is measured", **_SHARED)
PRESET = cli.string_flag("preset", "decoder", default=Sizes.preset)
SMALLER = flags.DEFINE_list(
    "smaller", list(Sizes.smaller), "Presets to train in full where --preset does not fit"
)
PROMPT = flags.DEFINE_integer("prompt", Sizes.prompt, "Prompt tokens", **_SHARED)
COUNT = flags.DEFINE_integer("count", Sizes.count, "New tokens", **_SHARED)
BATCHES = flags.DEFINE_list("batches", [str(n) for n in Sizes.batches], "Prompts of a call")
LENGTH = flags.DEFINE_integer("length", Sizes.length, "Tokens of a training sequence", **_SHARED)
VISION = flags.DEFINE_string("vision", Sizes.vision, "Preset of the vision tokenizer", **_SHARED)
FRAMES = flags.DEFINE_integer("frames", Sizes.frames, "Frames of a call", **_SHARED)
SIDE = flags.DEFINE_integer("side", Sizes.side, "Height and width of a frame in pixels")
REPEATS = flags.DEFINE_integer("repeats", Sizes.repeats, "Repeats; the fastest counts", **_SHARED)
ALONE = flags.DEFINE_float("alone", 0.0, "Seconds of the one part that this process measures")

_MARK = "FIGURES "  # before the JSON of each figure on standard output
_STARTING = 5.0  # seconds in which no part gets anywhere


# ----------------------------------------------------------------------------
# The process of a part.


def emit(figures: Mapping[str, Any]) -> None:
    """Prints figures for the process that waits for them."""
    print(_MARK + json.dumps(figures), flush=True)


def measure(part: str, sizes: Sizes, emit: Emit) -> None:
    """Measures one part; an error is a figure too."""
    try:
        PARTS[part][0](sizes, emit)
    except Exception as error:  # what a card never seen may say is not known
        logging.exception("%s", part)
        emit({"error": describe_error(error)})


# ----------------------------------------------------------------------------
# The process that waits.


def run_part(
    command: Sequence[str], seconds: float, emit: Emit, environ: Mapping[str, str]
) -> None:
    """Runs the process of a part, and ends it when its time is over.

    Args:
      command: prints figures as ``emit`` does.
      seconds: it may take.
      emit: gets the figures as they come, and how the process ended where it failed.
      environ: of the process.
    """
    with tempfile.TemporaryFile("w+") as messages:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=messages, text=True, env=dict(environ)
        )
        timer, late = threading.Timer(seconds, process.kill), False
        timer.start()
        try:
            for line in process.stdout or ():
                if line.startswith(_MARK):
                    emit(json.loads(line.removeprefix(_MARK)))
            status = process.wait()
        finally:
            late = not timer.is_alive()
            timer.cancel()
            process.kill()
        if status and late:
            emit({"error": f"stopped after its {seconds:.0f} s"})
        elif status:
            messages.seek(0)
            last = [line for line in messages.read().splitlines() if line.strip()][-1:]
            emit({"error": f"exit status {status}: {''.join(last)[:300]}"})


def run_parts(
    parts: Sequence[str],
    seconds: float,
    run: Callable[[str, float, Emit], None],
    save: Callable[[Mapping[str, Any]], None],
) -> dict[str, list[dict[str, Any]]]:
    """Runs the parts one after the other; each gets its share of the time that is left.

    Args:
      parts: names in ``PARTS``.
      seconds: of all together.
      run: measures a part in some seconds and emits its figures.
      save: called with all figures so far whenever there are new ones.

    Returns:
      figures by part.
    """
    end = time.monotonic() + seconds
    figures: dict[str, list[dict[str, Any]]] = {}
    for number, part in enumerate(parts):
        left = end - time.monotonic()
        share = left * PARTS[part][1] / sum(PARTS[name][1] for name in parts[number:])
        own = figures.setdefault(part, [])

        def add(found: Mapping[str, Any], own: list[dict[str, Any]] = own) -> None:
            own.append(dict(found))
            save(figures)

        if share < _STARTING:
            add({"skipped": f"{max(share, 0):.0f} s left for it"})
            continue
        began = time.monotonic()
        run(part, share, add)
        add({"seconds": time.monotonic() - began})
    return figures


def compare_with_peer(figures: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """How many times faster the same calls are than the peer's, where both were measured."""
    found: list[dict[str, Any]] = []
    theirs = {f.get("batch"): f for f in figures.get("peer_decode", ()) if "ms_per_token" in f}
    for own in figures.get("decode", ()):
        peer = theirs.get(own.get("batch"))
        if peer and "ms_per_token" in own:
            ratios = {name: peer[name] / own[name] for name in ("ms_per_token", "call_ms")}
            found.append(
                {"batch": own["batch"]} | {f"{n}_times_less": r for n, r in ratios.items()}
            )
    ours = [f for f in figures.get("vision", ()) if f.get("dtype") == "float32"]
    peers = [f for f in figures.get("peer_vision", ()) if "frames_per_second" in f]
    if ours and peers:
        ratio = ours[0]["frames_per_second"] / peers[0]["frames_per_second"]
        found.append({"frames_per_second_times_more": ratio})
    return found


def child_environment(part: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a part's process: nearly all memory for JAX, or none beside PyTorch."""
    if part.startswith("peer_"):
        return {**environ, "JAX_PLATFORMS": "cpu"}
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", **environ}


def read_sizes(seconds: float) -> Sizes:
    """What the flags say.

    Raises:
      UserError: no number where one belongs.
    """
    try:
        batches = tuple(int(text) for text in BATCHES.value)
    except ValueError as error:
        raise UserError(f"--batches={','.join(BATCHES.value)}: expected numbers") from error
    return Sizes(
        preset=PRESET.value,
        smaller=tuple(name for name in SMALLER.value if name),
        prompt=PROMPT.value,
        count=COUNT.value,
        batches=batches,
        length=LENGTH.value,
        vision=VISION.value,
        frames=FRAMES.value,
        side=SIDE.value,
        repeats=REPEATS.value,
        budget=seconds,
    )


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    del argv
    logging.set_verbosity(logging.WARNING)
    unknown = sorted(set(CHOSEN.value) - set(PARTS))
    if unknown or not CHOSEN.value:
        raise UserError(f"--parts: {''.join(unknown[:1])!r}, expected some of {', '.join(PARTS)}")
    sizes = read_sizes(ALONE.value)
    if ALONE.value:
        measure(CHOSEN.value[0], sizes, emit)
        return 0
    out = pathlib.Path(OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    given = [f"--{name}={_text(name)}" for name in _FLAGS]

    def run(part: str, seconds: float, emit: Emit) -> None:
        command = [sys.executable, "-m", "univla_jax.benchmarks.accelerator", f"--out={OUT.value}"]
        command += [f"--parts={part}", f"--alone={seconds}", *given]
        run_part(command, seconds, functools.partial(_show, part, emit), environment(part))

    environment = functools.partial(child_environment, environ=os.environ)
    figures = run_parts(CHOSEN.value, 60 * MINUTES.value, run, functools.partial(write_json, out))
    write_json(out, {**figures, "beside_peer": compare_with_peer(figures)})
    return 0 if all(len(own) > 1 or "skipped" in own[0] for own in figures.values()) else 1


_FLAGS = ("preset", "smaller", "prompt", "count", "batches", "length", "vision")
_FLAGS += ("frames", "side", "repeats")


def _text(name: str) -> str:
    value = flags.FLAGS[name].value
    return ",".join(value) if isinstance(value, list) else str(value)


def _show(part: str, emit: Emit, figures: Mapping[str, Any]) -> None:
    """Passes figures on and prints them."""
    print(part, json.dumps(figures), flush=True)
    emit(figures)


if __name__ == "__main__":
    cli.run(main)
