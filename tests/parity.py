"""Runs the golden groups of a folder through the package.

    python -m tests.parity --golden=DIR [--group=decoder,9] [--json=FILE]

Every group found in DIR is run; its configs, shapes and case names are read from its files. Per
group: cases, largest error, tolerance of the golden README, pass or fail. Exit status 1 when one
fails or cannot run, 2 for a wrong call.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.parity_groups import (
    actions,
    decoder,
    driving,
    expert,
    keys,
    recipe,
    sequences,
    steps,
    vision,
    words,
)
from tests.parity_groups.checks import Check, Golden, Group, Result, run_group

_FIXED = (
    Group(
        "2",
        "image",
        ("smart_resize.json", "image_processing.npz", "image_processing.json"),
        vision.image,
    ),
    Group(
        "3",
        "decoder",
        ("decoder.npz", "decoder.safetensors", "decoder_config.json", "decoder_grad_names.json"),
        decoder.decoder,
    ),
    Group("4", "generate", ("generate.npz", "generate.json"), decoder.generate),
    Group(
        "5",
        "action_expert",
        ("action_expert.npz", "action_expert.safetensors", "action_expert_config.json"),
        expert.action_expert,
    ),
    Group("6", "fast", ("fast.npz", "fast_encode.json", "fast_decode.json"), actions.fast),
    Group("7", "bins", ("action_bins.npz", "action_bins.json"), actions.bins),
    Group("8", "normalize", ("normalize.npz", "normalize.json"), actions.normalize),
    Group("9", "dataset", ("dataset.npz", "dataset.json"), sequences.dataset),
    Group("10a", "prompts", ("prompts.npz", "prompts.json"), sequences.prompts),
    Group("10b", "step", ("step.json",), steps.step),
    Group("11", "gripper", ("gripper.npz",), actions.gripper),
    Group("12", "text", ("text_tokenizer.json",), words.text),
    Group("13", "recipe", ("recipe.npz", "recipe.json"), recipe.recipe),
    Group("14", "keys", ("full_size_keys.json",), keys.full_size),
    Group("15", "fast_fit", ("fast_fit.npz", "fast_fit.json"), actions.fast_fit),
    Group("16", "pdm_v1", ("pdm_golden_v1.json",), functools.partial(driving.pdm, version="v1.1")),
    Group("17", "pdm_v2", ("pdm_golden_v2.json",), functools.partial(driving.pdm, version="v2")),
)


def groups(golden: Golden) -> list[Group]:
    """All groups, those of the vision tokenizers (``vq_<letter>``) as the folder has them."""
    names = sorted(p.stem.removesuffix("_config") for p in golden.folder.glob("vq_*_config.json"))
    names = names or ["vq_a"]
    tokenizers = [
        Group(
            f"1{name.removeprefix('vq_')}",
            name,
            (f"{name}.npz", f"{name}.safetensors", f"{name}_config.json"),
            functools.partial(vision.vq, name=name),
        )
        for name in names
    ]
    return sorted([*tokenizers, *_FIXED], key=lambda g: (int(_digits(g.number)), g.number))


def _digits(number: str) -> str:
    return "".join(c for c in number if c.isdigit())


def select(golden: Golden, wanted: str) -> list[Group]:
    """Groups by name or number, comma-separated; all that are found where ``wanted`` is empty.

    Raises:
      ValueError: an unknown group.
    """
    known = groups(golden)
    if not wanted:
        return [group for group in known if group.found(golden)]
    chosen = []
    for word in wanted.split(","):
        match = [g for g in known if word in (g.name, g.number, _digits(g.number))]
        if not match:
            raise ValueError(f"--group={word}: known are {', '.join(g.name for g in known)}")
        chosen += match
    return chosen


@functools.lru_cache(maxsize=64)
def result_of(folder: pathlib.Path, name: str) -> Result:
    """The result of one group, computed once per process; for tests."""
    golden = Golden.beside(folder)
    (group,) = (g for g in groups(golden) if g.name == name)
    return run_group(group, golden)


def assert_parity(folder: pathlib.Path, name: str, *quantities: str) -> None:
    """Fails, naming the worst check, unless the group (or these quantities of it) agrees."""
    result = result_of(folder, name)
    assert not result.problem, f"{name} cannot run: {result.problem}"
    unknown = set(quantities) - result.quantities().keys()
    assert not unknown, f"{name} has {list(result.quantities())}, not {sorted(unknown)}"
    for quantity in quantities or result.quantities():
        worst = result.worst(quantity)
        assert worst.passed, f"{name}: {quantity} of {worst.case}: {_error(worst)}"


def lines(result: Result) -> Iterator[str]:
    """The printed table of one group: itself, then each quantity."""
    head = f"{result.number:>3} {result.group}"
    if result.problem:
        yield f"{head:<38} cannot run: {result.problem}"
        return
    yield _row(head, f"{result.cases} cases", result.worst(), result.status)
    for quantity, count in result.quantities().items():
        worst = result.worst(quantity)
        status = "" if worst.passed else f"FAIL at {worst.case}"
        yield _row(f"      {quantity}", f"{count}", worst, status)
        notes = [c.note for c in result.checks if c.quantity == quantity and c.note]
        if notes:
            yield f"        ({'; '.join(notes[:4])})"


def _row(name: str, count: str, worst: Check, status: str) -> str:
    return f"{name:<38}{count:>12}  {_error(worst):<34}{status}".rstrip()


def _error(check: Check) -> str:
    if check.unit == "differing":
        return f"{check.error:g} differ (exact)"
    return f"{check.error:.1e} (<= {check.tolerance:.0e} {check.unit})"


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The same as plain values."""
    return [
        {
            "group": r.group,
            "number": r.number,
            "status": r.status,
            "problem": r.problem,
            "cases": r.cases,
            "quantities": {q: _quantity(r, q, count) for q, count in r.quantities().items()},
        }
        for r in results
    ]


def _quantity(result: Result, quantity: str, count: int) -> dict[str, Any]:
    worst = result.worst(quantity)
    return {
        "checks": count,
        "largest_error": worst.error if math.isfinite(worst.error) else None,
        "tolerance": worst.tolerance,
        "unit": worst.unit,
        "case": worst.case,
        "passed": worst.passed,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    folder = pathlib.Path
    parser.add_argument("--golden", type=folder, required=True, help="folder of golden files")
    parser.add_argument("--group", default="", help="names or numbers, comma-separated")
    parser.add_argument("--json", type=folder, help="also writes the results here")
    parser.add_argument(
        "--text_vocabulary", type=folder, help="default: beside DIR or the checkout"
    )
    parser.add_argument(
        "--fast_tokenizers", type=folder, help="default: beside DIR or the checkout"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the groups and prints them; see the module."""
    flags = parse(arguments)
    golden = Golden.beside(flags.golden, flags.text_vocabulary, flags.fast_tokenizers)
    try:
        chosen = select(golden, flags.group)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not chosen:
        print(f"{golden.folder}: no golden group there", file=sys.stderr)
        return 1
    results, start = [], time.monotonic()
    for group in chosen:
        results.append(run_group(group, golden))
        print("\n".join(lines(results[-1])), flush=True)
    passed = sum(r.status == "pass" for r in results)
    absent = [g.name for g in groups(golden) if not g.found(golden)]
    print(
        f"{passed} of {len(results)} groups pass ({time.monotonic() - start:.0f} s)"
        + (f"; not in the folder: {', '.join(absent)}" if absent else "")
    )
    if flags.json:
        flags.json.write_text(json.dumps(as_json(results), indent=1) + "\n", encoding="utf-8")
    return 0 if passed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
