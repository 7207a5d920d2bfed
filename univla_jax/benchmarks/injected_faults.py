"""The doctor's diagnoses of set-ups with one injected fault each, and of set-ups without any.

    python -m univla_jax.benchmarks.injected_faults --policy=DIR --source=RLDS --journal=FILE

The policy is one of the embedded tabletop, the source its demonstrations. A fault counts as named
where the first finding is of its convention and at its place, a clean set-up as a false alarm where
there is any finding. Clean set-ups differ in recorded episodes, scenes, task families, steps and
executed actions. Set-ups that are in the journal, of the same checkpoint and source, are taken from
it, so that a run which was ended goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags, logging
from etils import epath

from univla_jax import cli
from univla_jax.benchmarks.harness import print_figures, save
from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.readers import open_reader
from univla_jax.episode import Episode
from univla_jax.evaluation import conventions
from univla_jax.evaluation.conventions import Change, ChangedSimulator
from univla_jax.evaluation.diagnosed_setup import OFFLINE, SIMULATOR, PolicyVariants, Setup
from univla_jax.evaluation.diagnosis import diagnose
from univla_jax.inference.policy import Policy
from univla_jax.io import JsonlWriter
from univla_jax.normalization import MIN_MAX, ActionStatistics, stream_statistics
from univla_jax.simulators import Simulator, StepResult, make_benchmark

POLICY = flags.DEFINE_string("policy", "", "Policy: checkpoint or workdir", allow_override=True)
SOURCE = flags.DEFINE_string("source", "", "RLDS folder of demonstrations", allow_override=True)
SPLIT = flags.DEFINE_string("split", "val", "Split of the source", allow_override=True)
CLEAN = flags.DEFINE_integer("clean", 20, "Set-ups without a fault")
JOURNAL = flags.DEFINE_string("journal", "", "JSON lines of finished set-ups; '' keeps none")
FAULTS = flags.DEFINE_list("faults", None, "Names of faults; all by default, none for none")

_EPISODES = 24


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is wrong, what the doctor should say, and how a set-up gets it."""

    name: str
    convention: str
    where: str
    inject: Callable[[Setup], Setup]


def recorded(change: Callable[[Episode], Episode]) -> Callable[[Setup], Setup]:
    """Changes the recorded episodes."""
    return lambda setup: dataclasses.replace(setup, episodes=tuple(map(change, setup.episodes)))


def of_change(**options: Any) -> Callable[[Episode], Episode]:
    """A fault that is a ``Change`` of recorded episodes."""
    return Change("", "", ("", ""), **options).episode


def simulated(**options: Any) -> Callable[[Setup], Setup]:
    """Changes the simulator."""
    return wrapped(
        functools.partial(ChangedSimulator, changes=(Change("", "", ("", ""), **options),))
    )


def wrapped(wrap: Callable[[Callable[[], Simulator]], Any]) -> Callable[[Setup], Setup]:
    """Puts the simulator into another one."""

    def inject(setup: Setup) -> Setup:
        make = wrap(setup.benchmark.make)
        return dataclasses.replace(setup, benchmark=dataclasses.replace(setup.benchmark, make=make))

    return inject


def of_checkpoint(**settings: int) -> Callable[[Setup], Setup]:
    """Changes a setting of the checkpoint's task."""
    return lambda setup: dataclasses.replace(setup, policies=setup.policies.but_with(**settings))


def twice_as_often(episode: Episode) -> Episode:
    """Recorded at twice the rate: every step halved."""
    actions = np.repeat(episode.actions, 2, 0)
    actions[:, :-1] /= 2
    frames = {view: np.repeat(f, 2, 0) for view, f in episode.frames.items()}
    state = np.repeat(episode.state, 2, 0)
    return dataclasses.replace(
        episode, actions=actions, frames=frames, state=state, control_hz=2 * episode.control_hz
    )


def shouted(words: str) -> str:
    """An instruction as another template writes it."""
    return f"Instruction: {words.upper()}."


def underscored(words: str) -> str:
    """An instruction as the name of a file."""
    return words.replace(" ", "_")


def with_statistics(statistics: ActionStatistics) -> Callable[[Setup], Setup]:
    """Other statistics in the checkpoint."""
    return lambda setup: dataclasses.replace(
        setup, policies=setup.policies.but_with(statistics=statistics)
    )


def min_max(setup: Setup) -> Setup:
    """A few actions far outside, and statistics of least and greatest values."""
    # Least and greatest differ from the quantiles only where a few actions lie far outside, as they
    # do in teleoperated data and never in an expert's: some are put there.
    rng, episodes = np.random.default_rng(0), []
    for number, episode in enumerate(setup.episodes):
        actions = np.array(episode.actions)
        if number % 12 == 0:
            actions[-1, :3] = rng.choice([-1, 1], 3) * 0.2
        episodes.append(dataclasses.replace(episode, actions=actions))
    extremes = stream_statistics(lambda: [e.actions for e in episodes], [MIN_MAX] * 7)
    return with_statistics(extremes)(dataclasses.replace(setup, episodes=tuple(episodes)))


@dataclasses.dataclass(frozen=True)
class _Wrapped:
    """A tokenizer that is another one but for some of its functions."""

    inner: Any
    own: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__["own"]
        return own[name] if name in own else getattr(self.__dict__["inner"], name)


def other_scale(tokenizer: Any) -> Any:
    """An action tokenizer of half the scale."""

    def decode(ids: Sequence[int], horizon: int, action_dim: int) -> Any:
        decoded = tokenizer.decode(ids, horizon, action_dim)
        return dataclasses.replace(decoded, actions=decoded.actions / 2)

    own = {
        "encode": lambda chunk: tokenizer.encode(np.clip(2 * np.asarray(chunk), -1, 1)),
        "encode_batch": lambda chunks: tokenizer.encode_batch(
            np.clip(2 * np.asarray(chunks), -1, 1)
        ),
        "decode": decode,
    }
    return _Wrapped(tokenizer, own)


def other_codes(tokenizer: Any) -> Any:
    """A vision tokenizer whose codes stand in another order."""
    # A permutation keeps the round trip exact, so that only what the policy learned tells the two
    # tokenizers apart.
    order = np.random.default_rng(0).permutation(tokenizer.codebook_size).astype(np.uint16)
    back = np.argsort(order)
    own = {
        "encode_frames": lambda frames: order[tokenizer.encode_frames(frames)],
        "decode_codes": lambda codes: tokenizer.decode_codes(back[codes]),
    }
    return _Wrapped(tokenizer, own)


def other_tokenizer(part: str, wrap: Callable[[Any], Any]) -> Callable[[Setup], Setup]:
    """Exchanges a tokenizer of the checkpoint."""

    def inject(setup: Setup) -> Setup:
        loaded = setup.policies.loaded
        tokenizer = wrap(getattr(loaded.assets, part))
        assets = dataclasses.replace(loaded.assets, **{part: tokenizer})
        policy = Policy(dataclasses.replace(loaded, assets=assets), corpus=setup.policies.corpus)
        policies = PolicyVariants(policy, batch_size=len(setup.episodes))
        return dataclasses.replace(setup, policies=policies)

    return inject


class Settling:
    """A simulator whose robot obeys only after its first steps."""

    def __init__(self, inner: Simulator, steps: int) -> None:
        """Takes the simulator and how long it does not obey."""
        self._inner, self._steps = inner, steps

    def reset(self, trial: Any) -> None:
        """Begins an episode."""
        self._inner.reset(trial)
        self._left = self._steps

    def restore(self, episode: Episode) -> None:
        """Begins where a recorded one does."""
        self._inner.restore(episode)
        self._left = self._steps

    def step(self, action: np.ndarray, *, render: bool = True) -> StepResult:
        """Executes nothing at first."""
        if self._left:
            self._left -= 1
            return StepResult.CONTINUES
        return self._inner.step(action, render=render)

    def __getattr__(self, name: str) -> Any:
        """All else is the simulator's own."""
        return getattr(self._inner, name)


class Repeating(Settling):
    """A simulator that executes every action twice."""

    def step(self, action: np.ndarray, *, render: bool = True) -> StepResult:
        """Executes it, and again where the episode goes on."""
        first = self._inner.step(action, render=render)
        return self._inner.step(action, render=render) if first is StepResult.CONTINUES else first


def settling(make: Callable[[], Simulator], *, kind: type[Settling], steps: int) -> Any:
    """Makes one of the two."""
    return lambda: kind(make(), steps)


LIBERO = ActionStatistics(
    mean=(0.06, 0.08, -0.09, 0.0, 0.006, -0.005, 0.5),
    std=(0.33, 0.38, 0.45, 0.04, 0.06, 0.08, 0.5),
    q01=(-0.745, -0.661, -0.9375, -0.1071, -0.2068, -0.1842, 0.0),
    q99=(0.9375, 0.8759, 0.9321, 0.1039, 0.1768, 0.1461, 1.0),
)


def all_faults() -> tuple[Fault, ...]:
    """The faults, by where they are: data, checkpoint, simulator."""
    negate = functools.partial(conventions.gripper_line, factor=-1.0)
    to_share = functools.partial(conventions.gripper_line, factor=0.5, offset=0.5)
    views = functools.partial(conventions.swapped, first="image", second="wrist_image")
    middle = functools.partial(conventions.zoomed, share=0.8)
    late = functools.partial(conventions.shifted, steps=1)
    in_views, of = functools.partial, conventions.in_views
    data = {
        "gripper negated in the data": ("gripper sign", {"actions": negate}),
        "gripper 0...1 in the data": ("gripper range", {"actions": to_share}),
        "rotation first in the data": (
            "order of dimensions",
            {"actions": conventions.rotation_first},
        ),
        "actions a step late in the data": ("time shift", {"actions": late}),
        "data upside down": (
            "flipped view",
            {"frames": in_views(of, change=conventions.upside_down)},
        ),
        "views swapped in the data": ("swapped views", {"frames": views}),
        "data cropped": ("resize", {"frames": in_views(of, change=middle)}),
        "shouted words in the data": ("prompt", {"words": shouted}),
    }
    simulator = {
        "gripper negated in the simulator": ("gripper sign", {"actions": negate}),
        "simulator turned by 180 degrees": (
            "flipped view",
            {"frames": in_views(of, change=conventions.half_turned)},
        ),
        "views swapped in the simulator": ("swapped views", {"frames": views}),
        "simulator's frames 0...1": ("dtype", {"frames": in_views(of, change=_to_one)}),
        "underscored words in the simulator": ("prompt", {"words": underscored}),
    }
    twice, settles = ({"kind": k, "steps": n} for k, n in ((Repeating, 0), (Settling, 5)))
    return (
        *(Fault(n, c, OFFLINE, recorded(of_change(**o))) for n, (c, o) in data.items()),
        Fault("data at 10 Hz", "control rate", OFFLINE, recorded(twice_as_often)),
        Fault("statistics of LIBERO", "statistics", OFFLINE, with_statistics(LIBERO)),
        Fault("minima and maxima", "normalization", OFFLINE, min_max),
        Fault("no history", "history", OFFLINE, of_checkpoint(frames=1)),
        Fault("chunks of 10", "chunk length", OFFLINE, of_checkpoint(chunk_size=10)),
        Fault("another FAST scale", "tokenizer", OFFLINE, other_tokenizer("action", other_scale)),
        Fault("other visual codes", "tokenizer", OFFLINE, other_tokenizer("vision", other_codes)),
        *(Fault(n, c, SIMULATOR, simulated(**o)) for n, (c, o) in simulator.items()),
        Fault(
            "actions executed twice",
            "control rate",
            SIMULATOR,
            wrapped(functools.partial(settling, **twice)),
        ),
        Fault(
            "robot not settled",
            "wait steps",
            SIMULATOR,
            wrapped(functools.partial(settling, **settles)),
        ),
    )


def _to_one(frames: np.ndarray) -> np.ndarray:
    return (frames / 255).astype(np.uint8)


def clean_setup(policies: PolicyVariants, episodes: Sequence[Episode], number: int) -> Setup:
    """One of many set-ups in which nothing is wrong."""
    rng = np.random.default_rng(number)
    chosen = rng.choice(len(episodes), min(_EPISODES, len(episodes)), replace=False)
    options: dict[str, Any] = {"episodes": 40, "first_seed": 1000 + 50 * number}
    options["max_steps"] = int(rng.choice([30, 40, 60]))
    # Whole chunks, or parts that a history can show: those that make up a chunk.
    size = policies.loaded.record.chunk_size
    parts = [steps for steps in range(1, size) if size % steps == 0]
    options["execute"] = int(rng.choice([0, *parts[-1:]]))
    if number % 3 == 2:
        options["tasks"] = tuple(int(task) for task in rng.choice(5, 2, replace=False))
    benchmark = make_benchmark("tabletop", **options)
    return Setup(policies, tuple(episodes[i] for i in chosen), benchmark)


def main(argv: list[str]) -> None:
    """Runs the command."""
    del argv
    logging.set_verbosity(logging.WARNING)
    policy = Policy.load(POLICY.value)
    reader = open_reader(SOURCE.value, find_dataset_config(policy.corpus), SPLIT.value)
    episodes = [reader[index] for index in range(min(len(reader), 200))]
    policies = PolicyVariants(policy, batch_size=min(_EPISODES, len(episodes)))
    faults = [f for f in all_faults() if FAULTS.value is None or f.name in FAULTS.value]
    setups = [(f, f.inject(clean_setup(policies, episodes, i))) for i, f in enumerate(faults)]
    setups += [(None, clean_setup(policies, episodes, 100 + i)) for i in range(CLEAN.value)]
    run = {"checkpoint": str(policy.loaded.folder), "source": SOURCE.value, "split": SPLIT.value}
    figures: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(JsonlWriter(JOURNAL.value)) if JOURNAL.value else None
        lines = journal.lines if journal else []
        done = {line["set-up"]: line for line in lines if run.items() <= line.items()}
        for number, (fault, setup) in enumerate(setups):
            name = fault.name if fault else f"clean {number - len(faults)}"
            if name not in done:
                done[name] = {**run, "set-up": name, **_diagnosed(setup)}
                if journal:
                    journal.append(done[name])
            said = done[name]["said"]
            right = said == ([fault.convention, fault.where] if fault else ["nothing", ""])
            figures[name] = {"said": said, "sure": done[name]["sure"], "right": right}
            print(f"{name}: {' '.join(said).strip()}; {done[name]['saw']}", flush=True)
    right = {name for name, figure in figures.items() if figure["right"]}
    summary = {
        "faults": len(faults),
        "named": len(right & {fault.name for fault in faults}),
        "clean": CLEAN.value,
        "false alarms": len([n for n in figures if n.startswith("clean ") and n not in right]),
    }
    print_figures("diagnoses", summary)
    save({**summary, "set-ups": figures})


def _diagnosed(setup: Setup) -> dict[str, Any]:
    """What the doctor says first about a set-up."""
    with tempfile.TemporaryDirectory() as folder:
        report = diagnose(setup, epath.Path(folder))
    first = report["findings"][0] if report["findings"] else {}
    return {
        "said": [first.get("convention", "nothing"), first.get("where", "")],
        "sure": first.get("sure"),
        "saw": first.get("saw", ""),
    }


if __name__ == "__main__":
    cli.run(main)
