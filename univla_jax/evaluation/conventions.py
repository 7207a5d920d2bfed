"""Conventions that go wrong, as changes of a set-up: of recorded episodes, a simulator, a policy.

A change is a remedy where it makes a policy's errors smaller, and a fault where it is put into a
set-up that was right. ``diagnosis.py`` tries them one after another.

Axes: T steps, H/W pixels, A action dimensions, of which the last is the gripper.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from univla_jax.episode import Episode, Observation
from univla_jax.normalization import ActionStatistics
from univla_jax.simulators import Simulator, StepResult, Trial

Frames = Mapping[str, np.ndarray]
_ROTATION = slice(3, 6)
_PREFIX = re.compile(r"^(instruction|task|in|q|human|user)\s*:\s*")
_QUESTION = re.compile(r"^what action should the robot take to (.*?)\?(\s*out\s*:)?$")


@dataclasses.dataclass(frozen=True)
class Change:
    """One convention taken in another way.

    Attributes:
      convention: what it is about, for example ``"gripper sign"``.
      what: what is done, in words.
      field: what a person changes to have it so for good: of the dataset, then of the simulator.
      frames: of all views, each uint8 [..., H, W, 3]; None leaves them.
      words: of the instruction; None leaves it.
      actions: of actions [T, A] in physical units; None leaves them.
      merge: steps made into one, their movements added up.
      wait: steps of standing still before the first observation.
    """

    convention: str
    what: str
    field: tuple[str, str]
    frames: Callable[[Frames], dict[str, np.ndarray]] | None = None
    words: Callable[[str], str] | None = None
    actions: Callable[[np.ndarray], np.ndarray] | None = None
    merge: int = 1
    wait: int = 0

    def episode(self, episode: Episode) -> Episode:
        """A recorded episode with it."""
        frames, actions, state = episode.frames, np.asarray(episode.actions), episode.state
        if self.merge > 1:
            whole = len(actions) // self.merge * self.merge
            parts = actions[:whole].reshape(-1, self.merge, actions.shape[1])
            actions = np.concatenate([parts[..., :-1].sum(1), parts[:, -1, -1:]], 1)
            frames = {view: f[: whole : self.merge] for view, f in frames.items()}
            state = None if state is None else state[: whole : self.merge]
        return dataclasses.replace(
            episode,
            instruction=self.words(episode.instruction) if self.words else episode.instruction,
            frames=self.frames(frames) if self.frames else frames,
            actions=self.actions(actions) if self.actions else actions,
            control_hz=episode.control_hz / self.merge,
            state=state,
        )

    def observation(self, observation: Observation) -> Observation:
        """What a policy is shown with it."""
        words, frames = self.words, self.frames
        return dataclasses.replace(
            observation,
            instruction=words(observation.instruction) if words else observation.instruction,
            frames=frames(observation.frames) if frames else observation.frames,
        )


# ----------------------------------------------------------------------------
# Functions of frames, words and actions; module-level, so that a simulator's process gets them.


def upside_down(frames: np.ndarray) -> np.ndarray:
    """Rows of [..., H, W, 3] in the other order."""
    return frames[..., ::-1, :, :]


def mirrored(frames: np.ndarray) -> np.ndarray:
    """Columns of [..., H, W, 3] in the other order."""
    return frames[..., ::-1, :]


def half_turned(frames: np.ndarray) -> np.ndarray:
    """Frames [..., H, W, 3] turned by 180 degrees."""
    return frames[..., ::-1, ::-1, :]


def bgr(frames: np.ndarray) -> np.ndarray:
    """Channels of [..., H, W, 3] in the other order."""
    return frames[..., ::-1]


def zoomed(frames: np.ndarray, *, share: float) -> np.ndarray:
    """The middle of frames alone, or with a share above 1 their edge repeated around them."""
    height, width = frames.shape[-3:-1]
    flat = frames.reshape(-1, height, width, 3)
    rows, columns = (round(size * abs(1 - share) / 2) for size in (height, width))
    if share > 1:
        flat = np.pad(flat, ((0, 0), (rows, rows), (columns, columns), (0, 0)), mode="edge")
    else:
        flat = flat[:, rows : height - rows, columns : width - columns]
    size = width, height
    resized = [Image.fromarray(f).resize(size, Image.Resampling.BICUBIC) for f in flat]
    return np.stack([np.asarray(f) for f in resized]).reshape(frames.shape)


def small(frame: np.ndarray) -> np.ndarray:
    """A frame [H, W, 3] at 32 x 32 pixels, float32."""
    picture = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(picture.resize((32, 32), Image.Resampling.BOX), np.float32)


def in_views(
    frames: Frames, *, change: Callable[[np.ndarray], np.ndarray], only: str | None = None
) -> dict[str, np.ndarray]:
    """Changes the frames of every view, or of one."""
    return {
        view: np.ascontiguousarray(change(frame)) if only in (None, view) else frame
        for view, frame in frames.items()
    }


def swapped(frames: Frames, *, first: str, second: str) -> dict[str, np.ndarray]:
    """Exchanges two views."""
    names = {first: second, second: first}
    return {view: frames[names.get(view, view)] for view in frames}


def plain_words(text: str) -> str:
    """The instruction in lower case, without prefix, underscores, quotes and punctuation."""
    text = " ".join(text.replace("_", " ").lower().split()).strip("\"' ")
    text = _PREFIX.sub("", text)
    question = _QUESTION.match(text)
    return (question[1] if question else text).strip("\"'.!? ")


def gripper_line(actions: np.ndarray, *, factor: float, offset: float = 0.0) -> np.ndarray:
    """``factor`` times the gripper plus ``offset``."""
    return np.concatenate([actions[..., :-1], factor * actions[..., -1:] + offset], -1)


def scaled_movement(actions: np.ndarray, *, factor: float) -> np.ndarray:
    """``factor`` times all dimensions but the gripper."""
    return np.concatenate([factor * actions[..., :-1], actions[..., -1:]], -1)


def rotation_first(actions: np.ndarray) -> np.ndarray:
    """Exchanges the three numbers of the translation and the three of the rotation."""
    return actions[..., [3, 4, 5, 0, 1, 2, *range(6, actions.shape[-1])]]


def rotated(actions: np.ndarray, *, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Changes the rotation [..., 3]."""
    return np.concatenate([actions[..., :3], change(actions[..., 3:6]), actions[..., 6:]], -1)


def euler_to_axis_angle(euler: np.ndarray) -> np.ndarray:
    """Rotation vectors [..., 3] of roll, pitch and yaw about fixed axes."""
    return Rotation.from_euler("xyz", euler.reshape(-1, 3)).as_rotvec().reshape(euler.shape)


def axis_angle_to_euler(vectors: np.ndarray) -> np.ndarray:
    """Roll, pitch and yaw about fixed axes of rotation vectors [..., 3]."""
    rotation = Rotation.from_rotvec(vectors.reshape(-1, 3))
    return rotation.as_euler("xyz").reshape(vectors.shape)


def shifted(actions: np.ndarray, *, steps: int) -> np.ndarray:
    """Actions [T, A] moved to later steps, or earlier ones; the ends are repeated."""
    return actions[np.clip(np.arange(len(actions)) - steps, 0, len(actions) - 1)]


# ----------------------------------------------------------------------------
# What is tried.

_ACTIONS = ("DatasetConfig.actions", "the benchmark's gripper rule or action conversion")
_VIEWS = ("DatasetConfig.views, bgr_views", "the benchmark's image orientation and views")
_WORDS = ("DatasetConfig.instruction", "the benchmark's instruction")
_SIZES = ("image_specs, or how the dataset's frames were cut", "the benchmark's resize")
_RATE = ("DatasetConfig.control_hz, frame_stride", "the benchmark's control_hz, action scale")
_GRIPPERS = {
    "gripper negated": ("gripper sign", -1.0, 0.0),
    "gripper 1 - g": ("gripper sign", -1.0, 1.0),
    "gripper 1 - 2 g": ("gripper sign", -2.0, 1.0),
    "gripper 2 g - 1": ("gripper range", 2.0, -1.0),
    "gripper (g + 1) / 2": ("gripper range", 0.5, 0.5),
}
_ROTATIONS = {
    "Euler angles to axis-angle": euler_to_axis_angle,
    "axis-angle to Euler angles": axis_angle_to_euler,
    "degrees to radians": np.deg2rad,
    "radians to degrees": np.rad2deg,
    "roll and yaw exchanged": functools.partial(np.flip, axis=-1),
}
_ORIENTATIONS = {
    "upside down": upside_down,
    "mirrored": mirrored,
    "turned by 180 degrees": half_turned,
}
WORDS = Change("prompt", "plain lower-case words", _WORDS, words=plain_words)
MERGED = Change("control rate", "two steps made one", _RATE, merge=2)


def action_changes(dimensions: int, *, turns: bool) -> list[Change]:
    """Changes of actions.

    Args:
      dimensions: A.
      turns: whether the rotation of any recorded action is not zero.
    """
    found = [
        Change(
            convention, what, _ACTIONS, actions=functools.partial(gripper_line, factor=a, offset=b)
        )
        for what, (convention, a, b) in _GRIPPERS.items()
    ]
    found += [
        Change(
            "control rate",
            f"movement times {f:g}",
            _RATE,
            actions=functools.partial(scaled_movement, factor=f),
        )
        for f in (0.5, 2.0)
    ]
    if dimensions >= 7:
        what = "rotation before translation"
        found.append(Change("order of dimensions", what, _ACTIONS, actions=rotation_first))
    if dimensions == 7 and turns:
        found += [
            Change(
                "rotation form", what, _ACTIONS, actions=functools.partial(rotated, change=function)
            )
            for what, function in _ROTATIONS.items()
        ]
    return found


def time_shifts() -> list[Change]:
    """Actions that belong to the step before or after."""
    return [
        Change(
            "time shift",
            f"actions {n:+d} steps",
            _ACTIONS,
            actions=functools.partial(shifted, steps=n),
        )
        for n in (-1, 1)
    ]


def frame_changes(views: Sequence[str]) -> list[Change]:
    """Changes of frames: of all views, of each, and between two."""
    found = []
    for only in (None, *(views if len(views) > 1 else ())):
        found += [
            Change("flipped view", f"{only or 'all views'} {what}", _VIEWS, _in(function, only))
            for what, function in _ORIENTATIONS.items()
        ]
    found.append(Change("channel order", "BGR for RGB", _VIEWS, _in(bgr)))
    for share in (0.8, 1.25):
        what = f"{'margin around' if share > 1 else 'middle of'} each frame, {share:g}"
        found.append(Change("resize", what, _SIZES, _in(functools.partial(zoomed, share=share))))
    found += [
        Change(
            "swapped views",
            f"{a} and {b} exchanged",
            _VIEWS,
            functools.partial(swapped, first=a, second=b),
        )
        for i, a in enumerate(views)
        for b in views[i + 1 :]
    ]
    return found


def waiting(steps: int) -> Change:
    """Standing still at first."""
    return Change("wait steps", f"{steps} steps of standing still", ("", "wait_steps"), wait=steps)


def _in(
    change: Callable[[np.ndarray], np.ndarray], only: str | None = None
) -> Callable[[Frames], dict[str, np.ndarray]]:
    return functools.partial(in_views, change=change, only=only)


def scaled(statistics: ActionStatistics, gain: float) -> ActionStatistics:
    """Statistics under which a normalized action means ``gain`` times as much."""
    low, high = np.asarray(statistics.q01), np.asarray(statistics.q99)
    middle, half = (low + high) / 2, (high - low) / 2 * gain
    ends = {"q01": tuple(map(float, middle - half)), "q99": tuple(map(float, middle + half))}
    return dataclasses.replace(statistics, **ends)


@dataclasses.dataclass(frozen=True)
class ChangedSimulator:
    """Makes a simulator behind changes, at starts of recorded episodes where they are given.

    The last change is nearest to the policy. Pickles where its parts do.

    Attributes:
      make: makes the simulator inside.
      changes: of observations and actions.
      starts: episodes whose first states the trials 0, 1, … have; empty keeps the trials.
      dimensions: A.
    """

    make: Callable[[], Simulator]
    changes: tuple[Change, ...] = ()
    starts: tuple[Episode, ...] = ()
    dimensions: int = 7

    def __call__(self) -> _Changed:
        """The simulator."""
        return _Changed(self.make(), self)


class _Changed:
    """See ``ChangedSimulator``; what is not changed is the simulator's own."""

    def __init__(self, inner: Simulator, made_by: ChangedSimulator) -> None:
        self._inner, self._changes = inner, made_by.changes
        self._starts, self._dimensions = made_by.starts, made_by.dimensions

    def reset(self, trial: Trial) -> None:
        """Begins an episode, then stands still where a change says so."""
        if self._starts:
            self._inner.restore(self._starts[trial.trial])
        else:
            self._inner.reset(trial)
        self._wait()

    def restore(self, episode: Episode) -> None:
        """Begins where a recorded episode does."""
        self._inner.restore(episode)
        self._wait()

    def observe(self) -> Observation:
        """The observation behind all changes."""
        observation = self._inner.observe()
        for change in self._changes:
            observation = change.observation(observation)
        return observation

    def step(self, action: np.ndarray, *, render: bool = True) -> StepResult:
        """Executes an action behind all changes, once or more often."""
        for change in reversed(self._changes):
            action = change.actions(action[None])[0] if change.actions else action
        result = StepResult.CONTINUES
        for _ in range(max((change.merge for change in self._changes), default=1)):
            if result is StepResult.CONTINUES:
                result = self._inner.step(action, render=render)
        return result

    def result(self) -> dict[str, Any]:
        """The simulator's."""
        return self._inner.result()

    def video_frame(self) -> np.ndarray:
        """The simulator's."""
        return self._inner.video_frame()

    def versions(self) -> dict[str, str]:
        """The simulator's."""
        return self._inner.versions()

    def _wait(self) -> None:
        still = np.zeros(self._dimensions)
        for _ in range(sum(change.wait for change in self._changes)):
            self._inner.step(still)
