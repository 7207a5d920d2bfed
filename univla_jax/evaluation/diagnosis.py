"""Diagnosis of a set-up that scores too low: which convention is wrong, and where.

Recorded episodes are what all parts must agree on. The policy is asked about them as in
``offline.py``, once as they are and once under each change of a convention (``conventions.py``): a
change that makes its errors much smaller names what is wrong between data and checkpoint. Their
actions are then executed in the simulator from the states they began in, and its pictures and words
compared with theirs: what disagrees there is wrong in the simulator. A few roll-outs say what the
change is worth. One change is tried at a time: of two faults, the larger one is found first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from univla_jax import io
from univla_jax.checkpoints import checkpoint_identity, find_checkpoint
from univla_jax.cli import format_table
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.readers import open_reader
from univla_jax.data.validation import InvalidEpisode, read_episode
from univla_jax.errors import UserError
from univla_jax.evaluation.diagnosed_setup import PolicyVariants, Setup
from univla_jax.evaluation.recorded_evidence import explain_offline, seen_in_data
from univla_jax.evaluation.simulated_evidence import explain_in_simulator
from univla_jax.inference.loaded_model import LoadedModel, MakePlacement
from univla_jax.inference.policy import Policy
from univla_jax.run_dir import check_config, write_config
from univla_jax.simulators import Benchmark

REPORT = "diagnosis.json"
_IDENTITY = "diagnosis_identity.json"


def evaluate_setup(
    checkpoint: str | os.PathLike[str],
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    benchmark: Benchmark | None = None,
    *,
    corpus: str | None = None,
    split: str = "val",
    episodes: int = 24,
    rollouts: int = 20,
    simulator_python: str = "",
    place: MakePlacement | None = None,
) -> dict[str, Any]:
    """Diagnoses a checkpoint beside a dataset and a benchmark, and writes ``diagnosis.json``.

    Args:
      checkpoint: folder ``checkpoints/<step>``, or the workdir whose newest one is taken.
      source: dataset folder with recorded episodes.
      out: folder of the report.
      benchmark: that scores too low; None looks at data and checkpoint alone.
      corpus: how the dataset is read; the checkpoint's only one by default.
      split: of the dataset.
      episodes: recorded ones, evenly spread over the split.
      rollouts: episodes of each roll-out.
      simulator_python: interpreter of the simulator's processes.
      place: makes the placement of a policy that is split over devices.

    Returns:
      the report, also where it was finished already.

    Raises:
      UserError: ``out`` holds something else, the checkpoint is no policy, or no episode of the
        split is as long as a chunk.
    """
    folder = find_checkpoint(checkpoint)
    identity = {
        "checkpoint": checkpoint_identity(folder),
        "source": os.fspath(source),
        "benchmark": benchmark.protocol if benchmark else None,
        "corpus": corpus,
        "split": split,
        "episodes": episodes,
        "rollouts": rollouts,
    }
    check_config(out, identity, name=_IDENTITY)
    target = io.absolute_path(out)
    if (target / REPORT).exists():
        return io.read_json(target / REPORT)
    policy = Policy(LoadedModel.from_checkpoint(folder, place=place), corpus=corpus)
    reader = open_reader(source, find_dataset_config(policy.corpus), split)
    recorded = []
    for index in np.linspace(0, len(reader) - 1, min(episodes, len(reader))).astype(int):
        options = {"min_frames": policy.chunk_size, "image_sizes": reader.image_sizes}
        episode = read_episode(reader, int(index), **options)
        if not isinstance(episode, InvalidEpisode):
            recorded.append(episode)
    if len(recorded) < 4:
        raise UserError(f"{source}, {split}: fewer than four episodes as long as a chunk")
    write_config(out, identity, name=_IDENTITY)
    variants = PolicyVariants(policy, batch_size=len(recorded))
    setup = Setup(variants, tuple(recorded), benchmark, rollouts, simulator_python)
    report = {"checkpoint": str(folder), "source": str(source), **diagnose(setup, target)}
    io.write_json(target / REPORT, report)
    return report


def diagnose(setup: Setup, out: epath.Path) -> dict[str, Any]:
    """What is wrong with a set-up.

    Args:
      setup: what is diagnosed.
      out: folder for what the simulator's runs leave.

    Returns:
      JSON values: ``findings``, the likeliest first, ``offline`` with the error as it is and under
      every change, and ``simulator`` with replays and roll-outs.
    """
    # From what costs nothing to what costs most: the data by themselves, the policy's error on them
    # under one change after another, and only then the simulator, which is told what was found, so
    # that a fault of the data is not blamed on it.
    findings = seen_in_data(setup)
    offline, fitting = explain_offline(setup, findings)
    report: dict[str, Any] = {"offline": offline, "simulator": {}}
    if setup.benchmark is not None:
        report["simulator"] = explain_in_simulator(setup, fitting, findings, out)
    listed = [
        {
            **{key: value for key, value in vars(finding).items() if key != "change"},
            "sure": round(finding.sure, 3),
            "change": finding.change.what if finding.change else "",
        }
        for finding in findings
    ]
    return {"findings": listed, **report}


def table(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    lines = []
    for number, found in enumerate(report["findings"], 1):
        lines += [
            f"{number}. {found['convention']} ({found['where']}), {100 * found['sure']:.0f} % sure",
            f"   saw: {found['saw']}",
            f"   change: {found['field']}",
        ]
    offline = report["offline"]
    lines.append("" if lines else "no convention was found to be wrong")
    rows = [["recorded episodes", "error (1 = the mean action)"]]
    rows.append(["as they are", f"{offline['error']:.3f}"])
    best = sorted(offline["changes"], key=lambda row: row["error"])[:5]
    rows += [[f"{row['convention']}: {row['what']}", f"{row['error']:.3f}"] for row in best]
    lines.append(format_table(rows))
    for name, found in report["simulator"].get("runs", {}).items():
        rate = f"{found['successes']}/{found['episodes']}"
        lines.append(f"{name.replace('_', ' ')}: {rate} succeed")
    return "\n".join(lines)
