"""NAVSIM as a benchmark: one planned trajectory per scene, scored as v1.1 and v2 score it.

``assets`` is a dataset folder as ``data/navsim.py`` reads it, with scene files in its ``scenes``
(or the folder of scene files itself, for baselines that need no image). Without scene files the
frames of a token list (``suite=navtest``) are driven: errors to the human trajectory are reported
then, and no PDM score. Scores of NAVSIM move with the version, so each is named with it.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from univla_jax.data.datasets import find_dataset_config
from univla_jax.data.ego_motion import (
    COMMANDS,
    SECOND,
    compose_motions,
    constant_velocity,
    ego_status,
    motions_between,
)
from univla_jax.data.navsim import (
    CAMERA,
    HORIZON,
    NavsimReader,
    log_arrays,
    log_moments,
    read_log,
)
from univla_jax.errors import UserError
from univla_jax.io import write_json
from univla_jax.simulators import (
    Benchmark,
    Breakdown,
    PlannedObservation,
    StepResult,
    Trial,
    package_versions,
)
from univla_jax.simulators.navsim.comfort import two_frame_comfort
from univla_jax.simulators.navsim.ego_status_mlp import EgoStatusMlp
from univla_jax.simulators.navsim.open_loop import (
    collisions,
    displacement_errors,
    in_both_conventions,
    mean_over,
)
from univla_jax.simulators.navsim.pdm_score import SCORE, VERSIONS, aggregate, score_trajectory
from univla_jax.simulators.navsim.scene_file import Scene, load_scene, scene_paths
from univla_jax.simulators.navsim.trajectory_tracking import (
    interpolate_poses,
    simulate,
    to_global,
)
from univla_jax.simulators.navsim.vehicle_model import VX

SCENES, BASELINE = "scenes", "ego_status_mlp.npz"
SCRIPTED = ("constant_velocity", "human", "expert", "ego_only")
PUBLISHED = {
    "UniVLA, front camera: PDMS, v1.1 navtest": 81.7,
    "DriveVLA-W0, query expert: PDMS, v1.1 navtest": 88.4,
    "DriveVLA-W0, flow expert: PDMS, v1.1 navtest": 87.2,
    "DriveVLA-W0, whole backbone: PDMS, v1.1 navtest": 85.6,
    "DriveVLA-W0: EPDMS, v2": 86.1,
    "TransFuser: PDMS, v1.1 navtest": 84.0,
    "ego-status network: PDMS, v1.1 navtest": 65.6,
    "human: PDMS, v1.1 navtest": 94.8,
}
"""Percent; UniVLA and DriveVLA-W0 (arXiv 2506.19850 table 7, arXiv 2510.12796)."""
_STAGE_SPREAD = 0.1  # square meters


def make_benchmark(
    *,
    assets: str = "",
    suite: str = "",
    tasks: Sequence[int] = (),
    episodes: int = 0,
    max_steps: int = 1,
    first_seed: int = 0,
    expert: bool = False,
) -> Benchmark:
    """NAVSIM's scenes.

    Args:
      assets: the dataset folder, or a folder of scene files.
      suite: split of the dataset whose frames are driven, where there are no scene files.
      tasks: scenes by their numbers in the order of their tokens; all by default.
      episodes: scenes, from the first of these; all by default.
      max_steps: anything; an episode is one step, a plan.
      first_seed: scenes left out at the beginning.
      expert: ignored; PDM-Closed's trajectory is part of a scene.

    Raises:
      UserError: no such folder, nothing in it, or a number out of range.
    """
    del expert, max_steps
    if not assets:
        raise UserError("navsim: missing; give --assets=DATA, the folder of logs and scene files")
    data = NavsimScenes(pathlib.Path(assets), suite)
    numbers = tuple(tasks) or range(first_seed, len(data.tokens))
    numbers = numbers[: episodes or None]
    if not numbers or min(numbers) < 0 or max(numbers) >= len(data.tokens):
        raise UserError(f"navsim: {len(data.tokens)} scenes, none left with these numbers")
    make = functools.partial(NavsimSimulator, data, data.tokens)
    return Benchmark(
        name="navsim",
        protocol={
            "benchmark": "navsim",
            "scenes": len(numbers),
            "first": data.tokens[numbers[0]],
            "tasks": list(tasks) or "all",
            "suite": suite,
            "versions": list(VERSIONS),
            "scored": bool(data.scenes),
            "trajectory": "8 poses, 0.5 s apart, composed of motions",
        },
        trials=tuple(Trial(0, number) for number in numbers),
        make=make,
        variants={
            **{name: functools.partial(make, plans=name) for name in SCRIPTED},
            "wrong_command": functools.partial(make, wrong_command=True),
            "black_image": functools.partial(make, black=True),
        },
        scripted=SCRIPTED,
        conditions=("policy", "constant_velocity"),
        in_process=True,
        batch=16,
        whole_chunks=True,
        action_dim=3,
        random_range=((0.0, -0.2, -0.2), (6.2, 0.2, 0.2)),
        video_every=1,
        breakdown=functools.partial(score_breakdown, data=data),
        published=PUBLISHED,
    )


class NavsimScenes:
    """Scene files and logs of a folder, found by token.

    Attributes:
      tokens: of all scenes, in order.
      scenes: token -> scene file; empty where there are none.
    """

    def __init__(self, folder: pathlib.Path, suite: str) -> None:
        """Lists the scenes, or the moments of the split ``suite`` where there are none.

        Raises:
          UserError: neither is there.
        """
        inner = folder / SCENES
        self.folder = folder if (folder / "navsim_logs").is_dir() else folder.parent
        has_logs = (self.folder / "navsim_logs").is_dir()
        if inner.is_dir() or not has_logs or not suite:
            self.scenes = scene_paths(inner if inner.is_dir() else folder)
            self.tokens = tuple(self.scenes)
            return
        self.scenes: Mapping[str, pathlib.Path] = {}
        reader = NavsimReader(self.folder, find_dataset_config("navsim"), suite)
        moments = (
            str(read_log(path)[i]["token"]) for path, numbers in reader.runs for i in numbers
        )
        self.tokens = tuple(sorted(moments))

    def scene(self, token: str) -> Scene | None:
        """The scene of a token; None where only its log is there."""
        return load_scene(self.scenes[token]) if self.scenes else None

    def frame(self, token: str) -> tuple[pathlib.Path, int]:
        """Log and frame number of a token.

        Raises:
          UserError: no log has it.
        """
        if token not in self._frames:
            raise UserError(f"scene {token}: no log in {self.folder} has this token")
        return self._frames[token]

    @functools.cached_property
    def _frames(self) -> dict[str, tuple[pathlib.Path, int]]:
        wanted, found = set(self.tokens), {}
        for path in sorted(self.folder.glob("navsim_logs/*/*.pkl")):
            frames = read_log(path)
            for i in log_moments(frames):
                token = str(frames[i]["token"])
                if token in wanted:
                    found[token] = (path, i)
        return found

    @functools.cached_property
    def baseline(self) -> EgoStatusMlp:
        """The ego-status network of the dataset."""
        return EgoStatusMlp.load(self.folder / BASELINE)


class NavsimSimulator:
    """Shows one scene after another and scores the trajectory planned in each."""

    def __init__(
        self,
        data: NavsimScenes,
        tokens: Sequence[str],
        *,
        plans: str = "",
        wrong_command: bool = False,
        black: bool = False,
    ) -> None:
        """Takes the scenes.

        Args:
          data: of the folder.
          tokens: of the scenes, by the number of the trial.
          plans: one of ``SCRIPTED``: whose trajectory the observation holds.
          wrong_command: tell left for right and the other way round, left for straight on.
          black: show black images.
        """
        self._data, self._tokens, self._plans = data, tokens, plans
        self._wrong, self._black = wrong_command, black

    def reset(self, trial: Trial) -> None:
        """Takes the scene of a trial."""
        self._token = self._tokens[trial.trial]
        self._scene = self._data.scene(self._token)
        self._result: dict[str, Any] = {}
        self._motions = np.zeros((HORIZON, 3))

    def observe(self) -> PlannedObservation:
        """Both frames, command and ego status; the trajectory of a script where one plans."""
        if self._plans and self._scene is not None and self._plans != "ego_only":
            return PlannedObservation("", {}, plan=self._scripted(self._scene.ego_state))
        path, number = self._data.frame(self._token)
        frames = read_log(path)
        poses, dynamics, commands = log_arrays(frames, path)
        command = commands[number]
        if self._wrong:
            command = command[[2, 0, 1, 3]] if command[1] else command[[2, 1, 0, 3]]
        earlier = command if self._wrong else commands[max(number - SECOND, 0)]
        past = motions_between(poses[: number + 1])
        status = ego_status(dynamics[number], command, earlier, past).astype(np.float32)
        self._human = compose_motions(motions_between(poses[number : number + HORIZON + 1]))
        plan = np.zeros((0, 3), np.float32)
        if self._plans:
            plan = self._scripted(status)
            return PlannedObservation("", {}, status, plan=plan)
        views = {
            "image": self._image(path, frames[number]),
            "previous_image": self._image(path, frames[number - SECOND]),
        }
        phrase = COMMANDS[int(np.argmax(command))]
        return PlannedObservation(phrase, views, status, plan=plan)

    def step(self, action: np.ndarray, *, render: bool = True) -> StepResult:
        """Takes the motions [8, 3]; the scene is over."""
        del render
        self._motions = np.asarray(action, np.float64)
        poses = compose_motions(self._motions)
        if self._scene is not None:
            self._result = scored(self._scene, poses)
        human = self._human_poses()
        if human is not None:
            self._result["open_loop"] = self._open_loop(poses, human)
        return StepResult.ENDED

    def result(self) -> dict[str, Any]:
        """Token, motions, sub-scores and errors; success is no collision and no step off road."""
        scores = self._result.get("scores", {})
        clean = scores.get("NC v1.1", 1.0) == 1.0 and scores.get("DAC v1.1", 1.0) == 1.0
        return {
            "task": "navsim",
            "token": self._token,
            "success": bool(clean),
            "steps": 1,
            "motions": np.round(self._motions, 6).tolist(),
            **self._result,
        }

    def video_frame(self) -> np.ndarray:
        """The front camera's image, black where there is none, uint8 [H, W, 3]."""
        if not (self._data.folder / "navsim_logs").is_dir():
            return np.zeros((36, 64, 3), np.uint8)
        path, number = self._data.frame(self._token)
        image = Image.fromarray(self._image(path, read_log(path)[number]))
        image.thumbnail((480, 270))
        return np.asarray(image)

    def versions(self) -> dict[str, str]:
        """Of the packages that move the score."""
        return package_versions(("numpy", "scipy", "shapely"))

    def _scripted(self, status: np.ndarray) -> np.ndarray:
        """Motions float32 [8, 3] of a script."""
        if self._plans == "ego_only":
            return self._data.baseline(status[None])[0]
        if self._plans == "constant_velocity":
            speed = status[VX] if self._scene is not None else status[0]
            return constant_velocity(np.array([speed]), HORIZON)
        if self._scene is None:
            raise UserError(f"condition {self._plans!r} needs scene files")
        ego = self._scene.ego_state
        if self._plans == "human":
            if not len(self._scene.human_future):
                raise UserError(f"scene {self._token} has no human trajectory")
            poses = np.concatenate([np.zeros((1, 3)), self._scene.human_future])
        else:
            poses = np.concatenate([ego[None, :3], self._scene.reference[5::5]])
        return motions_between(poses).astype(np.float32)

    def _open_loop(self, poses: np.ndarray, human: np.ndarray) -> dict[str, float]:
        """Errors to the human, and collisions with the tracks of a scene, by name."""
        errors = displacement_errors(poses, human)
        found = {"ADE in meters": float(errors.mean()), "FDE in meters": float(errors[-1])}
        found |= in_both_conventions(errors, "L2")
        if self._scene is not None:
            ego, boxes = self._scene.ego_state, self._scene.tracks.boxes[5:41:5]
            moved, cos, sin = boxes - ego[:2], np.cos(ego[2]), np.sin(ego[2])
            turned = moved @ np.array([[cos, -sin], [sin, cos]])
            hits = collisions(poses, human, turned)
            found |= in_both_conventions(100.0 * hits, "collision %")
        return {name: round(value, 6) for name, value in found.items()}

    def _human_poses(self) -> np.ndarray | None:
        if self._scene is not None:
            human = self._scene.human_future
            return human if len(human) else None
        return self._human

    def _image(self, log: pathlib.Path, frame: Mapping[str, Any]) -> np.ndarray:
        relative = frame["cams"][CAMERA]["data_path"]
        path = self._data.folder / "sensor_blobs" / log.parent.name / relative
        try:
            with Image.open(path) as image:
                picture = np.asarray(image.convert("RGB"))
        except OSError as error:
            raise UserError(f"frame {frame['token']}: no image {path}: {error}") from error
        return np.zeros_like(picture) if self._black else picture


def export_predictions(records: Sequence[Mapping[str, Any]], folder: str | os.PathLike[str]) -> int:
    """Writes ``<token>.json`` per record: ``action``, the motions [8, 3], and ``poses`` [8, 3].

    ``action`` is what DriveVLA-W0's agent reads, motions in physical units; ``poses`` are absolute
    in the frame of the present rear axle.

    Returns:
      how many were written.

    Raises:
      UserError: the records are of another benchmark.
    """
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for record in records:
        if "motions" not in record:
            raise UserError("--export: only the benchmark navsim has a prediction per scene")
        poses = np.round(compose_motions(record["motions"]), 6).tolist()
        write_json(path / f"{record['token']}.json", {"action": record["motions"], "poses": poses})
    return len(records)


def scored(scene: Scene, poses: np.ndarray) -> dict[str, Any]:
    """``scores`` by name and version of a trajectory [8, 3] in a scene, as JSON values."""
    scores = {}
    for version in VERSIONS:
        if version == "v1.1" and len(scene.tracks.boxes) < 50:
            continue  # a scene of v2, whose tracks end too early for the other version
        filtered = score_trajectory(scene, poses, version, human_filter=True)
        scores |= named_scores(filtered.of(0), version)
    end = to_global(scene.ego_state, poses[-1])[:2]
    return {
        "scores": scores,
        "previous_token": scene.previous_token,
        "original_token": scene.original_token,
        "start": np.round(scene.ego_state[:2], 4).tolist(),
        "end": np.round(end, 4).tolist(),
    }


def named_scores(scores: Mapping[str, float], version: str) -> dict[str, float]:
    """Scores with their version in their names."""
    return {f"{name} {version}": round(float(value), 6) for name, value in scores.items()}


def score_breakdown(
    records: Sequence[dict[str, Any]], data: NavsimScenes | None = None
) -> Breakdown:
    """Means of all sub-scores over the records; EC and EPDMS where the frame before is there."""
    records = [r for r in records if "error" not in r]
    if data is not None and data.scenes:
        records = _with_extended_comfort(records, data)
    scores: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.get("scores", {}).items():
            scores.setdefault(name, []).append(value)
    order = sorted(
        scores, key=lambda name: (name.split()[1], name.split()[0] not in SCORE.values())
    )
    scores = {name: scores[name] for name in order}
    whole = two_stage_scores(records)
    scores |= {"EPDMS v2, two stages": whole} if whole else {}
    figures = mean_over([record.get("open_loop", {}) for record in records])
    return Breakdown(figures=figures, scores=scores)


def two_stage_scores(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """EPDMS of the scenes that have a second stage: the product of both stages.

    Second-stage scenes begin where a first-stage plan might have ended. Each counts by how near it
    begins to where the plan did end, ``exp(-d² / 0.2)``, all alike where none is near (navsim
    ``scene_aggregator.py:18-47``).
    """
    seconds: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if record.get("original_token"):
            seconds.setdefault(record["original_token"], []).append(record)
    found = []
    for record in records:
        after = seconds.get(record["token"], ())
        if not after or "EPDMS v2" not in record["scores"]:
            continue
        starts = np.array([other["start"] for other in after])
        squares = ((starts - record["end"]) ** 2).sum(1)
        weights = np.exp(-squares / (2 * _STAGE_SPREAD))
        if np.isclose(weights.sum(), 0.0):
            weights = np.ones(len(after))
        mean = np.average([other["scores"]["EPDMS v2"] for other in after], weights=weights)
        found.append(float(record["scores"]["EPDMS v2"] * mean))
    return found


def _with_extended_comfort(
    records: Sequence[dict[str, Any]], data: NavsimScenes
) -> list[dict[str, Any]]:
    """Records whose EPDMS counts EC where the frame half a second before was driven too."""
    driven: dict[str, np.ndarray] = {}
    by_token = {record["token"]: record for record in records}

    def states(token: str) -> np.ndarray:
        if token not in driven:
            scene, motions = data.scene(token), by_token[token]["motions"]
            poses = interpolate_poses(scene.ego_state, compose_motions(motions))
            driven[token] = simulate(poses[None], scene.ego_state)
        return driven[token]

    found = []
    for record in records:
        previous = record.get("previous_token")
        if previous and previous in by_token and "EPDMS v2" in record["scores"]:
            ec = two_frame_comfort(states(record["token"]), states(previous))
            scores = {
                name.removesuffix(" v2"): np.array([value])
                for name, value in record["scores"].items()
                if name.endswith(" v2")
            }
            whole = aggregate({**scores, "EC": ec.astype(float)}, "v2")
            renamed = named_scores({name: value[0] for name, value in whole.items()}, "v2")
            record = {**record, "scores": {**record["scores"], **renamed}}
        found.append(record)
    return found
