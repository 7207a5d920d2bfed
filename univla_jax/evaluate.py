"""Scores a policy checkpoint in a simulator, beside what the score is worth.

    python -m univla_jax.evaluate --config=configs/quickstart.py:evaluate \\
        --checkpoint=WORKDIR --out=FOLDER

``FOLDER`` gets ``report.json``, ``episodes.jsonl`` (a line per episode, written at once),
``calls.jsonl`` and ``rollouts.gif``. Killed at any moment and started again, the command goes on
with the missing episodes; finished, it says so.
"""

from __future__ import annotations

from typing import Any

from absl import logging

from univla_jax import commands
from univla_jax import config as strict
from univla_jax.evaluation import study
from univla_jax.evaluation.study import EvaluateConfig
from univla_jax.evaluation.text_table import columns

CONFIG = commands.config_flag()
CHECKPOINT = commands.string_flag("checkpoint", "policy checkpoint, or the workdir of its training")
OUT = commands.string_flag("out", "folder for the results")


def table(report: dict[str, Any]) -> str:
    """The report in a few lines: success with its 95 % interval, per family, invalid chunks."""
    conditions = report["conditions"]
    families = list(next(iter(conditions.values()))["families"])
    heads = ["condition", "success", "95 %", *families, "invalid", "s/call"]
    rows = [heads]
    for name, summary in conditions.items():
        success = summary["success"]
        rows.append(
            [
                name,
                _percent(success["rate"]),
                f"{_percent(success['low'])} - {_percent(success['high'])}",
                *(_percent(summary["families"][f]["rate"]) for f in families),
                f"{summary['invalid_chunks']}/{summary['chunks']}",
                f"{summary['latency'].get('p50_seconds', 0):.3f}",
            ]
        )
    return columns(rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    logging.set_verbosity(logging.WARNING)
    config = strict.build(EvaluateConfig, CONFIG.value.to_dict())
    was_finished = study.finished(OUT.value)
    report = study.evaluate(config, CHECKPOINT.value, OUT.value)
    if was_finished:
        print(f"{OUT.value} holds this evaluation already")
    episodes = report["protocol"]["episodes_per_condition"]
    print(f"{config.benchmark}, {episodes} episodes each, % success of the true task")
    print(table(report))
    print(f"{OUT.value}/{study.REPORT}\n{OUT.value}/{study.FILM}")


if __name__ == "__main__":
    commands.run(main)
