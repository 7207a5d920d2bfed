"""Gathers what all stages of a workdir have shown into one report and one learning curve.

    python -m univla_jax.summarize --workdir=WORKDIR

Reads ``demonstrations/ tokenizers/ tokens/ world_model/ policy/ evaluation/ imagination/`` and
``stages.jsonl`` below ``WORKDIR``, as ``launch/quickstart.sh`` leaves them; what is absent is left
out. Writes ``report.json`` and ``learning_curve.png``.
"""

from __future__ import annotations

from univla_jax import commands
from univla_jax.evaluation import overview

WORKDIR = commands.string_flag("workdir", "folder of the whole quickstart")


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    report = overview.write(WORKDIR.value)
    print(overview.table(report))
    for path in report["files"].values():
        print(path)


if __name__ == "__main__":
    commands.run(main)
