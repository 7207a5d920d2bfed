"""Compares ways of making a policy: the same recipe after different post-training, paired.

    python -m univla_jax.study --config=configs/study.py:posttraining --workdir=quickstart \\
        --out=study

``--workdir`` is the quickstart's folder, of which token stores and tokenizers are used. The command
trains and evaluates every arm with every seed on the same held-out episodes. Killed at any moment
and started again, it goes on; after each policy it writes ``study.json`` and ``study.png``, and
prints the table of what there is at the end.
"""

from __future__ import annotations

from absl import logging

from univla_jax import cli
from univla_jax.config import build_config
from univla_jax.evaluation import study_runs
from univla_jax.evaluation.study_runs import StudyConfig

CONFIG = cli.config_flag()
WORKDIR = cli.string_flag("workdir", "the quickstart's folder, with tokens and tokenizers")
OUT = cli.string_flag("out", "folder of the study")


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    logging.set_verbosity(logging.WARNING)
    config = build_config(StudyConfig, CONFIG.value.to_dict())
    report = study_runs.run_study(config, WORKDIR.value, OUT.value)
    print(study_runs.table(report))
    print(f"{OUT.value}/{study_runs.FIGURE}\n{OUT.value}/{study_runs.REPORT}")


if __name__ == "__main__":
    cli.run(main)
