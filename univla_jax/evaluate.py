"""Scores a policy checkpoint in a benchmark, beside its baselines.

    python -m univla_jax.evaluate --config=configs/quickstart.py:evaluate \\
        --checkpoint=WORKDIR --out=FOLDER
    python -m univla_jax.evaluate --benchmark=libero --suite=libero_goal --checkpoint=WORKDIR \\
        --episodes_per_task=50 --workers=4 --out=FOLDER
    python -m univla_jax.evaluate --benchmark=libero --suite=libero_goal --policy=ws://host:8000 \\
        --conditions=policy,zero --out=FOLDER
    python -m univla_jax.evaluate --benchmark=libero --suite=libero_goal --policy=expert \\
        --config=configs/official.py:libero_video --config.action=FAST --out=FOLDER
    python -m univla_jax.evaluate --benchmark=navsim --assets=DATA --suite=navtest \\
        --checkpoint=WORKDIR --out=FOLDER --export=PREDICTIONS
    python -m univla_jax.evaluate --offline=TOKEN_STORE --checkpoint=WORKDIR --out=FOLDER
    python -m univla_jax.evaluate --grounding=TOKEN_STORE --checkpoint=WORKDIR --out=FOLDER
    python -m univla_jax.evaluate --join PART_A PART_B ... --out=FOLDER
    python -m univla_jax.evaluate --seeds RUN_A RUN_B ... [--plot=FILE.png]
    python -m univla_jax.evaluate --diagnose --checkpoint=WORKDIR --source=DATASET \\
        [--benchmark=tabletop] --out=FOLDER
    python -m univla_jax.evaluate --compare FOLDER_A FOLDER_B [--out=FOLDER]

What is evaluated is an ``EvaluateConfig``, from ``--config``, from the flags, or from both, where
the flags win. ``FOLDER`` gets ``report.json``, ``report.html``, ``episodes.jsonl`` (a line per
episode, written at once), ``videos/`` and more, see ``evaluation/closed_loop.py``. Killed at any
moment and started again, the command goes on with the missing episodes; finished, it says so.
``--mesh.tensor`` and ``--mesh.fsdp`` split the model over
chips. ``--temperature`` with ``--top_k``, ``--top_p`` and ``--seed`` samples actions.

``--plan=8`` samples eight chunks, imagines what each does, judges it and executes the best, with a
checkpoint that was trained on all of that; ``--plan_by=random`` and ``divergence`` are baselines
without imagination. ``--rollouts`` leaves the episodes as a token store with outcomes in
``FOLDER/rollouts``, to learn from.

``--latency=0.5`` lets the simulator go on while each answer is computed, at the control rate of the
policy's corpus: the robot waits (``--execution=wait``), goes on and changes over to the answer when
it comes (``naive``), or commits to what it executes meanwhile (``realtime``, with a policy trained
with ``data.max_committed``).

``--policy=zero``, ``random`` or ``expert`` evaluates that condition alone. LIBERO's scripted
experts act by default in all tasks of the suite that have one; with ``--config`` (a recipe of
``configs/official.py``) their actions take the way of a policy's: normalized by the recipe's
statistics, encoded by its action tokenizer, and back.

``--export`` writes the driving policy's ``<token>.json`` of each scene for NAVSIM's own scorer
(``launch/navsim/prediction_agent.py``); it works without scene files.

``--diagnose`` looks for the convention that is wrong where a checkpoint scores too low: recorded
episodes of ``--source`` (``--split``) are shown to the policy and executed in the benchmark's
simulator, as they are and with one convention after another taken otherwise. What it saw, how sure
it is and which field to change is printed and written to ``diagnosis.json``.

``--join`` makes one report of parts that ran different ``--tasks`` of the same benchmark, for
example on several machines; ``--seeds`` sums up runs that differ by their checkpoint alone.
``--plot`` draws success with its intervals into a PNG, also of ``--compare``.

``--judge`` takes roll-outs with outcomes (``--rollouts``) and scores the checkpoint's values by
them, in ``judge.json``: area under the curve for success, and calibration error.

``--imagined`` lets policies (``--checkpoint``, and any number of folders behind the flags) act
inside ``--world_model`` instead of a simulator, from the first frames of a token store's episodes,
and orders them by how well the world model says that they did.

``--offline`` takes held-out episodes of a token store instead of a simulator: action error and
token accuracy of a policy, token accuracy, PSNR and SSIM of a world model's frames, in
``offline.json``. ``--grounding`` takes those of a store with groundings: boxes, points and answers
in words, beside what a prior would give, in ``grounding.json``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from absl import flags, logging

from univla_jax import cli
from univla_jax.config import build_config
from univla_jax.errors import UserError
from univla_jax.evaluation import (
    closed_loop,
    combined,
    diagnosis,
    grounded_frames,
    imagined_rollouts,
    offline,
    report,
    value_scores,
)
from univla_jax.evaluation.actors import ActionRoundTrip
from univla_jax.evaluation.closed_loop import EvaluateConfig
from univla_jax.evaluation.latency import EXECUTIONS
from univla_jax.inference.planning import CHOICES
from univla_jax.inference.sampling import sampling_flags
from univla_jax.interop.hf_assets import ConvertConfig, statistics_of
from univla_jax.simulators import BENCHMARKS, EXPERT_CHUNK
from univla_jax.simulators.navsim.navsim_benchmark import export_predictions
from univla_jax.tokenizers.action import load_action_tokenizer
from univla_jax.training.model_setup import mesh_flags

CONFIG = cli.config_flag(required=False)
CHECKPOINT = cli.string_flag(
    "checkpoint", "policy checkpoint, or the workdir of its training", required=False
)
OUT = cli.string_flag("out", "folder for the results", required=False)
POLICY = cli.string_flag(
    "policy", "instead of --checkpoint: ws://host:port, zero, random or expert", required=False
)
API_KEY_FILE = cli.string_flag(
    "api_key_file", "file with the key of --policy=ws://...", required=False
)
EXPORT = cli.string_flag(
    "export", "folder for a prediction per scene of navsim, as its agent reads it", required=False
)
OFFLINE = cli.string_flag("offline", "token store of held-out episodes", required=False)
JUDGE = cli.string_flag("judge", "token store of roll-outs to judge", required=False)
IMAGINED = cli.string_flag(
    "imagined",
    "token store whose first frames policies act on, inside --world_model",
    required=False,
)
WORLD_MODEL = cli.string_flag(
    "world_model", "checkpoint that imagines and judges, for --imagined", required=False
)
GROUNDING = cli.string_flag("grounding", "token store with held-out groundings", required=False)
JOIN = flags.DEFINE_bool("join", False, "join parts of a benchmark: --join A B ...")
SEEDS = flags.DEFINE_bool("seeds", False, "summary of several runs: --seeds A B ...")
PLOT = cli.string_flag("plot", "PNG file that success is drawn into", required=False)
DIAGNOSE = flags.DEFINE_bool("diagnose", False, "look for conventions that are wrong")
SOURCE = cli.string_flag("source", "dataset folder, for --diagnose", required=False)
SPLIT = cli.string_flag("split", "of --source", default="val")
SAMPLING = sampling_flags()
MESH = mesh_flags()
COMPARE = flags.DEFINE_bool("compare", False, "compare two folders of results: --compare A B")

# Field of ``EvaluateConfig`` -> the flag that overrides it.
_FIELDS = {
    "benchmark": flags.DEFINE_enum("benchmark", None, list(BENCHMARKS), "the benchmark"),
    "suite": cli.string_flag(
        "suite", "suite of the benchmark, such as libero_goal", required=False
    ),
    "tasks": flags.DEFINE_list("tasks", None, "indices of tasks (CALVIN: chains); all by default"),
    "episodes": flags.DEFINE_integer(
        "episodes", None, "of each condition on the tabletop, or of --offline; 0 for all"
    ),
    "episodes_per_task": flags.DEFINE_integer(
        "episodes_per_task", None, "initial states of each task (CALVIN: chains); all by default"
    ),
    "max_steps": flags.DEFINE_integer("max_steps", None, "of an episode; as published by default"),
    "execute": flags.DEFINE_integer("execute", None, "actions executed of each chunk; 0 for all"),
    "latency": flags.DEFINE_float(
        "latency", None, "seconds of each answer, in which the simulator goes on moving"
    ),
    "execution": flags.DEFINE_enum(
        "execution", None, EXECUTIONS, "what the robot does while it waits for an answer"
    ),
    "assets": cli.string_flag("assets", "the simulator's assets or data set", required=False),
    "renderer": cli.string_flag("renderer", "of CALVIN: egl or tiny", required=False),
    "conditions": flags.DEFINE_list("conditions", None, "the policy and its baselines"),
    "plan": flags.DEFINE_integer("plan", None, "chunks to choose the best of; 0 does not plan"),
    "plan_by": flags.DEFINE_enum("plan_by", None, CHOICES, "how the best chunk is chosen"),
    "rollouts": flags.DEFINE_bool("rollouts", None, "write the episodes as a token store"),
    "corpus": cli.string_flag(
        "corpus", "corpus whose cameras and statistics apply", required=False
    ),
    "batch": flags.DEFINE_integer("workers", None, "simulators at once, answered in one batch"),
    "hang_seconds": flags.DEFINE_float(
        "hang_seconds", None, "a simulator silent for so long is restarted"
    ),
    "simulator_python": cli.string_flag(
        "simulator_python", "interpreter of the simulator's own environment", required=False
    ),
    "video_episodes": flags.DEFINE_integer(
        "videos", None, "episodes of each task that are recorded"
    ),
}


def _config() -> EvaluateConfig:
    """The config, with the flags that are given in place of its values."""
    # Flags have no defaults, so that one that is given can override a config's value.
    given = {name: flag.value for name, flag in _FIELDS.items() if flag.value is not None}
    if "tasks" in given:
        try:
            given["tasks"] = tuple(int(task) for task in given["tasks"])
        except ValueError as error:
            raise UserError(f"--tasks: {','.join(given['tasks'])!r}, expected numbers") from error
    if POLICY.value in closed_loop.WITHOUT_POLICY:
        given["conditions"] = (POLICY.value,)
    given |= {"conditions": tuple(given["conditions"])} if "conditions" in given else {}
    if CONFIG.value is None and "benchmark" not in given:
        raise UserError("missing; give --config=FILE.py[:NAME], or --benchmark=...")
    if CONFIG.value is None or POLICY.value == "expert":
        return EvaluateConfig(**given)
    return dataclasses.replace(build_config(EvaluateConfig, CONFIG.value.to_dict()), **given)


def _round_trip() -> ActionRoundTrip | None:
    """What the expert's actions go through, where a config of a policy is given."""
    if POLICY.value != "expert" or CONFIG.value is None:
        return None
    recipe = build_config(ConvertConfig, CONFIG.value.to_dict())
    statistics = statistics_of(recipe).get(recipe.corpus)
    if statistics is None or not recipe.action or recipe.chunk_size != EXPERT_CHUNK:
        raise UserError(
            "--policy=expert: the config has to name the action tokenizer (--config.action=FAST), "
            f"statistics and chunks of {EXPERT_CHUNK}, as configs/official.py:libero_video does"
        )
    return ActionRoundTrip(statistics, load_action_tokenizer(recipe.action))


def _evaluate_offline() -> None:
    if CHECKPOINT.value is None:
        raise UserError("missing; give --checkpoint=..., a policy or a world model")
    if not SAMPLING().greedy:
        raise UserError("--offline compares greedy predictions; leave --temperature at 0")
    episodes = _FIELDS["episodes"].value or 0
    found = offline.evaluate(
        CHECKPOINT.value, OFFLINE.value, OUT.value, episodes=episodes, place=MESH()
    )
    print(f"{found['task']} on {found['episodes']} episodes of {found['store']}")
    print(offline.table(found))
    print(f"{OUT.value}/{offline.REPORT}")


def _evaluate_values() -> None:
    if CHECKPOINT.value is None:
        raise UserError("missing; give --checkpoint=..., one that was trained on the task 'value'")
    found = value_scores.score_values(CHECKPOINT.value, JUDGE.value, OUT.value)
    print(f"{found['successes']} successes in {found['episodes']} episodes of {found['store']}")
    for name in ("all_moments", "first_moment"):
        scores = found[name]
        print(
            f"{name.replace('_', ' ')}: area under the curve {scores['area_under_curve']:.3f}, "
            f"calibration error {scores['calibration_error']:.3f}"
        )
    print(f"{OUT.value}/{value_scores.REPORT}")


def _evaluate_imagined(checkpoints: list[str]) -> None:
    if WORLD_MODEL.value is None:
        raise UserError("--imagined: give --world_model=..., one that obeys actions and judges")
    given = [CHECKPOINT.value] if CHECKPOINT.value else []
    episodes = _FIELDS["episodes"].value or 0
    found = imagined_rollouts.rank_policies(
        [*given, *checkpoints], WORLD_MODEL.value, IMAGINED.value, OUT.value, episodes=episodes
    )
    print(f"{found['chunks']} chunks in each of {found['episodes']} episodes of {found['store']}")
    print(imagined_rollouts.table(found))
    print(f"{OUT.value}/{imagined_rollouts.REPORT}")


def _evaluate_grounding() -> None:
    if CHECKPOINT.value is None:
        raise UserError("missing; give --checkpoint=..., trained on the task grounding")
    episodes = _FIELDS["episodes"].value or 0
    found = grounded_frames.evaluate(
        CHECKPOINT.value, GROUNDING.value, OUT.value, episodes=episodes, place=MESH()
    )
    print(f"one frame of each of {found['episodes']} episodes of {found['store']}")
    print(grounded_frames.table(found))
    print(f"{OUT.value}/{grounded_frames.REPORT}")


def _diagnose() -> None:
    if CHECKPOINT.value is None or SOURCE.value is None:
        raise UserError("missing; give --checkpoint=... and --source=..., the recorded episodes")
    config = None
    if CONFIG.value is not None or _FIELDS["benchmark"].value is not None:
        config = _config()
    found = diagnosis.evaluate_setup(
        CHECKPOINT.value,
        SOURCE.value,
        OUT.value,
        config.make_benchmark() if config else None,
        corpus=_FIELDS["corpus"].value,
        split=SPLIT.value,
        simulator_python=_FIELDS["simulator_python"].value or "",
        place=MESH(),
    )
    print(diagnosis.table(found))
    print(f"{OUT.value}/{diagnosis.REPORT}")


def _evaluate_closed_loop() -> None:
    policy = None if POLICY.value in closed_loop.WITHOUT_POLICY else POLICY.value
    was_finished = closed_loop.finished(OUT.value)
    found = closed_loop.evaluate(
        _config(),
        policy or CHECKPOINT.value,
        OUT.value,
        sampling=SAMPLING(),
        round_trip=_round_trip(),
        place=MESH(),
        api_key=cli.read_secret(API_KEY_FILE.value, "api_key_file") if API_KEY_FILE.value else "",
    )
    if was_finished:
        print(f"{OUT.value} holds this evaluation already")
    _print_report(found)
    if EXPORT.value:
        condition = found["protocol"]["conditions"][0]
        count = export_predictions(closed_loop.read_episodes(OUT.value, condition), EXPORT.value)
        print(f"{count} predictions of {condition!r} in {EXPORT.value}")


def _print_report(found: dict[str, Any]) -> None:
    print(found["benchmark"])
    print(report.summary_table(found))
    print(" ".join(f"{key} {value}" for key, value in sorted(found["throughput"].items())))
    print(f"{OUT.value}/{closed_loop.REPORT}\n{OUT.value}/{closed_loop.PAGE}")
    if PLOT.value:
        _plot(*report.series_of(found), found["benchmark"])


def _plot(names: list[str], tasks: list[list[Any]], title: str) -> None:
    if PLOT.value:
        report.save_plot(PLOT.value, names, tasks, title)
        print(PLOT.value)


def main(argv: list[str]) -> None:
    """Runs the command."""
    logging.set_verbosity(logging.WARNING)
    if COMPARE.value:
        if len(argv) != 3:
            raise UserError("--compare takes two folders of results: --compare A B")
        found = closed_loop.compare(*argv[1:], out=OUT.value)
        print(report.comparison_table(found))
        _plot(["A", "B"], found.get("tasks", []), "A and B")
        if OUT.value:
            print(f"{OUT.value}/{closed_loop.COMPARISON}")
        return
    if SEEDS.value:
        found = combined.over_seeds(argv[1:], out=OUT.value)
        print(combined.seeds_table(found))
        _plot(list(found.get("runs", {})), found.get("by_run", []), found.get("benchmark", ""))
        return
    if OUT.value is None:
        raise UserError("missing; give --out=..., the folder for the results")
    if JOIN.value:
        _print_report(combined.join_parts(argv[1:], OUT.value))
        return
    if IMAGINED.value:
        _evaluate_imagined(argv[1:])
        return
    if len(argv) > 1:
        raise UserError(f"{argv[1]!r}: folders are for --compare, --join, --seeds and --imagined")
    if DIAGNOSE.value:
        _diagnose()
    elif JUDGE.value:
        _evaluate_values()
    elif OFFLINE.value:
        _evaluate_offline()
    elif GROUNDING.value:
        _evaluate_grounding()
    else:
        _evaluate_closed_loop()


if __name__ == "__main__":
    cli.run(main, arguments=100)
