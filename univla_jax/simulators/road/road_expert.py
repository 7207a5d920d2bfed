"""Demonstrations of the embedded road: PDM-Closed's drives as NAVSIM logs, JPEGs and scene files.

::

    OUT/navsim_logs/{train,val,swerves}/<log>.pkl       as ``data/navsim.py`` reads them
    OUT/sensor_blobs/{train,val,swerves}/<log>/CAM_F0/*.jpg
    OUT/train.yaml                                      the moments of train to learn driving from
    OUT/scenes/<token>.npz                              of the split val, to be scored
    OUT/ego_status_mlp.npz                              the blind baseline, fitted to train
    OUT/demonstrations.json                             the config, written last

A driver who never errs shows nobody how to return to the lane, so the car is pushed off its way
once in most logs of ``train``; ``train.yaml`` lists the moments after that, whose motions are all
the expert's. In ``swerves`` the steering is changed every other second: it shows a world model
what steering does, and is no example of driving. Evaluation draws other seeds, so a scored scene
was never shown in training.

Axes: T frames, N moments.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import multiprocessing
import os
import pathlib
import pickle
from typing import Any

import numpy as np
import tqdm
from PIL import Image

from univla_jax.data.ego_motion import COMMANDS, compose_motions, motions_between
from univla_jax.data.navsim import FUTURE, HISTORY, HORIZON
from univla_jax.errors import UserError
from univla_jax.io import json_values, new_folder, read_json, write_json
from univla_jax.simulators.navsim.ego_status_mlp import fit_ego_status
from univla_jax.simulators.navsim.vehicle_model import AX, AY, HEADING, VX, VY
from univla_jax.simulators.road.road_render import RoadRenderer
from univla_jax.simulators.road.road_world import KINDS, PLAN_EVERY, RoadWorld

DEMONSTRATION_SEEDS = range(0, 1_000_000)
EVALUATION_SEEDS = range(1_000_000, 2_000_000)
BASELINE, RECORD, SCENES = "ego_status_mlp.npz", "demonstrations.json", "scenes"
SWERVES = "swerves"
"""The set of logs whose steering is changed again and again."""
_PUSH_TURN, _PUSH_SPEED, _SWERVE_TURN = 0.12, (0.6, 1.3), 0.4
_FULL_STEERING = 2.0  # meters of a motion from which on the car turns as far as it is told
_START_MICROSECONDS = 1_600_000_000_000_000


@dataclasses.dataclass(frozen=True)
class DemonstrationsConfig:
    """Which demonstrations are written.

    Attributes:
      train_episodes: logs of the split ``train``.
      val_episodes: logs of the split ``val``, whose seeds come after those of ``train``.
      pushed: fraction of the logs of ``train`` in which the car is pushed off its way once.
      swerving_episodes: logs of the set ``swerves``, whose seeds come last; may be 0.
      frames: frames of a log at 2 Hz, at least the 14 of a scene.
      first_seed: index of the first seed in the range kept for demonstrations.
      quality: of the JPEGs.
      benchmark: whose experts, for ``univla_jax.demonstrate``.
    """

    train_episodes: int
    val_episodes: int
    pushed: float = 0.0
    swerving_episodes: int = 0
    frames: int = 24
    first_seed: int = 0
    quality: int = 95
    benchmark: str = "road"

    def __post_init__(self) -> None:
        """Raises UserError for a number out of range."""
        if min(self.train_episodes, self.val_episodes) < 1 or self.first_seed < 0:
            raise UserError(
                f"config: train_episodes {self.train_episodes} and val_episodes "
                f"{self.val_episodes} must be at least 1, first_seed {self.first_seed} at least 0"
            )
        if self.frames < HISTORY + 1 + FUTURE:
            raise UserError(f"config.frames: {self.frames}; a scene needs {HISTORY + 1 + FUTURE}")
        if not 0 <= self.pushed <= 1 or self.swerving_episodes < 0:
            raise UserError(
                f"config: pushed {self.pushed} must be in 0...1, swerving_episodes "
                f"{self.swerving_episodes} at least 0"
            )
        if self.seeds()[SWERVES].stop > len(DEMONSTRATION_SEEDS):
            raise UserError("config: more seeds than are kept for demonstrations")

    def seeds(self) -> dict[str, range]:
        """The seeds of each set."""
        counts = (self.train_episodes, self.val_episodes, self.swerving_episodes)
        ends = [self.first_seed, *(self.first_seed + np.cumsum(counts)).tolist()]
        names = ("train", "val", SWERVES)
        return {name: range(*ends[i : i + 2]) for i, name in enumerate(names)}


def write_demonstrations(
    config: DemonstrationsConfig, out: str | os.PathLike[str], *, assets: str | None = None
) -> pathlib.Path:
    """Writes the logs unless they are there.

    Args:
      config: which demonstrations.
      out: the dataset folder.
      assets: not needed here.

    Returns:
      the dataset folder.

    Raises:
      UserError: a folder of other demonstrations, or of something else, lies there.
    """
    del assets
    folder = pathlib.Path(out)
    if folder.exists():
        found = read_json(folder / RECORD) if (folder / RECORD).exists() else None
        if found != json_values(config):
            raise UserError(f"{folder} holds other demonstrations or something else; use another")
        return folder
    with new_folder(folder) as partial:
        partial = pathlib.Path(partial)
        (partial / SCENES).mkdir(parents=True)
        drives = _write_splits(config, partial)
        states = np.concatenate([drive.states for drive in drives])
        motions = np.concatenate([drive.motions for drive in drives])
        fit_ego_status(states, motions).save(partial / BASELINE)
        tokens = [token for drive in drives for token in drive.tokens]
        # JSON is YAML, and NAVSIM's scene filters are YAML.
        write_json(partial / "train.yaml", {"tokens": tokens})
        write_json(partial / RECORD, json_values(config))
    return folder


def _write_splits(config: DemonstrationsConfig, folder: pathlib.Path) -> list[Drive]:
    """Writes all logs on all cores; returns the drives of ``train``."""
    jobs = [
        (str(folder), split, seed, config.frames, config.quality, config.pushed)
        for split, seeds in config.seeds().items()
        for seed in seeds
    ]
    workers = min(len(os.sched_getaffinity(0)), len(jobs) // 16)
    bar = tqdm.tqdm(total=len(jobs), desc="drive", unit="log", disable=len(jobs) < 16)
    with bar:
        if workers < 2:
            found = map(_write_log_of, jobs)
            return [drive for drive in _counted(found, bar) if drive is not None]
        # Spawned, because a fork of a process with JAX's threads may hang.
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            found = pool.map(_write_log_of, jobs, chunksize=4)
            return [drive for drive in _counted(found, bar) if drive is not None]


def _counted(items, bar):
    for item in items:
        bar.update()
        yield item


def _write_log_of(job: tuple) -> Drive | None:
    folder, split, seed, frames, quality, pushed = job
    drive = write_log(pathlib.Path(folder), split, seed, frames, quality=quality, pushed=pushed)
    return drive if split == "train" else None


@dataclasses.dataclass(frozen=True)
class Drive:
    """What a log has to teach.

    Attributes:
      tokens: of the N moments whose motions are the expert's.
      states: float64 [N, 27].
      motions: float64 [N, 8, 3].
    """

    tokens: list[str]
    states: np.ndarray
    motions: np.ndarray


def write_log(
    folder: pathlib.Path,
    split: str,
    seed: int,
    count: int,
    *,
    quality: int = 95,
    pushed: float = 0.0,
) -> Drive:
    """Drives one seed with the expert and writes its log, images and, for val, scene files.

    Args:
      folder: of the dataset.
      split: ``"train"``, ``"val"`` or ``"swerves"``.
      seed: of the world; kinds take turns.
      count: frames at 2 Hz.
      quality: of the JPEGs.
      pushed: probability that the car of a ``train`` log is pushed off its way once.
    """
    rng = np.random.default_rng([seed, 11])
    changes: dict[int, tuple[float, float]] = {}
    if split == SWERVES:
        changes = _swerves(rng, count)
    elif split == "train" and rng.random() < pushed:
        changes = _push(rng, count)
    world = RoadWorld(seed, KINDS[seed % len(KINDS)])
    renderer, log = RoadRenderer(world.road), f"road-{seed:07d}"
    images = folder / "sensor_blobs" / split / log / "CAM_F0"
    images.mkdir(parents=True)
    frames: list[dict[str, Any]] = []
    states, plans = [], []
    for number in range(count):
        token = hashlib.sha256(f"{seed}/{number}".encode()).hexdigest()[:16]
        Image.fromarray(renderer.front(world)).save(images / f"{token}.jpg", quality=quality)
        frames.append(_frame(world, log, number, token))
        states.append(world.status())
        plans.append(world.expert_plan())
        if number in changes:
            world.drive_motions(changed_motions(world.ego, plans[-1], *changes[number]))
        else:
            world.drive(plans[-1])
    path = folder / "navsim_logs" / split / f"{log}.pkl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(frames, protocol=4))
    moved = motions_between(np.array(world.states)[::PLAN_EVERY, :3])
    moments = range(HISTORY, count - FUTURE)
    motions = np.stack([moved[i : i + HORIZON] for i in moments])
    if split == "val":
        _write_scenes(folder / SCENES, world, frames, plans, moments, motions)
    clean = [i for i in moments if not any(j in changes for j in range(i, i + HORIZON))]
    return Drive(
        [frames[i]["token"] for i in clean],
        np.array([states[i] for i in clean]).reshape(-1, len(states[0])),
        motions[[i - HISTORY for i in clean]],
    )


def changed_motions(
    ego: np.ndarray, plan: np.ndarray, turn: float, speed: float = 1.0
) -> np.ndarray:
    """A plan steered to one side.

    Args:
      ego: state [11] from which the plan [41 or more, 3] starts.
      plan: poses at 10 Hz in the global frame.
      turn: radians that every motion turns to the left on top of the plan's; less where the car
        hardly moves, which it could not follow.
      speed: factor of the distance.

    Returns:
      motions float64 [8, 3].
    """
    last = PLAN_EVERY * HORIZON + 1
    motions = motions_between(np.concatenate([ego[None, :3], plan[PLAN_EVERY:last:PLAN_EVERY]]))
    motions[:, 0] *= speed
    more = turn * np.clip(motions[:, 0] / _FULL_STEERING, 0.0, 1.0)
    # The chord of the arc that turns so far.
    motions[:, 1] += 0.5 * more * motions[:, 0]
    motions[:, 2] += more
    return motions


def _push(rng: np.random.Generator, count: int) -> dict[int, tuple[float, float]]:
    """Turn and speed at one or two frames in a row, with a moment left behind them."""
    length = int(rng.integers(1, 3))
    first = int(rng.integers(0, count - FUTURE - length))
    change = (float(rng.uniform(-_PUSH_TURN, _PUSH_TURN)), float(rng.uniform(*_PUSH_SPEED)))
    return dict.fromkeys(range(first, first + length), change)


def _swerves(rng: np.random.Generator, count: int) -> dict[int, tuple[float, float]]:
    """A turn of its own for every other second; the expert drives in between."""
    changes: dict[int, tuple[float, float]] = {}
    for first in range(int(rng.integers(0, 4)), count, 4):
        turn = float(rng.uniform(-_SWERVE_TURN, _SWERVE_TURN))
        changes |= dict.fromkeys(range(first, min(first + 2, count)), (turn, 1.0))
    return changes


def _write_scenes(
    folder: pathlib.Path,
    world: RoadWorld,
    frames: list[dict[str, Any]],
    plans: list[np.ndarray],
    moments: range,
    motions: np.ndarray,
) -> None:
    for i, moved in zip(moments, motions):
        previous = frames[i - 1]["token"] if i > moments.start else ""
        scene = world.scene(
            PLAN_EVERY * i,
            frames[i]["token"],
            plans[i][:41],
            human_future=compose_motions(moved),
            previous_token=previous,
        )
        scene.save(folder)


def _frame(world: RoadWorld, log: str, number: int, token: str) -> dict[str, Any]:
    """One dictionary of a log, with OpenScene's keys."""
    ego, things = world.ego, world.objects()
    half = ego[HEADING] / 2
    rotation = np.array([np.cos(half), 0.0, 0.0, np.sin(half)])
    cos, sin = np.cos(ego[HEADING]), np.sin(ego[HEADING])
    into = np.array([[cos, sin], [-sin, cos]])
    to_global = np.eye(4)
    to_global[:2, :2], to_global[:2, 3] = into.T, ego[:2]
    centers = (things.poses[:, :2] - ego[:2]) @ into.T
    count = len(things.ids)
    heights = np.full((count, 1), 1.6)
    boxes = np.concatenate(
        [centers, heights / 2, things.sizes, heights, things.poses[:, 2:] - ego[HEADING]], axis=1
    )
    velocity = np.concatenate([things.velocities @ into.T, np.zeros((count, 1))], axis=1)
    command = np.zeros(len(COMMANDS), int)
    command[world.command()] = 1
    camera = {
        "data_path": f"{log}/CAM_F0/{token}.jpg",
        "sensor2lidar_rotation": np.eye(3),
        "sensor2lidar_translation": np.array([1.6, 0.0, 1.6]),
        "cam_intrinsic": np.array([[76.8, 0, 48.0], [0, 76.8, 17.3], [0, 0, 1.0]]),
        "distortion": np.zeros(5),
    }
    connector = world.road.connector
    return {
        "token": token,
        "frame_idx": number,
        "timestamp": _START_MICROSECONDS + 500_000 * number,
        "log_name": log,
        "log_token": log,
        "scene_name": log,
        "scene_token": log,
        "map_location": "embedded-road",
        "roadblock_ids": list(world.road.roadblocks),
        "vehicle_name": "road",
        "can_bus": np.zeros(18),
        "lidar_path": None,
        "ego2global": to_global,
        "ego2global_translation": np.array([ego[0], ego[1], 0.0]),
        "ego2global_rotation": rotation,
        "ego_dynamic_state": [float(ego[i]) for i in (VX, VY, AX, AY)],
        "driving_command": command,
        "traffic_lights": [(int(connector), bool(world.red_ids()))] if connector else [],
        "cams": {"CAM_F0": camera},
        "sample_prev": None,
        "sample_next": None,
        "anns": {
            "gt_boxes": boxes,
            "gt_names": np.array([kind.lower() for kind in things.types], str),
            "gt_velocity_3d": velocity,
            "instance_tokens": list(things.ids),
            "track_tokens": list(things.ids),
        },
    }
