"""Scores a policy checkpoint in a simulator, beside what the score is worth.

    python -m univla_jax.evaluate --config=configs/quickstart.py:evaluate \\
        --checkpoint=WORKDIR --out=FOLDER
    python -m univla_jax.evaluate --benchmark=libero --suite=libero_goal --checkpoint=WORKDIR \\
        --episodes_per_task=50 --workers=4 --out=FOLDER
    python -m univla_jax.evaluate --benchmark=libero --suite=libero_goal --policy=ws://host:8000 \\
        --out=FOLDER
    python -m univla_jax.evaluate --benchmark=libero --suite=libero_goal --policy=expert \\
        --config=configs/official.py:libero_video --config.action=FAST --out=FOLDER
    python -m univla_jax.evaluate --offline=TOKEN_STORE --checkpoint=WORKDIR --out=FOLDER
    python -m univla_jax.evaluate --compare FOLDER_A FOLDER_B [--out=FOLDER]

The first scores on the embedded tabletop; ``FOLDER`` gets ``report.json``, ``episodes.jsonl`` (a
line per episode, written at once), ``calls.jsonl`` and ``rollouts.gif``. Killed at any moment and
started again, the command goes on with the missing episodes; finished, it says so.

Real benchmarks (``--benchmark=libero``, ``calvin`` or ``simpler``; ``--assets`` is the folder of
LIBERO's assets or of CALVIN's data set) leave
``report.json``, ``report.html``, ``episodes.jsonl``, ``videos/`` and more, see
``evaluation/runner.py``. ``--policy=zero`` and ``--policy=random`` are baselines.
``--policy=expert`` has LIBERO's scripts act, by default in all tasks of the suite that have one;
with ``--config`` (a recipe of ``configs/official.py``) their actions take the way of a policy's:
normalized by the recipe's statistics, written as ids of its action tokenizer, and back.

``--offline`` takes held-out episodes of a token store instead of a simulator: action error and
token accuracy of a policy, token accuracy, PSNR and SSIM of a world model's frames, in
``offline.json``.
"""

from __future__ import annotations

from typing import Any

from absl import flags, logging

from univla_jax import cli
from univla_jax.cli import format_table
from univla_jax.config import build_config
from univla_jax.errors import UserError
from univla_jax.evaluation import offline, scoring, study
from univla_jax.evaluation.actors import ActionRoundTrip
from univla_jax.evaluation.runner import RunnerConfig
from univla_jax.evaluation.study import EvaluateConfig
from univla_jax.interop.hf_assets import ConvertConfig, statistics_of
from univla_jax.simulators import calvin_simulator, simpler_simulator
from univla_jax.simulators.base import Benchmark
from univla_jax.simulators.libero import libero_benchmark
from univla_jax.tokenizers.action import load_action_tokenizer

CONFIG = cli.config_flag(required=False)
CHECKPOINT = cli.string_flag(
    "checkpoint", "policy checkpoint, or the workdir of its training", required=False
)
OUT = cli.string_flag("out", "folder for the results", required=False)
BENCHMARK = flags.DEFINE_enum(
    "benchmark", None, ["libero", "calvin", "simpler"], "a real benchmark"
)
POLICY = cli.string_flag(
    "policy", "instead of --checkpoint: ws://host:port, zero, random or expert", required=False
)
CORPUS = cli.string_flag("corpus", "corpus whose cameras and statistics apply", required=False)
SUITE = cli.string_flag("suite", "suite of LIBERO", default="libero_goal")
TASKS = flags.DEFINE_list("tasks", [], "numbers of tasks in the suite; all by default")
EPISODES = flags.DEFINE_integer(
    "episodes_per_task", None, "initial states of each task (CALVIN: chains); all by default"
)
MAX_STEPS = flags.DEFINE_integer("max_steps", 0, "of an episode of LIBERO; 0 as published")
EXECUTE = flags.DEFINE_integer("execute", 0, "actions executed of each chunk; 0 for all")
OFFLINE = cli.string_flag("offline", "token store of held-out episodes", required=False)
HELD_OUT = flags.DEFINE_integer("episodes", 0, "episodes of --offline; 0 for all")
ASSETS = cli.string_flag("assets", "the simulator's assets or data set", required=False)
WORKERS = flags.DEFINE_integer("workers", 1, "simulators at once")
HANG_SECONDS = flags.DEFINE_float("hang_seconds", 600.0, "a simulator silent for so long restarts")
VIDEOS = flags.DEFINE_integer("videos", 1, "episodes of each task that are with_video")
COMPARE = flags.DEFINE_bool("compare", False, "compare two folders of results: --compare A B")
_EXPERT_CHUNK = 10  # actions that a script plans at once


def table(report: dict[str, Any]) -> str:
    """The report in a few lines: success with its 95 % interval, per family, doubtful chunks."""
    conditions = report["conditions"]
    families = list(next(iter(conditions.values()))["families"])
    heads = ["condition", "success", "95 %", *families, "num_overridden", "invalid", "s/call"]
    rows = [heads]
    for name, summary in conditions.items():
        success = summary["success"]
        rows.append(
            [
                name,
                _percent(success["rate"]),
                f"{_percent(success['low'])} - {_percent(success['high'])}",
                *(_percent(summary["families"][f]["rate"]) for f in families),
                f"{summary['overridden_chunks']}/{summary['chunks']}",
                f"{summary['invalid_chunks']}/{summary['chunks']}",
                f"{summary['latency'].get('p50_seconds', 0):.3f}",
            ]
        )
    return format_table(rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def benchmark_table(report: dict[str, Any]) -> str:
    """The report of a real benchmark in a few lines."""
    rows = [["task", "success", "95 %", "episodes"]]
    for task in [*report["tasks"], {"task": "all", **report["success"]}]:
        interval = f"{_percent(task['low'])} - {_percent(task['high'])}"
        rows.append([task["task"], _percent(task["rate"]), interval, str(task["episodes"])])
    return format_table(rows)


def comparison_table(found: dict[str, Any]) -> str:
    """Two reports beside each other, and what differs between their protocols."""
    rows = [["task", "A", "B"]] + [[n, _percent(a), _percent(b)] for n, a, b in found["tasks"]]
    interval = f"{_percent(found['low'])} - {_percent(found['high'])}"
    lines = [
        format_table(rows),
        f"B - A: {_percent(found['difference'])} points (95 %: {interval})",
    ]
    return "\n".join(lines + [f"{k}: {a!r} | {b!r}" for k, (a, b) in found["differs"].items()])


def _benchmark() -> Benchmark:
    number = {} if EPISODES.value is None else {"episodes_per_task": EPISODES.value}
    execute = {"execute": EXECUTE.value}
    if BENCHMARK.value == "libero":
        limit = {"max_steps": MAX_STEPS.value} if MAX_STEPS.value else {}
        rules = libero_benchmark.protocol(SUITE.value, **number, **execute, **limit)
        scripted = _EXPERT_CHUNK if POLICY.value == "expert" else 0
        return libero_benchmark.benchmark(
            rules, tasks=_tasks(), assets=ASSETS.value, scripted=scripted
        )
    if POLICY.value == "expert":
        raise UserError(f"--policy=expert: {BENCHMARK.value} has no scripts, only libero has")
    if BENCHMARK.value == "calvin":
        chains = {"sequences": EPISODES.value} if number else {}
        return calvin_simulator.benchmark(
            calvin_simulator.CalvinProtocol(**chains, **execute), dataset=ASSETS.value
        )
    return simpler_simulator.benchmark(simpler_simulator.SimplerProtocol(**number, **execute))


def _tasks() -> tuple[int, ...]:
    try:
        return tuple(int(task) for task in TASKS.value)
    except ValueError as error:
        raise UserError(f"--tasks: {','.join(TASKS.value)!r}, expected numbers") from error


def _run_benchmark() -> None:
    policy = POLICY.value or CHECKPOINT.value
    _require(policy, "--checkpoint=... or --policy=...")
    effort = RunnerConfig(WORKERS.value, HANG_SECONDS.value, VIDEOS.value)
    options = {"corpus": CORPUS.value, "path": _action_path()}
    report = scoring.score(_benchmark(), policy, OUT.value, effort, **options)
    print(benchmark_table(report))
    print(" ".join(f"{key} {value}" for key, value in sorted(report["throughput"].items())))
    print(f"{OUT.value}/{scoring.REPORT}\n{OUT.value}/{scoring.PAGE}")


def _action_path() -> ActionRoundTrip | None:
    """What the expert's actions go through, where a config says it."""
    if POLICY.value != "expert" or CONFIG.value is None:
        return None
    config = build_config(ConvertConfig, CONFIG.value.to_dict())
    statistics = statistics_of(config).get(config.corpus)
    if statistics is None or not config.action or config.chunk_size != _EXPERT_CHUNK:
        raise UserError(
            "--policy=expert: the config has to name the action tokenizer (--config.action=FAST), "
            f"statistics and chunks of {_EXPERT_CHUNK}, as configs/official.py:libero_video does"
        )
    return ActionRoundTrip(statistics, load_action_tokenizer(config.action))


def _run_offline() -> None:
    _require(CHECKPOINT.value, "--checkpoint=..., a policy or a world model")
    episodes = HELD_OUT.value
    report = offline.evaluate(CHECKPOINT.value, OFFLINE.value, OUT.value, episodes=episodes)
    print(f"{report['layout']} on {report['episodes']} episodes of {report['store']}")
    print(offline.table(report))
    print(f"{OUT.value}/{offline.REPORT}")


def _run_tabletop() -> None:
    _require(CONFIG.value, "--config=FILE.py[:NAME], or --benchmark=...")
    _require(CHECKPOINT.value, "--checkpoint=..., the policy checkpoint")
    config = build_config(EvaluateConfig, CONFIG.value.to_dict())
    was_finished = study.finished(OUT.value)
    report = study.evaluate(config, CHECKPOINT.value, OUT.value)
    if was_finished:
        print(f"{OUT.value} holds this evaluation already")
    episodes = report["protocol"]["episodes_per_condition"]
    print(f"{config.benchmark}, {episodes} episodes each, % success of the true task")
    print(table(report))
    print(f"{OUT.value}/{study.REPORT}\n{OUT.value}/{study.VIDEO_FILE}")


def _require(value: object, what: str) -> None:
    if value is None:
        raise UserError(f"missing; give {what}")


def main(argv: list[str]) -> None:
    """Runs the command."""
    logging.set_verbosity(logging.WARNING)
    if COMPARE.value:
        if len(argv) != 3:
            raise UserError("--compare takes two folders of results: --compare A B")
        print(comparison_table(scoring.compare(*argv[1:], out=OUT.value)))
        if OUT.value:
            print(f"{OUT.value}/{scoring.COMPARISON}")
        return
    _require(OUT.value, "--out=..., the folder for the results")
    if OFFLINE.value:
        _run_offline()
    elif BENCHMARK.value:
        _run_benchmark()
    else:
        _run_tabletop()


if __name__ == "__main__":
    cli.run(main, arguments=2)
