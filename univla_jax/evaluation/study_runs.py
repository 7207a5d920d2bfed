"""A study: the same policy after different post-training and settings, seeds and paired episodes.

::

    out/
      study_config.json   fixed when the study is begun
      stores/             shares of the demonstrations, one per share and seed
      post/               post-training runs; arms of the same one share it
      policies/           a policy per arm, share, length and seed
      evaluations/        its closed loop, on the same held-out episodes
      study.json          the table with every pair, written after each policy
      study.png           the figure

Every arm is compared with the first one on the same episodes and seeds. Intervals are of the
bootstrap over seeds and episodes; the p value is that of McNemar's test over all pairs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from univla_jax import io
from univla_jax.cli import format_table
from univla_jax.config import build_config
from univla_jax.data.token_store import TokenStore, TokenStoreWriter
from univla_jax.errors import UserError
from univla_jax.evaluation import closed_loop, paired
from univla_jax.evaluation.closed_loop import EvaluateConfig
from univla_jax.run_dir import bind_config
from univla_jax.training.train_config import TrainConfig
from univla_jax.training.train_loop import train

REPORT, FIGURE = "study.json", "study.png"
_IDENTITY = "study_config.json"
_DRAWS = 4000


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of making a policy.

    Attributes:
      name: in table and figure.
      post_trained: whether its policy starts from a post-training run.
      post: fields of ``StudyConfig.post_training`` that differ, nested as they are there.
      policy: fields of ``StudyConfig.policy`` that differ.
    """

    name: str
    post_trained: bool = True
    post: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    policy: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """What is compared.

    Attributes:
      post_training: on all demonstrations; stores and tokenizers are set by the command.
      policy: likewise, on a share of them.
      evaluate: the closed loop; of its conditions the first counts.
      arms: what is compared; the first one is what the others are compared with.
      seeds: of parameters, data and the choice of demonstrations; every arm is run with each.
      demonstrations: shares of the demonstrations that policies are trained on.
      steps: shares of ``policy.total_steps``.
    """

    post_training: TrainConfig
    policy: TrainConfig
    evaluate: EvaluateConfig
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    demonstrations: tuple[float, ...] = (1.0,)
    steps: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        """Raises UserError for a study that cannot be run."""
        names = [arm.name for arm in self.arms]
        if len(names) < 2 or len(set(names)) < len(names) or not all(names):
            raise UserError("config.arms: name at least two arms, each once")
        for arm in self.arms:
            if not set(arm.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_"):
                raise UserError(f"config.arms: {arm.name!r}, expected letters, digits and _ alone")
            if arm.post and not arm.post_trained:
                raise UserError(f"config.arms: {arm.name!r} has post, but is not post_trained")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("config.seeds: name at least one, each once")
        for name in ("demonstrations", "steps"):
            shares = getattr(self, name)
            if not shares or not all(0 < share <= 1 for share in shares):
                raise UserError(f"config.{name}: {shares}, expected shares above 0, at most 1")
        for run in self.runs():  # whatever an arm changes is built before anything is trained
            self.policy_config(run)
            if run.arm.post_trained:
                self.post_config(run)

    def runs(self) -> list[Run]:
        """All policies, seed after seed, so that what is finished early is of every arm."""
        grid = itertools.product(self.seeds, self.demonstrations, self.steps, self.arms)
        return [Run(arm, share, length, seed) for seed, share, length, arm in grid]

    def post_config(self, run: Run) -> TrainConfig:
        """The post-training of a policy, without stores and tokenizers."""
        where = f"config.arms.{run.arm.name}.post"
        return _changed(self.post_training, run.arm.post, run.seed, where)

    def policy_config(self, run: Run) -> TrainConfig:
        """The training of a policy, without stores, tokenizers and ``init_from``."""
        where = f"config.arms.{run.arm.name}.policy"
        config = _changed(self.policy, run.arm.policy, run.seed, where)
        steps = max(1, round(config.total_steps * run.steps))
        return dataclasses.replace(config, total_steps=steps)


@dataclasses.dataclass(frozen=True)
class Run:
    """One policy of a study: its arm, share of demonstrations, share of steps and seed."""

    arm: Arm
    demonstrations: float
    steps: float
    seed: int

    @property
    def cell(self) -> tuple[float, float]:
        """What arms are compared at."""
        return self.demonstrations, self.steps

    @property
    def title(self) -> str:
        """Name of its folders."""
        share, steps = 100 * self.demonstrations, 100 * self.steps
        return f"{self.arm.name}_{share:g}_{steps:g}_{self.seed}"


def run_study(
    config: StudyConfig,
    workdir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains and evaluates what is missing; what is finished is not done again.

    Args:
      config: what to compare.
      workdir: folder with ``tokens/train``, ``tokens/val`` and ``tokenizers``, as the quickstart
        leaves them.
      out: folder of the study.
      progress: whether to draw progress bars on standard error.

    Returns:
      the report.

    Raises:
      UserError: ``out`` holds another study, or ``workdir`` lacks something.
    """
    source, out = io.absolute_path(workdir), io.absolute_path(out)
    stores = {split: source / "tokens" / split for split in ("train", "val")}
    demonstrations = TokenStore(stores["train"])
    extra = {"demonstrations": demonstrations.fingerprint}
    bind_config(out, config, name=_IDENTITY, extra=extra)
    done: list[Run] = []
    # All arms of one seed before the next seed: a study that is stopped early, or still goes on,
    # compares all of them on fewer seeds instead of some of them on all. Post-training runs of
    # equal config are one run, whichever arms and shares start from it.
    for run in config.runs():
        start = ""
        if run.arm.post_trained:
            post = _on(config.post_config(run), source, stores["train"], stores["val"])
            start = str(out / "post" / f"{_digest(config.post_config(run))}_{run.seed}")
            train(post, start, progress=progress)
        store = stores["train"]
        if run.demonstrations < 1:
            store = out / "stores" / f"{100 * run.demonstrations:g}_{run.seed}"
            write_share(demonstrations, run.demonstrations, run.seed, store)
        policy = _on(config.policy_config(run), source, store, stores["val"])
        policy = dataclasses.replace(policy, init_from=start)
        train(policy, out / "policies" / run.title, progress=progress)
        closed_loop.evaluate(
            config.evaluate,
            out / "policies" / run.title,
            out / "evaluations" / run.title,
            progress=progress,
        )
        done.append(run)
        report = summarize(config, out, done)
        io.write_json(out / REPORT, report)
        draw(report, out / FIGURE)
    return report


def write_share(source: TokenStore, share: float, seed: int, out: epath.Path) -> None:
    """Writes some episodes of a store, drawn by the seed, as a store of their own.

    A larger share of the same seed holds those of a smaller one.

    Raises:
      UserError: no episode would be left.
    """
    count = round(share * len(source))
    if not count:
        raise UserError(f"config.demonstrations: {share} of {len(source)} episodes is none")
    # The beginning of one permutation, so that shares are nested: a curve over shares then shows
    # what more demonstrations add, not what other ones do.
    drawn = np.random.default_rng([seed, 5]).permutation(len(source))[:count]
    header = dataclasses.replace(
        source.manifest.header,
        source=f"{source.manifest.header.source}, {count} episodes by seed {seed}",
        source_fingerprint=source.fingerprint,
        source_episodes=count,
    )
    TokenStoreWriter(out, header).write(lambda index: source[int(drawn[index])])


def _changed(base: TrainConfig, changes: Mapping[str, Any], seed: int, where: str) -> TrainConfig:
    """The config with some fields changed, and the seeds of parameters and data."""
    values = _merged(dataclasses.asdict(base), changes)
    config = build_config(TrainConfig, values, where=where)
    data = dataclasses.replace(config.data, seed=config.data.seed + seed)
    return dataclasses.replace(config, seed=config.seed + seed, data=data)


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in changes.items():
        inner = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if inner else value
    return merged


def _on(
    config: TrainConfig, source: epath.Path, store: epath.Path, held_out: epath.Path
) -> TrainConfig:
    """The config with its stores and the tokenizers of the workdir."""
    folders = {kind: str(source / "tokenizers" / kind) for kind in ("text", "vision", "action")}
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, stores=(str(store),)),
        evaluation=dataclasses.replace(config.evaluation, stores=(str(held_out),)),
        tokenizers=dataclasses.replace(config.tokenizers, **folders),
    )


def _digest(config: TrainConfig) -> str:
    """Eight hexadecimal digits of a config, to name a folder that equal ones share."""
    text = json.dumps(io.json_values(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# ----------------------------------------------------------------------------
# Table and figure. Axes here: S seeds, E episodes.


def summarize(config: StudyConfig, out: epath.Path, done: Sequence[Run]) -> dict[str, Any]:
    """One row per arm and cell that has been evaluated with at least one seed."""
    condition = (config.evaluate.conditions or ("policy",))[0]
    found: dict[tuple[str, tuple[float, float]], dict[int, np.ndarray]] = {}
    for run in done:
        records = closed_loop.read_episodes(out / "evaluations" / run.title, condition)
        ordered = sorted(records, key=lambda r: (r["number"], r["trial"]))
        own = found.setdefault((run.arm.name, run.cell), {})
        own[run.seed] = np.array([bool(record["success"]) for record in ordered])
    rows = []
    for (name, cell), by_seed in found.items():
        outcomes = np.stack(list(by_seed.values()))
        row = {"arm": name, "demonstrations": cell[0], "steps": cell[1]}
        row |= {"seeds": len(outcomes), "episodes": outcomes.shape[1]}
        row["success"] = _interval(outcomes.astype(float))
        row["success_by_seed"] = [round(float(rate), 4) for rate in outcomes.mean(1)]
        base = found.get((config.arms[0].name, cell), {})
        shared = [seed for seed in by_seed if seed in base]
        if name != config.arms[0].name and shared:
            first = np.stack([base[seed] for seed in shared])
            second = np.stack([by_seed[seed] for seed in shared])
            row["difference"] = _interval(second.astype(float) - first)
            row["p_value"] = paired.mcnemar(
                int((first & ~second).sum()), int((second & ~first).sum())
            )
        rows.append(row)
    return {"compared_with": config.arms[0].name, "condition": condition, "rows": rows}


def _interval(values: np.ndarray) -> dict[str, float]:
    """Mean of [S, E] and its 95 % interval by the bootstrap over seeds and episodes."""
    # Seeds are drawn first and, for all of them, the same episodes: runs of a seed share their
    # parameters, and all runs met the same episodes. Of one seed it says nothing of others.
    rng, (seeds, episodes) = np.random.default_rng(0), values.shape
    which = rng.integers(seeds, size=(_DRAWS, seeds))
    chosen = rng.integers(episodes, size=(_DRAWS, episodes))
    means = [values[s][:, e].mean() for s, e in zip(which, chosen)]
    low, high = np.quantile(means, (0.025, 0.975))
    ends = {"mean": values.mean(), "low": low, "high": high}
    return {name: round(float(value), 4) for name, value in ends.items()}


def table(report: Mapping[str, Any]) -> str:
    """The report for a terminal or a Markdown page."""
    head = ["arm", "demonstrations %", "steps %", "success %", "95 %"]
    rows = [[*head, "minus " + report["compared_with"], "95 %", "p", "seeds x episodes"]]
    for row in report["rows"]:
        difference = row.get("difference")
        rows.append(
            [
                row["arm"].replace("_", " "),
                f"{100 * row['demonstrations']:g}",
                f"{100 * row['steps']:g}",
                *_cells(row["success"], ""),
                *(_cells(difference, "+") if difference else ("", "")),
                f"{row['p_value']:.4g}" if difference else "",
                f"{row['seeds']} x {row['episodes']}",
            ]
        )
    return format_table(rows)


def _cells(found: Mapping[str, float], sign: str) -> tuple[str, str]:
    low, mean, high = (100 * found[name] for name in ("low", "mean", "high"))
    return f"{mean:{sign}.1f}", f"{low:{sign}.1f} – {high:{sign}.1f}"


def draw(report: Mapping[str, Any], path: epath.Path) -> None:
    """Success of every arm with its interval, one group of bars per cell."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = list(dict.fromkeys((r["demonstrations"], r["steps"]) for r in report["rows"]))
    arms = list(dict.fromkeys(row["arm"] for row in report["rows"]))
    figure = Figure(figsize=(2.2 + 1.1 * len(arms) * len(cells), 4.2), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(arms)
    for number, arm in enumerate(arms):
        own = [row for row in report["rows"] if row["arm"] == arm]
        places = [cells.index((r["demonstrations"], r["steps"])) for r in own]
        means = np.array([100 * r["success"]["mean"] for r in own])
        ends = np.array([[100 * r["success"][end] for r in own] for end in ("low", "high")])
        spread = np.abs(ends - means)
        at = np.array(places) + (number - (len(arms) - 1) / 2) * width
        label = arm.replace("_", " ")
        axes.bar(at, means, width * 0.9, yerr=spread, capsize=4, label=label)
    axes.set_xticks(range(len(cells)), list(_cell_titles(cells)))
    axes.set_ylim(0, 100)
    axes.set_ylabel("success in closed loop, %")
    axes.legend(loc="upper left", fontsize="small")
    with io.new_file(path) as file:
        FigureCanvasAgg(figure).print_png(os.fspath(file))


def _cell_titles(cells: Sequence[tuple[float, float]]) -> Iterator[str]:
    for demonstrations, steps in cells:
        length = "" if steps == 1 else f"\n{100 * steps:g} % of the steps"
        yield f"{100 * demonstrations:g} % of the demonstrations{length}"
