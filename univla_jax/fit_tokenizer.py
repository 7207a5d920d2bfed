"""Fits a tokenizer to a dataset: of text, of actions or of images.

    python -m univla_jax.fit_tokenizer --config=configs/quickstart.py:vision \\
        --source=DATASET_FOLDER --workdir=TOKENIZER_FOLDER

The config's ``kind`` says which. ``--source`` is a dataset, with commas between several of one
corpus, or for text and actions token stores; ``--config.corpus`` then names their corpora. The
folder gets the tokenizer's files, for actions also ``statistics.json``, and last ``fit.json`` with
the config and what came out. Started again, the command says that the fit is finished; an
interrupted image tokenizer continues from its newest checkpoint. Exit status: 0 done, 2 an error of
the user, 83 stopped by SIGTERM with the step saved.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from absl import logging

from univla_jax import cli, run_dir
from univla_jax.config import build_config
from univla_jax.data.tokenizer_fitting import ActionFitConfig, TextFitConfig, fit_action, fit_text
from univla_jax.errors import ExitStatus, UserError
from univla_jax.training.distributed import Preempted
from univla_jax.training.vision_training import FREE, VisionFitConfig, fit_vision

CONFIG = cli.config_flag()
SOURCE = cli.string_flag("source", "dataset folder or token store, with commas between several")
WORKDIR = cli.string_flag("workdir", "folder for the tokenizer")

# A finished text or action fit belongs to all fields of its config. A vision fit is long, so fields
# that only concern its logging, checkpoints or evaluation may change between two starts.
KINDS: Mapping[str, tuple[type, Callable[..., dict[str, Any]], Collection[str]]] = {
    "text": (TextFitConfig, fit_text, ()),
    "action": (ActionFitConfig, fit_action, ()),
    "vision": (VisionFitConfig, fit_vision, FREE),
}
"""Per kind the config, the fit, and the fields that a finished fit does not depend on."""


def fit_tokenizer(values: Mapping[str, Any], source: str, workdir: str) -> dict[str, Any]:
    """Fits the tokenizer of ``values["kind"]`` unless ``workdir`` holds it already.

    Args:
      values: the config as a mapping.
      source: dataset folder.
      workdir: folder of the tokenizer.

    Returns:
      the report of the fit.

    Raises:
      UserError: an unknown kind, or as the fit of that kind.
      Preempted: SIGTERM arrived; the step is saved.
    """
    kind = values.get("kind")
    if kind not in KINDS:
        raise UserError(f"config.kind: {kind!r}; expected one of {', '.join(KINDS)}")
    cls, fit, free = KINDS[kind]
    config = build_config(cls, values)
    report = run_dir.read_fit_report(workdir, config, free=free)
    if report is not None:
        print(f"{workdir}: the {kind} tokenizer is fitted already", file=sys.stderr)
        return report
    return fit(config, source, workdir)


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    del argv
    logging.set_verbosity(logging.WARNING)
    try:
        report = fit_tokenizer(CONFIG.value.to_dict(), SOURCE.value, WORKDIR.value)
    except Preempted as preempted:
        print(preempted, file=sys.stderr)
        return ExitStatus.PREEMPTED
    print(f"{WORKDIR.value}: {json.dumps(report)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
