"""How fast tokens are chosen: beside transformers' Emu3, beside the memory's speed, and by part.

    python -m univla_jax.benchmarks.decode_speed [--json=FILE] [--noreference]

Hidden size 512, 8 layers, 8 heads (2 of keys), 1,792 in the feed-forward, 184,622 ids, float32,
random weights; a prompt of 1,300 tokens and 50 action tokens, batch 1. The same weights run in
``Emu3ForCausalLM.generate`` (key/value cache, sdpa, a mask on the logits) in turns with ours in one
process; every figure is the best of ``--repeats``. "Bytes" is what a step must read (layers, the
allowed rows of the head, the cache) at the speed at which this machine copies memory.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from absl import flags, logging

from univla_jax import cli
from univla_jax.benchmarks import synthetic as cases
from univla_jax.benchmarks.measure import Spent, best, copy_bandwidth, save, timed
from univla_jax.cli import format_table
from univla_jax.errors import UserError
from univla_jax.inference import int8
from univla_jax.inference.sampler import Sampler

PRESET = cli.string_flag("preset", "decoder", default="small")
PROMPT = flags.DEFINE_integer("prompt", 1300, "prompt tokens")
COUNT = flags.DEFINE_integer("count", 50, "new tokens")
REPEATS = flags.DEFINE_integer("repeats", 3, "how often everything is timed")
REFERENCE = flags.DEFINE_bool("reference", True, "whether transformers runs too")
PARTS = flags.DEFINE_list("parts", ["decode", "reuse", "options"], "what is measured")

_FRAMES, _CODES, _ROWS = 6, 64, 8


def against_reference(
    problem: cases.DecodeProblem, repeats: int, *, reference: bool
) -> dict[str, Any]:
    """Both decoders in turns on one prompt."""
    times: dict[str, list[Spent]] = {}
    ours = theirs = None
    other = None
    if reference:
        from univla_jax.benchmarks.emu3_reference import Emu3Reference

        sampler = problem.sampler
        other = Emu3Reference(sampler.model.config, sampler.params, problem.allowed)
    for turn in range(repeats + 1):  # the first one compiles
        state, read = timed(lambda: cases.prefill(problem))
        generated, chosen = timed(lambda s=state: cases.decode(problem, s))
        ours = np.asarray(generated.tokens)
        spent = {"prefill": read, "decode": chosen, "whole": _sum(read, chosen)}
        if other is not None:
            _, first = timed(lambda: other.generate(problem.prompt, 1))
            theirs, whole = timed(lambda: other.generate(problem.prompt, problem.count))
            spent |= {"reference_first": first, "reference_whole": whole}
        for name, value in spent.items() if turn else ():
            times.setdefault(name, []).append(value)
    return _figures({name: best(t) for name, t in times.items()}, problem, ours, theirs)


def _figures(
    spent: dict[str, Spent],
    problem: cases.DecodeProblem,
    ours: np.ndarray,
    theirs: np.ndarray | None,
) -> dict[str, Any]:
    """Milliseconds, ratios, and the share of equal tokens."""
    config, params = problem.sampler.model.config, problem.sampler.params
    slots = problem.prompt.shape[1] + problem.count
    needed = cases.bytes_per_token(config, len(problem.allowed), slots, params)
    speed = copy_bandwidth()
    token = 1e3 * spent["decode"].wall / problem.count
    figures: dict[str, Any] = {
        "prefill_ms": 1e3 * spent["prefill"].wall,
        "decode_ms_per_token": token,
        "decode_processor_ms_per_token": 1e3 * spent["decode"].processor / problem.count,
        "whole_ms": 1e3 * spent["whole"].wall,
        "bytes_per_token": needed,
        "copy_bytes_per_second": speed,
        "bytes_ms_per_token": 1e3 * needed / speed,
        "decode_over_bytes": token * speed / (1e3 * needed),
    }
    if theirs is None:
        return figures
    steps = problem.count - 1  # its first token comes with the prefill
    their_wall = spent["reference_whole"].wall - spent["reference_first"].wall
    their_work = spent["reference_whole"].processor - spent["reference_first"].processor
    per_token = 1e3 * their_wall / steps
    work = 1e3 * their_work / steps
    return figures | {
        "reference_decode_ms_per_token": per_token,
        "reference_decode_processor_ms_per_token": work,
        "reference_whole_ms": 1e3 * spent["reference_whole"].wall,
        "decode_times_faster": per_token / token,
        "decode_times_less_processor": work / figures["decode_processor_ms_per_token"],
        "whole_times_faster": spent["reference_whole"].wall / spent["whole"].wall,
        "whole_times_less_processor": spent["reference_whole"].processor / spent["whole"].processor,
        "equal_tokens": float(np.mean(ours == theirs)),
    }


def reuse(problem: cases.DecodeProblem, repeats: int) -> dict[str, Any]:
    """Calls of an episode, and a rollout over one cache, beside reading everything anew."""
    found: dict[str, Any] = {}
    answers, later = [], {}
    runs = {kept: [] for kept in ("nothing", "cache", "ahead")}
    for _ in range(repeats):
        for kept, own in runs.items():
            own.append(cases.episode(problem, kept))
    for kept, own in runs.items():
        spent = [best([run[call][0] for run in own]) for call in range(len(own[0]))]
        found[f"call_ms_{kept}"] = [round(1e3 * s.wall, 1) for s in spent]
        later[kept] = [s.wall for s in spent[1:]]  # the first call has nothing to reuse
        answers.append([ids for _, ids in own[0]])
    found["second_call_cache_times_faster"] = later["nothing"][0] / later["cache"][0]
    found["later_calls_ms_nothing"] = 1e3 * float(np.median(later["nothing"]))
    found["later_calls_ms_ahead"] = 1e3 * float(np.median(later["ahead"]))
    found["later_calls_ahead_times_faster"] = (
        found["later_calls_ms_nothing"] / found["later_calls_ms_ahead"]
    )
    found["calls_give_equal_tokens"] = all(
        np.array_equal(ids, first) for run in answers for ids, first in zip(run, answers[0])
    )
    return found | _rollouts(problem, repeats)


def _rollouts(problem: cases.DecodeProblem, repeats: int) -> dict[str, Any]:
    runs: dict[bool, list[tuple[Spent, Spent, np.ndarray]]] = {False: [], True: []}
    for turn in range(repeats + 1):  # the first one compiles
        for anew, kept in runs.items():
            run = cases.rollout(problem, _FRAMES, _CODES, _ROWS, anew=anew)
            kept += [run] if turn else []
    read = {anew: best([r for r, _, _ in kept]) for anew, kept in runs.items()}
    whole = {anew: best([_sum(r, c) for r, c, _ in kept]) for anew, kept in runs.items()}
    return {
        "rollout_rows": _ROWS,
        "rollout_read_ms": 1e3 * read[False].wall,
        "rollout_read_anew_ms": 1e3 * read[True].wall,
        "rollout_ms": 1e3 * whole[False].wall,
        "rollout_anew_ms": 1e3 * whole[True].wall,
        "rollout_times_faster": whole[True].wall / whole[False].wall,
        "rollout_times_less_processor": whole[True].processor / whole[False].processor,
        "rollout_equal_tokens": float(np.mean(runs[True][0][2] == runs[False][0][2])),
    }


def options(problem: cases.DecodeProblem, repeats: int) -> dict[str, Any]:
    """int8 weights and drafts, beside plain float32."""
    eight = Sampler(problem.sampler.model, int8.quantize_params(problem.sampler.params))
    times: dict[str, list[Spent]] = {}
    for turn in range(repeats + 1):
        state = cases.prefill(problem)
        plain, spent = timed(lambda s=state: cases.decode(problem, s))
        tokens = np.asarray(plain.tokens)
        state = cases.prefill(problem, eight)
        quantize_params, spent_int8 = timed(lambda s=state: cases.decode(problem, s, eight))
        state = cases.prefill(problem)
        (drafted, steps), spent_right = timed(
            lambda s=state, t=tokens: cases.decode_drafted(problem, s, t)
        )
        if turn:
            for name, value in (("f", spent), ("q", spent_int8), ("d", spent_right)):
                times.setdefault(name, []).append(value)
    milliseconds = {n: 1e3 * best(t).wall / problem.count for n, t in times.items()}
    return {
        "float32_bytes": int8.num_bytes(problem.sampler.params),
        "int8_bytes": int8.num_bytes(eight.params),
        "float32_ms_per_token": milliseconds["f"],
        "int8_ms_per_token": milliseconds["q"],
        "int8_same_choice": cases.agreement(problem, eight),
        "int8_equal_tokens": float(np.mean(np.asarray(quantize_params.tokens) == tokens)),
        "drafted_ms_per_token": milliseconds["d"],
        "drafted_steps": steps,
        "drafted_equal_tokens": float(np.mean(drafted == tokens)),
    }


def _sum(*parts: Spent) -> Spent:
    return Spent(sum(p.wall for p in parts), sum(p.processor for p in parts))


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    logging.set_verbosity(logging.WARNING)
    problem = cases.make_problem(PROMPT.value, COUNT.value, name=PRESET.value)
    report = {"backend": jax.default_backend(), "jax": jax.__version__}
    parts = {
        "decode": lambda: against_reference(problem, REPEATS.value, reference=REFERENCE.value),
        "reuse": lambda: reuse(problem, REPEATS.value),
        "options": lambda: options(problem, REPEATS.value),
    }
    unknown = sorted(set(PARTS.value) - set(parts))
    if unknown:
        raise UserError(f"--parts: {unknown[0]!r}, expected some of {', '.join(parts)}")
    for part in PARTS.value:
        report[part] = parts[part]()
        rows = [[name, _shown(value)] for name, value in report[part].items()]
        print(format_table([[part, ""], *rows]), flush=True)
    save(report)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
    cli.run(main)
