"""The corpora, one row each: where the fields lie, what the actions mean, how often it is seen.

Bring your own data with one row: say which reader opens the files, name its views and fields as
they are called there and, where its actions are not simply the field ``action``, give a small
function of ``conventions.py``. Sources: FACTS section 8, UniVLA tools/process, and the feature
structures that the datasets publish.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from univla_jax.data import action_conventions
from univla_jax.data.action_conventions import Steps
from univla_jax.episode import Episode
from univla_jax.errors import UserError

READERS = ("rlds", "calvin", "lerobot", "videos")

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """One row of the table.

    Attributes:
      name: key in ``DATASETS``.
      views: camera name in this package -> path of its image inside a step.
      control_hz: control rate in steps per second.
      frame_spacing: steps between the frames of a world-model window, about a second.
      image_sizes: camera name -> (height, width) in pixels at which its frames are tokenized
        where a recipe says nothing else.
      instruction: paths of the instruction inside the first step; the first that is not empty
        counts.
      actions: ``Steps`` -> [T', A] in the corpus' physical units; T' is T without ``trim``.
      state: path of the proprioceptive state, None where there is none.
      mixture_weight: share in the world-model mixture relative to the other corpora.
      min_frames: shortest episode kept, in frames: one action chunk.
      trim: steps left out at the start and at the end of an episode.
      chunk_deltas: dimensions of an action chunk that are relative to its first step, and those of
        them that are angles; None where actions stand for themselves.
      texts: kind of text (``Episode.texts``) -> its path inside a step.
      default_instruction: for episodes that come without one; empty where they are broken.
      reader: of its files, one of ``READERS``.
    """

    name: str
    views: Mapping[str, str]
    control_hz: float
    frame_spacing: int
    image_sizes: Mapping[str, Size] = dataclasses.field(default_factory=dict)
    instruction: tuple[str, ...] = ("language_instruction",)
    actions: Callable[[Steps], np.ndarray] = action_conventions.commanded
    state: str | None = "observation/state"
    mixture_weight: float = 1.0
    min_frames: int = 10
    trim: tuple[int, int] = (0, 0)
    chunk_deltas: action_conventions.ChunkDeltas | None = None
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_instruction: str = ""
    reader: str = "rlds"

    def trimmed(self, steps: np.ndarray) -> np.ndarray:
        """The steps [T, ...] without those of ``trim``."""
        start, end = self.trim
        return steps[start : len(steps) - end]


_IN_OBSERVATION = ("observation/natural_language_instruction",)
_TWO_VIEWS = {"image": "observation/image", "wrist_image": "observation/wrist_image"}
_SQUARE = (256, 256)


def _views(size: Size = _SQUARE, **fields: str) -> dict[str, Mapping]:
    """``views`` and ``sizes`` of cameras in the observation, all tokenized at one size."""
    paths = {view: f"observation/{field}" for view, field in fields.items()}
    return {"views": paths, "image_sizes": dict.fromkeys(paths, size)}


def _libero(name: str) -> DatasetConfig:
    """LIBERO without its no-op steps, as RLDS; raw actions."""
    return DatasetConfig(
        name,
        **_views((200, 200), image="image", wrist_image="wrist_image"),
        control_hz=20.0,
        frame_spacing=10,
        # actions: the gripper is -1 open, 1 closed
    )


def _video(name: str, **changes) -> DatasetConfig:
    """A folder of videos, one frame a second."""
    return DatasetConfig(
        name,
        views={"image": "video"},
        image_sizes={"image": _SQUARE},
        control_hz=1.0,
        frame_spacing=1,
        actions=action_conventions.no_actions,
        state=None,
        min_frames=6,
        reader="videos",
        **changes,
    )


_ROWS = (
    DatasetConfig("tabletop", views=_TWO_VIEWS, control_hz=5.0, frame_spacing=5),
    _libero("libero"),  # the four suites as one corpus with joint statistics, as published
    _libero("libero_spatial"),
    _libero("libero_object"),
    _libero("libero_goal"),
    _libero("libero_10"),
    DatasetConfig(
        "calvin",
        views={"image": "rgb_static", "wrist_image": "rgb_gripper"},
        image_sizes={"image": (200, 200), "wrist_image": (80, 80)},
        control_hz=30.0,
        frame_spacing=10,
        actions=action_conventions.field("rel_actions"),
        # actions: the gripper is 1 open, -1 closed
        state="robot_obs",
        mixture_weight=0.8,
        reader="calvin",
    ),
    DatasetConfig(
        "bridge",
        **_views(image="image_0", side_image="image_1"),
        control_hz=5.0,
        frame_spacing=5,
        actions=action_conventions.bridge,
        trim=(1, 1),
    ),
    DatasetConfig(
        "fractal",
        **_views((192, 240), image="image"),
        control_hz=3.0,
        frame_spacing=3,
        instruction=_IN_OBSERVATION,
        actions=action_conventions.relative_gripper,
        state="observation/base_pose_tool_reached",
        mixture_weight=0.3,
    ),
    DatasetConfig(
        "droid",
        **_views(
            (144, 256),
            image="exterior_image_1_left",
            side_image="exterior_image_2_left",
            wrist_image="wrist_image_left",
        ),
        control_hz=15.0,
        frame_spacing=15,
        instruction=(
            "language_instruction",
            "language_instruction_2",
            "language_instruction_3",
        ),
        actions=action_conventions.binary_gripper,
        state="observation/cartesian_position",
        mixture_weight=0.2,
    ),
    DatasetConfig(
        "toto",
        **_views(image="image"),
        control_hz=30.0,
        frame_spacing=20,
        instruction=_IN_OBSERVATION,
        actions=action_conventions.open_gripper,
    ),
    DatasetConfig(
        "taco_play",
        **_views(image="rgb_static", wrist_image="rgb_gripper"),
        control_hz=15.0,
        frame_spacing=5,
        instruction=_IN_OBSERVATION,
        actions=action_conventions.clipped_world_actions,
        state="observation/robot_obs",
    ),
    DatasetConfig(
        "fmb",
        **_views(image="image_side_1"),
        control_hz=10.0,
        frame_spacing=5,
        state="observation/eef_pose",
    ),
    DatasetConfig(
        "maniskill",
        **_views(image="image", wrist_image="wrist_image"),
        control_hz=20.0,
        frame_spacing=10,
        mixture_weight=0.5,
        # actions: the gripper is 1 open, -1 closed
    ),
    DatasetConfig(
        "kuka",
        **_views(image="image"),
        control_hz=10.0,
        frame_spacing=3,
        instruction=_IN_OBSERVATION,
        actions=action_conventions.relative_gripper,
        state=None,
        mixture_weight=0.1,
    ),
    DatasetConfig(
        "berkeley_autolab_ur5",
        **_views(image="image", wrist_image="hand_image"),
        control_hz=5.0,
        frame_spacing=5,
        instruction=_IN_OBSERVATION,
        actions=action_conventions.relative_gripper,
        state="observation/robot_state",
    ),
    DatasetConfig(
        "cmu_play_fusion",
        **_views(image="image"),
        control_hz=5.0,
        frame_spacing=10,
        actions=action_conventions.first_and_last,
        # actions: the gripper is as commanded
    ),
    DatasetConfig(
        "viola",
        **_views(image="agentview_rgb", wrist_image="eye_in_hand_rgb"),
        control_hz=20.0,
        frame_spacing=15,
        instruction=_IN_OBSERVATION,
        actions=action_conventions.inverted_closedness,
        state="observation/joint_states",
    ),
    DatasetConfig(
        "utaustin_mutex",
        **_views(image="image", wrist_image="wrist_image"),
        control_hz=20.0,
        frame_spacing=10,
        actions=action_conventions.inverted_gripper,
    ),
    DatasetConfig(
        "aloha",
        views={
            view: f"observation.images.{view}"
            for view in ("cam_high", "cam_left_wrist", "cam_right_wrist")
        },
        image_sizes=dict.fromkeys(("cam_high", "cam_left_wrist", "cam_right_wrist"), (128, 128)),
        control_hz=30.0,
        frame_spacing=30,
        instruction=("task",),
        # actions: the grippers, as measured, are dimensions 6 and 13
        state="observation.state",
        min_frames=20,
        chunk_deltas=action_conventions.ALOHA_DELTAS,
        reader="lerobot",
    ),
    _video("something_something"),
    _video("1x", default_instruction="a robot moves through a building"),
)

DATASETS: dict[str, DatasetConfig] = {row.name: row for row in _ROWS}


def find_dataset_config(name: str) -> DatasetConfig:
    """The row called ``name``.

    Raises:
      UserError: there is none; names the nearest one.
    """
    if name in DATASETS:
        return DATASETS[name]
    near = difflib.get_close_matches(name, DATASETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(DATASETS)}"
    raise UserError(f"unknown corpus {name!r}; {hint} Add a row to univla_jax/data/datasets.py")


# ----------------------------------------------------------------------------
# What all readers share: their interface, splits by range, and fields to ``Episode``.
#
# Axes: T steps, H/W image height and width, A action dimensions, P state dimensions.


class EpisodeReader(Protocol):
    """Random access to the episodes of one split of a dataset.

    Attributes:
      folder: where it lies.
      name: dataset name, with a version where there is one.
      sizes: per view the (H, W) which the dataset declares, None where it leaves them open.
      fingerprint: sha256 of what describes the dataset.
    """

    folder: pathlib.Path
    name: str
    sizes: Mapping[str, tuple[int, int] | None]
    fingerprint: str

    def __len__(self) -> int:
        """Number of episodes in the split."""
        ...

    def __getitem__(self, index: int, /) -> Episode:
        """Reads one episode; UserError where it cannot be decoded."""
        ...

    def episode_id(self, index: int) -> str:
        """Name of an episode, also of one that cannot be read."""
        ...


def assemble(
    corpus: DatasetConfig, steps: Steps, frames: Mapping[str, np.ndarray], episode_id: str
) -> Episode:
    """An episode in the corpus' conventions.

    Args:
      corpus: says which fields are what.
      steps: by path, [T, ...]; texts as objects.
      frames: per view uint8 [T, H, W, 3].
      episode_id: of the episode.

    Raises:
      KeyError: a field is missing.
      ValueError: actions of another length than the frames that ``corpus.trim`` leaves.
    """
    kept = {view: corpus.trimmed(array) for view, array in frames.items()}
    actions = np.asarray(corpus.actions(steps), np.float32)
    lengths = {len(array) for array in kept.values()}
    if lengths - {len(actions)}:
        raise ValueError(f"{len(actions)} actions for {sorted(lengths)} frames")
    state = None if corpus.state is None else corpus.trimmed(steps[corpus.state])
    return Episode(
        instruction=_instruction(corpus, steps),
        frames=kept,
        actions=actions,
        control_hz=corpus.control_hz,
        corpus=corpus.name,
        episode_id=episode_id,
        state=None if state is None else np.asarray(state, np.float32),
        texts={k: tuple(map(text, corpus.trimmed(steps[p]))) for k, p in corpus.texts.items()},
    )


def text(value: Any) -> str:
    """UTF-8 bytes or anything else as a string."""
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _instruction(corpus: DatasetConfig, steps: Steps) -> str:
    found = (text(steps[path][0]) for path in corpus.instruction if path in steps)
    return next((words for words in found if words.strip()), corpus.default_instruction)


def split_range(split: str, sizes: Mapping[str, int], where: pathlib.Path) -> tuple[str, range]:
    """A split in TFDS notation, for datasets which TFDS does not read.

    Args:
      split: such as ``"train"``, ``"train[:95%]"`` or ``"train[10:20]"``.
      sizes: episodes per split.
      where: the dataset, for messages.

    Returns:
      name of the split, and the episodes of it.

    Raises:
      UserError: another notation, an unknown split, or no episodes in it.
    """
    found = re.fullmatch(r"(\w+)(?:\[(\d*%?):(\d*%?)\])?", split)
    if found is None or found[1] not in sizes:
        raise UserError(f"{where} has no split {split!r}; it has {', '.join(sizes) or 'none'}")
    size = sizes[found[1]]
    chosen = range(size)[_bound(found[2], size) : _bound(found[3], size)]
    if not chosen:
        raise UserError(f"{where}: split {split!r} holds no episodes")
    return found[1], chosen


def _bound(words: str | None, size: int) -> int | None:
    if not words:
        return None
    return round(size * int(words[:-1]) / 100) if words.endswith("%") else int(words)


# ----------------------------------------------------------------------------
# Opens a dataset with the reader that its corpus' row names.


_CLASSES = {
    "rlds": ("univla_jax.data.rlds", "RldsReader"),
    "calvin": ("univla_jax.data.calvin", "CalvinReader"),
    "lerobot": ("univla_jax.data.lerobot", "LeRobotReader"),
    "videos": ("univla_jax.data.video", "VideoFolderReader"),
}


def open_reader(folder: str | os.PathLike[str], corpus: DatasetConfig, split: str) -> EpisodeReader:
    """Random access to the episodes of a split.

    Args:
      folder: the dataset.
      corpus: row that says how it is read.
      split: in TFDS notation, for example ``"train"`` or ``"train[:95%]"``.

    Raises:
      UserError: no dataset there, an unknown split, or a file or field that is missing.
    """
    module, name = _CLASSES[corpus.reader]
    return getattr(importlib.import_module(module), name)(folder, corpus, split)
