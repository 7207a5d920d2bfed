"""Imagined futures under the true and under a changed steering, with the true renderer as judge.

In held-out scenes of the embedded road a driving world model imagines the frame a second ahead
after three drives from the same moment: the expert's, and that plan steered to either side. All are
driven, by the tracker and the bicycle model, so that the motions are those of a car; the renderer
draws what the camera really sees after each. An imagined frame is right when it is nearer to the
drawn one of its own motions than to that of the other side's. A car that stands cannot be steered,
and in the middle of a crossing there is nothing but asphalt to see on either side: scenes that are
slow, or whose two drawn frames hardly differ, are passed over.

Axes: B scenes, H/W pixels.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from typing import Any

import numpy as np
import tqdm
from etils import epath

from univla_jax import io
from univla_jax.checkpoints import checkpoint_identity, find_checkpoint
from univla_jax.data.ego_motion import COMMANDS, SECOND, motions_between
from univla_jax.errors import UserError
from univla_jax.evaluation.report import proportion
from univla_jax.evaluation.videos import Strip, enlarge, write_strips
from univla_jax.inference.imagination import WorldModel
from univla_jax.inference.loaded_model import MakePlacement
from univla_jax.inference.sampling import GREEDY, Sampling
from univla_jax.run_dir import bind_config
from univla_jax.simulators.navsim.vehicle_model import VX
from univla_jax.simulators.road.road_expert import EVALUATION_SEEDS, changed_motions
from univla_jax.simulators.road.road_render import RoadRenderer
from univla_jax.simulators.road.road_world import HISTORY_STEPS, KINDS, PLAN_EVERY, RoadWorld

REPORT, STRIPS = "steering.json", "steering.png"
SIDES = {"left": 1.0, "right": -1.0}
_IDENTITY = "steering_config.json"
_PAST = 3  # motions before the first frame


@dataclasses.dataclass(frozen=True)
class SteeringConfig:
    """Which scenes are imagined.

    Attributes:
      scenes: how many.
      first_seed: index of the first seed in the range kept for evaluation.
      turn: radians that each motion of the changed plan turns to its side, on top of the expert's;
        the car behind it turns somewhat less.
      min_speed: of the car at the present moment, in m/s; slower scenes are passed over.
      min_difference: mean squared error between the drawn frames of both sides, below which no
        judge could tell one from the other; a vision tokenizer of 28 dB is off by as much.
      batch: scenes imagined together.
      shown: scenes in the picture.
      picture_size: least height of a drawn frame, in pixels.
    """

    scenes: int = 100
    first_seed: int = 0
    turn: float = 0.3
    min_speed: float = 3.0
    min_difference: float = 100.0
    batch: int = 50
    shown: int = 6
    picture_size: int = 96

    def __post_init__(self) -> None:
        """Raises UserError for a value outside its range."""
        for name in ("scenes", "batch", "shown", "picture_size"):
            if getattr(self, name) < 1:
                raise UserError(f"config.{name}: {getattr(self, name)}, expected at least 1")
        if not 0 < self.turn < 1 or self.first_seed < 0:
            raise UserError(
                f"config.turn: {self.turn} and first_seed {self.first_seed}, expected between 0 "
                "and 1, and at least 0"
            )
        # Roads allow 5.5 m/s everywhere: beyond that the search for faster scenes might never end.
        if not 0 <= self.min_speed <= 5 or not 0 <= self.min_difference <= 1000:
            raise UserError(
                f"config.min_speed: {self.min_speed} and min_difference {self.min_difference}, "
                "expected in 0...5 and 0...1000"
            )


@dataclasses.dataclass(frozen=True)
class SteeredScene:
    """One scene, ready to be imagined and judged.

    Attributes:
      command: phrase of the present moment.
      context: uint8 [2, H, W, 3], a second ago and now.
      motions: per side, and ``"true"``, float64 [7, 3]: three before the first frame, two to the
        second, two from there on.
      drawn: per side, and ``"true"``, uint8 [H, W, 3]: what the camera sees a second later.
    """

    command: str
    context: np.ndarray
    motions: dict[str, np.ndarray]
    drawn: dict[str, np.ndarray]


def steered_scene(number: int, config: SteeringConfig) -> SteeredScene | None:
    """Drives a held-out scene three ways from its present moment on; None if passed over."""
    seed = EVALUATION_SEEDS[config.first_seed + number]
    world = RoadWorld(seed, KINDS[number % len(KINDS)])
    renderer, frames = RoadRenderer(world.road), []
    while world.step_number < HISTORY_STEPS:
        if world.step_number == HISTORY_STEPS - SECOND * PLAN_EVERY:
            frames.append(renderer.front(world))
        world.drive(world.expert_plan())
    frames.append(renderer.front(world))
    if world.ego[VX] < config.min_speed:
        return None
    command = COMMANDS[world.command()]
    motions, drawn = {}, {}
    for name, sign in {"true": 0.0, **SIDES}.items():
        future = copy.deepcopy(world)
        for _ in range(SECOND):
            turn = sign * config.turn
            future.drive_motions(changed_motions(future.ego, future.expert_plan(), turn))
        poses = np.array(future.states)[::PLAN_EVERY, :3]
        motions[name] = motions_between(poses)[-2 * SECOND - _PAST :]
        drawn[name] = renderer.front(future)
    if _error(drawn["left"], drawn["right"]) < config.min_difference:
        return None
    return SteeredScene(command, np.stack(frames), motions, drawn)


def steered_scenes(
    config: SteeringConfig, *, progress: bool = True
) -> tuple[list[SteeredScene], int]:
    """The first ``config.scenes`` held-out scenes that can be judged, and how many were not."""
    scenes: list[SteeredScene] = []
    number = 0
    with tqdm.tqdm(total=config.scenes, unit="scene", desc="drive", disable=not progress) as bar:
        while len(scenes) < config.scenes:
            scene = steered_scene(number, config)
            number += 1
            if scene is not None:
                scenes.append(scene)
                bar.update()
    return scenes, number - len(scenes)


def imagine_steering(
    config: SteeringConfig,
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
      checkpoint: of a driving world model: its folder, or the workdir whose newest one is taken.
      out: folder for picture and report.
      sampling: of the visual tokens.
      place: makes the placement of a model that is split over devices.
      progress: whether to draw a progress bar on standard error.

    Returns:
      the report: ``right``, a proportion of all imagined frames that differ in the direction of
      the change, of each side too, and mean squared errors. Also where it was finished already.

    Raises:
      UserError: ``out`` holds other results, or the checkpoint is no driving world model.
    """
    folder = find_checkpoint(checkpoint)
    extra = {"checkpoint": checkpoint_identity(folder), **dataclasses.asdict(sampling)}
    bind_config(out, config, name=_IDENTITY, extra=extra)
    out = io.absolute_path(out)
    if (out / REPORT).exists():
        return io.read_json(out / REPORT)
    model = WorldModel.load(folder, corpus="road", place=place)
    if not hasattr(model.loaded.task, "PAST"):
        raise UserError(f"{folder}: its frames do not follow from motions; take a driving one")
    scenes, passed_over = steered_scenes(config, progress=progress)
    imagined = {name: _imagine(model, scenes, name, config, sampling) for name in scenes[0].motions}
    report = _judge(scenes, imagined)
    report |= {
        "passed_over": passed_over,
        "checkpoint": str(folder),
        "config": io.json_values(config),
    }
    _draw(scenes, imagined, config, out)
    io.write_json(out / REPORT, report)
    return report


def _imagine(
    model: WorldModel,
    scenes: list[SteeredScene],
    name: str,
    config: SteeringConfig,
    sampling: Sampling,
) -> np.ndarray:
    """Imagined frames uint8 [B, H, W, 3] after the motions ``name``."""
    frames = []
    for start in range(0, len(scenes), config.batch):
        part = scenes[start : start + config.batch]
        context = np.stack([model.resize(scene.context) for scene in part])
        motions = np.stack([scene.motions[name] for scene in part])
        commands = [scene.command for scene in part]
        codes = model.imagine(
            commands, model.encode(context), 1, sampling=sampling, motions=motions
        )
        frames.append(model.decode(codes)[:, 0])
    return np.concatenate(frames)


def _judge(scenes: list[SteeredScene], imagined: dict[str, np.ndarray]) -> dict[str, Any]:
    outcomes: dict[str, list[bool]] = {}
    other = {"left": "right", "right": "left"}
    for side in SIDES:
        outcomes[side] = [
            _error(frame, scene.drawn[side]) < _error(frame, scene.drawn[other[side]])
            for frame, scene in zip(imagined[side], scenes)
        ]
    errors = {
        name: float(np.mean([_error(f, s.drawn[name]) for f, s in zip(frames, scenes)]))
        for name, frames in imagined.items()
    }
    both = [bool(a and b) for a, b in zip(outcomes["left"], outcomes["right"])]
    return {
        "scenes": len(scenes),
        "right": proportion([*outcomes["left"], *outcomes["right"]]),
        "both_sides_right": proportion(both),
        **{f"{side}_right": proportion(values) for side, values in outcomes.items()},
        "mean_squared_error": {name: round(error, 2) for name, error in errors.items()},
        "of_the_present_frame": round(
            float(np.mean([_error(s.context[-1], s.drawn["true"]) for s in scenes])), 2
        ),
    }


def _error(frame: np.ndarray, other: np.ndarray) -> float:
    return float(((frame.astype(np.float64) - other) ** 2).mean())


def _draw(
    scenes: list[SteeredScene],
    imagined: dict[str, np.ndarray],
    config: SteeringConfig,
    out: epath.Path,
) -> None:
    names, strips = ("left", "true", "right"), []
    for i, scene in enumerate(scenes[: config.shown]):
        now = scene.context[-1]
        rows = {
            "drawn": np.stack([now, *(scene.drawn[name] for name in names)]),
            "imagined": np.stack([now, *(imagined[name][i] for name in names)]),
        }
        factor = max(1, round(config.picture_size / now.shape[0]))
        strips.append(Strip(scene.command, {k: enlarge(v, factor) for k, v in rows.items()}))
    write_strips(out / STRIPS, strips, ("now", "steered left", "as driven", "steered right"))
