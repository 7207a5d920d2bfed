"""What other words and other actions lead to on the tabletop, as imagined, judged by its simulator.

In held-out scenes the model imagines from the first frame alone: under the true instruction and
under that of the same kind of task for another object; and after given actions, those of an expert
that does the task, of one that does the other object's, and of an expert that errs. The simulator
executes the same actions, so that every imagined frame has a true one. Three questions:

* Does the imagined gripper come nearest to the object that the words name?
* Is it, after given chunks, within half a block of where the actions put it? A floor: the same
  frames, judged by another scene's actions. A ceiling: the true frames through the tokenizer.
* How much nearer to the true frame is an imagined one where the actions are given? Beside it the
  frame imagined from the instruction alone, at the first step that both forms imagine.

Axes: E scenes, N frames or chunks, T steps of a chunk, A action dimensions, H/W pixels.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from typing import Any

import numpy as np
import tqdm
from etils import epath

from univla_jax import io
from univla_jax.checkpoints import checkpoint_identity, find_checkpoint
from univla_jax.cli import format_table
from univla_jax.episode import Observation
from univla_jax.errors import UserError
from univla_jax.evaluation import tabletop_judge
from univla_jax.evaluation.frame_scores import psnr, squared_error
from univla_jax.evaluation.report import mean_value, proportion
from univla_jax.evaluation.videos import Strip, enlarge, write_strips
from univla_jax.inference.imagination import WorldModel
from univla_jax.inference.loaded_model import MakePlacement
from univla_jax.inference.sampling import GREEDY, Sampling
from univla_jax.run_dir import bind_config
from univla_jax.simulators.tabletop.tabletop_benchmark import scene_seed, trial_of
from univla_jax.simulators.tabletop.tabletop_env import BLOCK_HALF, FAMILIES, Scene, TabletopEnv
from univla_jax.simulators.tabletop.tabletop_expert import (
    EVALUATION_SEEDS,
    actions_along,
    attempt,
    waypoints,
)

REPORT, STRIPS = "counterfactuals.json", "counterfactuals.png"
DRIVES = ("expert", "other_object", "erring_expert")
_IDENTITY = "counterfactuals_config.json"
_VIEW = "image"


@dataclasses.dataclass(frozen=True)
class CounterfactualConfig:
    """Which scenes are imagined.

    Attributes:
      counterfactuals: how many scenes.
      first_seed: index of the first seed in the range kept for evaluation.
      world: of the tabletop, "cells" or "free".
      frames: imagined from an instruction.
      chunks: of given actions.
      batch: scenes imagined together.
      shown: scenes in the picture.
      picture_size: least height of a drawn frame, in pixels.
    """

    counterfactuals: int = 200
    first_seed: int = 0
    world: str = "cells"
    frames: int = 3
    chunks: int = 2
    batch: int = 50
    shown: int = 4
    picture_size: int = 128

    def __post_init__(self) -> None:
        """Raises UserError for a value outside its range."""
        for name in ("frames", "chunks", "batch", "shown", "picture_size"):
            if getattr(self, name) < 1:
                raise UserError(f"config.{name}: {getattr(self, name)}, expected at least 1")
        if self.counterfactuals < 2:
            raise UserError(
                f"config.counterfactuals: {self.counterfactuals}, expected at least 2 scenes, so "
                "that one can be judged by another's actions"
            )
        last = self.first_seed + self.counterfactuals
        if self.first_seed < 0 or last > len(EVALUATION_SEEDS):
            raise UserError(
                f"config.first_seed: {self.first_seed}, expected between 0 and "
                f"{len(EVALUATION_SEEDS) - self.counterfactuals}"
            )


@dataclasses.dataclass(frozen=True)
class Drive:
    """Given actions in a scene, and what they truly do.

    Attributes:
      actions: float32 [N * T, A].
      frames: uint8 [N * T, H, W, 3] of the fixed camera, after each step.
      gripper: float64 [N * T, 2], where the gripper then is.
    """

    actions: np.ndarray
    frames: np.ndarray
    gripper: np.ndarray


@dataclasses.dataclass(frozen=True)
class ScenePlan:
    """A held-out scene before anything moved, and what is done in it.

    Attributes:
      scene: as it lies.
      observation: with the true instruction.
      other_instruction: the same kind of task for another object.
      drives: by the names in ``DRIVES``.
    """

    scene: Scene
    observation: Observation
    other_instruction: str
    drives: dict[str, Drive]


def plan_scene(number: int, config: CounterfactualConfig, steps: int) -> ScenePlan:
    """Draws a scene and executes every drive for so many steps."""
    trial = trial_of(number)
    seed = scene_seed(trial, first_seed=EVALUATION_SEEDS[config.first_seed])

    def begin() -> TabletopEnv:
        env = TabletopEnv(lazy=True, world=config.world)
        env.reset(seed=seed, options={"family": FAMILIES[trial.task]})
        return env

    env = begin()
    task, rng = env.task, np.random.default_rng([seed, 4])
    others = task.others(env.scene)
    other, drives = others[int(rng.integers(len(others)))], {}
    for name in DRIVES:
        acted = begin()
        if name == "erring_expert":
            chosen = attempt(task, acted.scene, rng)
        else:
            aim = task if name == "expert" else other
            chosen = actions_along(waypoints(aim, acted.scene), acted.scene)
        actions, frames, gripper = [], [], []
        # Every drive begins in the scene as it lies, in an environment of its own: what one of them
        # moved must not be there for the next.
        for action in itertools.islice(chosen, steps):
            acted.step(action)
            actions.append(action)
            frames.append(acted.render(acted.image_size))
            gripper.append(acted.scene.gripper.position.copy())
        drives[name] = Drive(np.stack(actions), np.stack(frames), np.stack(gripper))
    seen = env.observe()
    views = {view: seen[view] for view in (_VIEW, "wrist_image")}
    observation = Observation(task.instruction, views, seen["state"])
    return ScenePlan(env.scene, observation, other.instruction, drives)


def imagine_counterfactuals(
    config: CounterfactualConfig,
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    sampling: Sampling = GREEDY,
    place: MakePlacement | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Imagines, judges and draws.

    Args:
      config: which scenes.
      checkpoint: that imagines from instructions and from actions: its folder, or the workdir
        whose newest one is taken.
      out: folder for picture and report.
      sampling: of the visual tokens.
      place: makes the placement of a model that is split over devices.
      progress: whether to draw a progress bar on standard error.

    Returns:
      the report, also where it was finished already.

    Raises:
      UserError: ``out`` holds other results, or the checkpoint does not imagine both ways.
    """
    folder = find_checkpoint(checkpoint)
    extra = {"checkpoint": checkpoint_identity(folder), **dataclasses.asdict(sampling)}
    bind_config(out, config, name=_IDENTITY, extra=extra)
    out = io.absolute_path(out)
    if (out / REPORT).exists():
        return io.read_json(out / REPORT)
    model = WorldModel.load(folder, corpus="tabletop", view=_VIEW, place=place)
    size = model.chunk_size
    common = math.lcm(size, model.frame_spacing)  # steps after which both forms imagine a frame
    steps = max(config.chunks * size, common)
    numbers = tqdm.trange(config.counterfactuals, unit="scene", disable=not progress)
    plans = [plan_scene(number, config, steps) for number in numbers]
    frames = max(config.frames, common // model.frame_spacing)
    parts = [
        _imagine_batch(model, plans[start : start + config.batch], config, frames, sampling)
        for start in tqdm.trange(0, len(plans), config.batch, unit="batch", disable=not progress)
    ]
    imagined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    report = {
        "checkpoint": str(folder),
        "config": io.json_values(config),
        "sampling": dataclasses.asdict(sampling),
        "scenes": len(plans),
        "right_object": _right_objects(plans, imagined, config.frames),
        "gripper_within_half_a_block": _followed(model, plans, imagined, size),
        "psnr": _given_and_not(model, plans, imagined, common),
        "psnr_after_steps": common,
    }
    _draw(model, plans, imagined, config, out)
    io.write_json(out / REPORT, report)
    return report


def _imagine_batch(
    model: WorldModel,
    plans: list[ScenePlan],
    config: CounterfactualConfig,
    frames: int,
    sampling: Sampling,
) -> dict[str, np.ndarray]:
    """Frames uint8 [E, N, H, W, 3] by ``instructed``, ``instructed_other`` and the drives."""
    # A batch that is not full repeats its first scene, so that nothing is compiled twice.
    filled = [*plans, *[plans[0]] * (config.batch - len(plans))]
    context = model.encode(
        np.stack([model.resize(p.observation.frames[_VIEW][None]) for p in filled])
    )
    words = {
        "instructed": [p.observation.instruction for p in filled],
        "instructed_other": [p.other_instruction for p in filled],
    }
    imagined = {
        name: model.decode(model.imagine(texts, context, frames, sampling=sampling))
        for name, texts in words.items()
    }
    size, observations = model.chunk_size, [p.observation for p in filled]
    for name in DRIVES:
        actions = np.stack([p.drives[name].actions for p in filled])
        count = actions.shape[1] // size
        chunks = actions[:, : count * size].reshape(len(filled), count, size, -1)
        imagined[name] = model.roll_out(observations, chunks, sampling=sampling).frames[_VIEW]
    return {name: found[: len(plans)] for name, found in imagined.items()}


def _right_objects(
    plans: list[ScenePlan], imagined: dict[str, np.ndarray], frames: int
) -> dict[str, Any]:
    """Whether the gripper comes nearest to the named object, by true and by other instructions."""
    scenes = [plan.scene for plan in plans]
    told = {
        "instructed": [plan.observation.instruction for plan in plans],
        "instructed_other": [plan.other_instruction for plan in plans],
    }
    return {
        name: proportion(tabletop_judge.right_objects(imagined[name][:, :frames], scenes, words))
        for name, words in told.items()
    }


def _followed(
    model: WorldModel, plans: list[ScenePlan], imagined: dict[str, np.ndarray], size: int
) -> list[dict[str, Any]]:
    """After each chunk, shares of scenes in which the imagined gripper is where it should be."""
    count = imagined[DRIVES[0]].shape[1]
    found: list[dict[str, Any]] = [{"steps": (chunk + 1) * size} for chunk in range(count)]
    for name in DRIVES:
        drives = [plan.drives[name] for plan in plans]
        real = np.stack([model.resize(drive.frames[size - 1 :: size][:count]) for drive in drives])
        # The gripper is looked for in the true frames too, after the vision tokenizer: what it is
        # not found in there cannot be found in any imagined frame, so that is the ceiling.
        shown = np.concatenate([imagined[name], model.decode(model.encode(real))], axis=1)
        seen = np.stack(
            [
                tabletop_judge.find_grippers(own, plan.scene)
                for own, plan in zip(shown, plans, strict=True)
            ]
        )
        for chunk, shares in enumerate(found):
            true = np.stack([drive.gripper[shares["steps"] - 1] for drive in drives])
            # Another scene's actions of the same kind: what chance and the common way would give.
            others = np.roll(true, len(FAMILIES), axis=0)
            shares[name] = proportion(_near(seen[:, chunk], true))
            shares[f"{name}_floor"] = proportion(_near(seen[:, chunk], others))
            shares[f"{name}_ceiling"] = proportion(_near(seen[:, count + chunk], true))
    return found


def _near(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Within half a block's side, bool [E]."""
    return np.linalg.norm(found - true, axis=1) <= BLOCK_HALF


def _given_and_not(
    model: WorldModel, plans: list[ScenePlan], imagined: dict[str, np.ndarray], steps: int
) -> dict[str, Any]:
    """PSNR of the frame after so many steps: actions given, not given, and their difference."""
    without = imagined["instructed"][:, steps // model.frame_spacing - 1]
    found = {}
    for name in DRIVES:
        real = model.resize(np.stack([plan.drives[name].frames[steps - 1] for plan in plans]))
        given = imagined[name][:, steps // model.chunk_size - 1]
        errors = {"given": squared_error(given, real), "not_given": squared_error(without, real)}
        # At most 99 dB, as in other reports: equal frames have no finite one.
        gain = np.subtract(*(np.minimum(psnr(error), 99.0) for error in errors.values()))
        found[name] = {
            key: round(min(float(psnr(error.mean())), 99.0), 2) for key, error in errors.items()
        }
        found[name]["gain_of_scenes"] = mean_value(gain)
    return found


def table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    rows = [["gripper nearest to the named object", "%", "95 %"]]
    for name, label in (("instructed", "as told"), ("instructed_other", "told another object's")):
        rows.append([label, *_share(report["right_object"][name])])
    for shares in report["gripper_within_half_a_block"]:
        rows.append([f"gripper where {shares['steps']} given actions put it", "%", "95 %"])
        names = (name for drive in DRIVES for name in (drive, f"{drive}_floor", f"{drive}_ceiling"))
        rows += [[name.replace("_", " "), *_share(shares[name])] for name in names]
    lines = [f"{report['scenes']} scenes", format_table(rows)]
    rows = [
        [f"PSNR after {report['psnr_after_steps']} steps", "given", "not given", "gain", "95 %"]
    ]
    for name, found in report["psnr"].items():
        gain = found["gain_of_scenes"]
        cells = [f"{found['given']:.2f}", f"{found['not_given']:.2f}", f"{gain['mean']:+.2f}"]
        rows.append([name.replace("_", " "), *cells, f"{gain['low']:+.2f} – {gain['high']:+.2f}"])
    return "\n".join([*lines, format_table(rows)])


def _share(found: dict[str, Any]) -> list[str]:
    ends = f"{100 * found['low']:.1f} – {100 * found['high']:.1f}"
    return [f"{100 * found['rate']:.1f}", ends]


def _draw(
    model: WorldModel,
    plans: list[ScenePlan],
    imagined: dict[str, np.ndarray],
    config: CounterfactualConfig,
    out: epath.Path,
) -> None:
    """True frames above imagined ones, after the expert's chunks and after the other object's."""
    size, strips = model.chunk_size, []
    for i, plan in enumerate(plans[: config.shown]):
        rows = {}
        for name, label in (("expert", "as told"), ("other_object", "other object")):
            real = model.resize(plan.drives[name].frames[size - 1 :: size][: config.chunks])
            factor = -(-config.picture_size // real.shape[1])
            rows[f"{label}, real"] = enlarge(real, factor)
            rows[f"{label}, imagined"] = enlarge(imagined[name][i, : config.chunks], factor)
        strips.append(Strip(plan.observation.instruction, rows))
    write_strips(out / STRIPS, strips, [f"chunk {n + 1}" for n in range(config.chunks)])
