"""Dataset registry: the datasets that can be read, and how to describe one of your own.

Everything the package knows about a dataset is one ``DatasetConfig``: which reader opens its files,
where the fields of a step lie, what its actions mean, how its frames are sampled. The values of
those below are the published ones: UniVLA (arXiv 2506.19850), its ``tools/process`` scripts
(github.com/baaivision/UniVLA), and the feature structures in the TFDS catalog.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from univla_jax.config import name_hint
from univla_jax.data import action_conventions
from univla_jax.data.action_conventions import Steps
from univla_jax.data.instruction_text import decode_text
from univla_jax.episode import Episode
from univla_jax.errors import UserError
from univla_jax.normalization import IDENTITY, MIN_MAX, check_kinds

Size = tuple[int, int]
_CAMERA_LISTS = ("policy_views", "world_model_views", "bgr_views")


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Describes one dataset; the only thing to write for data of your own.

    Paths name the fields of a step as the files do: ``"observation/image"`` in RLDS (nested keys
    joined by slashes), ``"observation.images.top"`` in LeRobot, ``"rgb_static"`` in CALVIN. A robot
    with one camera, an RLDS dataset and actions that need no conversion takes five lines::

        DatasetConfig(
            "my_robot",
            views={"image": "observation/image"},
            image_sizes={"image": (256, 256)},
            control_hz=10.0,
            frame_spacing=10,
        )

    Put it into ``DATASETS`` below, or keep it outside the package and give it to
    ``register_dataset`` in a module that your config files import.

    Attributes:
      name: key in ``DATASETS``; configs, token stores and checkpoints refer to the dataset by it.
      views: camera name in this package -> path of its image. By convention ``"image"`` is the
        third-person and ``"wrist_image"`` the wrist camera.
      control_hz: control rate in steps per second, as recorded. Videos are sampled at it; the
        ``fps`` of a LeRobot dataset takes its place.
      frame_spacing: steps kept between two frames of a world-model sample, about one second.
      image_sizes: camera name -> (height, width) in pixels at which its frames are tokenized,
        multiples of the vision tokenizer's 8; a config may give ``image_specs`` instead.
      policy_views: cameras that a policy sees, in their order; empty takes all of ``views``.
      world_model_views: cameras each of which gives a sample of its own to a task that shows one
        camera; empty takes the first of ``views``.
      instruction: paths of instructions in the first step. The first that is not empty becomes the
        episode's, all others that are neither empty nor equal its paraphrases, of which each
        training sample draws one.
      bgr_views: cameras whose images the dataset stores with blue first; they are turned to RGB.
      actions: converts ``Steps`` to actions [T', A] in physical units (anything NumPy casts to
        float32), T' being T without ``trim``. By default the field ``"action"``; see
        ``action_conventions`` for common conversions, or write a function.
      action_units: what the numbers of an action are, for people.
      gripper: what the gripper's number means, for people; empty where there is none.
      normalization: per action dimension one of ``normalization.NORMALIZATIONS``; empty takes
        quantiles of all.
      state: path of the proprioceptive state [T, P], None where there is none.
      mixture_weight: relative share in a training mixture of several datasets.
      min_frames: shortest episode kept, in steps; shorter ones are skipped and reported. Must be at
        least the length of an action chunk, and ``frame_spacing`` for the world model.
      trim: steps dropped at the start and at the end of every episode.
      frame_stride: keeps every so many-th of the steps that are left, at a rate divided by it. For
        videos and absolute actions; movements from step to step would have to be added up.
      chunk_deltas: for policies whose action chunks are relative to the pose at their first step;
        None where every action stands for itself.
      absolute_dims: dimensions of an action that command a value, such as a gripper's or a pose's;
        the others are displacements. Standing still repeats the last value of the former and makes
        the latter 0. None takes the last dimension, the gripper, and where there are
        ``chunk_deltas`` all.
      texts: kind of text (``Episode.texts``, such as ``"reasoning"``) -> its path.
      annotations: further texts, read where the copy of the dataset has their field.
      groundings: path of what phrases mean in the frames of each step (``Episode.groundings``),
        read where the copy of the dataset has it.
      default_instruction: for episodes without an instruction; where it is empty, they are invalid.
      metadata: name -> path of a field of the episode, or of its last step, that is kept in the
        token store (``TokenizedEpisode.metadata``).
      episode_filters: path of a field of the episode -> the value it must have, such as
        ``{"success": True}``; of a field of its steps, that of the last one counts. Other episodes
        are left out and counted apart from broken ones.
      idle_steps: actions [T', A] -> bool [T'], the steps to leave out because the robot does
        nothing; see ``action_conventions``. None keeps every step.
      segment_seconds: length to which ``"videos"`` are cut, so that a long one is never held as a
        whole; None takes each as one episode.
      reader: file format, a key of ``readers.READERS``: ``"rlds"``, ``"calvin"``, ``"lerobot"``,
        ``"hdf5"``, ``"videos"``, ``"navsim"`` or ``"grounding"``.
    """

    name: str
    views: Mapping[str, str]
    control_hz: float
    frame_spacing: int
    image_sizes: Mapping[str, Size] = dataclasses.field(default_factory=dict)
    policy_views: tuple[str, ...] = ()
    world_model_views: tuple[str, ...] = ()
    instruction: tuple[str, ...] = ("language_instruction",)
    bgr_views: tuple[str, ...] = ()
    actions: Callable[[Steps], np.ndarray] = action_conventions.unchanged
    action_units: str = ""
    gripper: str = ""
    normalization: tuple[str, ...] = ()
    state: str | None = "observation/state"
    mixture_weight: float = 1.0
    min_frames: int = 10
    trim: tuple[int, int] = (0, 0)
    frame_stride: int = 1
    chunk_deltas: action_conventions.ChunkDeltas | None = None
    absolute_dims: tuple[int, ...] | None = None
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    annotations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    groundings: str = ""
    default_instruction: str = ""
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    episode_filters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    idle_steps: Callable[[np.ndarray], np.ndarray] | None = None
    segment_seconds: float | None = None
    reader: str = "rlds"

    def __post_init__(self) -> None:
        """Raises UserError for a view that is named and not there, or a value out of range."""
        for name in _CAMERA_LISTS:
            self._check_views(getattr(self, name), f"{name}: ")
        check_kinds(self.normalization)
        if self.frame_stride < 1:
            raise UserError(f"dataset {self.name!r}: frame_stride {self.frame_stride} is below 1")

    def with_views(self, views: Iterable[str]) -> DatasetConfig:
        """The same dataset with only some of its cameras.

        Raises:
          UserError: it has no such camera.
        """
        views = tuple(views)
        self._check_views(views)
        return dataclasses.replace(
            self,
            views={view: self.views[view] for view in views},
            **{name: tuple(v for v in getattr(self, name) if v in views) for name in _CAMERA_LISTS},
        )

    def _check_views(self, views: Iterable[str], what: str = "") -> None:
        unknown = sorted(set(views) - set(self.views))
        if unknown:
            raise UserError(
                f"{what}dataset {self.name!r} has no view {unknown[0]!r}; it has "
                f"{', '.join(self.views)}"
            )


# ----------------------------------------------------------------------------
# The built-in datasets.

_OPEN_1 = "1 open, 0 closed"
_CLOSED_1 = "1 closed, -1 open"
_MOVEMENT = "movement of the hand per step: meters, then fixed-axis angles in radians; gripper"
_SCALED = "movement of the hand per step, -1 to 1 of the controller's range; gripper"

_IN_OBSERVATION = ("observation/natural_language_instruction",)
_SQUARE = (256, 256)


def _views(size: Size = _SQUARE, **fields: str) -> dict[str, Mapping]:
    """``views`` and ``image_sizes`` of cameras in the observation, all tokenized at one size."""
    paths = {view: f"observation/{field}" for view, field in fields.items()}
    return {"views": paths, "image_sizes": dict.fromkeys(paths, size)}


def _libero(name: str) -> DatasetConfig:
    """LIBERO without its no-op steps, as RLDS; raw actions."""
    return DatasetConfig(
        name,
        **_views((200, 200), image="image", wrist_image="wrist_image"),
        control_hz=20.0,
        frame_spacing=10,
        action_units=_SCALED,
        gripper=_CLOSED_1,
    )


def _driving(name: str, size: Size | None, **changes) -> DatasetConfig:
    """NAVSIM logs: the front camera now and a second ago, motions at 2 Hz (``data/navsim.py``)."""
    views = {"image": "CAM_F0", "previous_image": "CAM_F0/1s_before"}
    return DatasetConfig(
        name,
        views=views,
        image_sizes=dict.fromkeys(views, size) if size else {},
        control_hz=2.0,
        frame_spacing=2,
        instruction=("command",),
        actions=action_conventions.action_field("motions"),
        state="ego_status",
        min_frames=10,  # a moment, the second before it and the four seconds after it
        texts={kind: kind for kind in ("command", "token", "image")},
        action_units="movement in half a second: meters ahead and to the left, radians to the left",
        reader="navsim",
        **changes,
    )


def _video(name: str, **changes) -> DatasetConfig:
    """A folder of videos, of which five frames a second are taken, every one of them shown."""
    return DatasetConfig(
        name,
        views={"image": "video"},
        image_sizes={"image": _SQUARE},
        control_hz=5.0,
        frame_spacing=1,
        actions=action_conventions.no_actions,
        state=None,
        min_frames=6,
        reader="videos",
        **changes,
    )


def _grounding(name: str) -> DatasetConfig:
    """Pictures with boxes or points of phrases; each an episode of one step without actions."""
    return DatasetConfig(
        name,
        views={"image": "image"},
        image_sizes={"image": _SQUARE},
        control_hz=1.0,
        frame_spacing=1,
        actions=action_conventions.no_actions,
        state=None,
        min_frames=1,
        reader="grounding",
    )


_BUILT_IN = (
    DatasetConfig(
        "tabletop",
        views={"image": "observation/image", "wrist_image": "observation/wrist_image"},
        control_hz=5.0,
        frame_spacing=5,
        action_units="movement of the gripper per step, -1 to 1 of its greatest speed; gripper",
        annotations={kind: f"annotation/{kind}" for kind in ("question", "answer", "reasoning")},
        groundings="annotation/groundings",
    ),
    _libero("libero"),  # the four suites as one corpus with joint statistics, as published
    _libero("libero_spatial"),
    _libero("libero_object"),
    _libero("libero_goal"),
    _libero("libero_10"),
    *map(_grounding, ("refcoco", "refcoco_plus", "refcocog", "grounding")),
    DatasetConfig(
        "calvin",
        views={"image": "rgb_static", "wrist_image": "rgb_gripper"},
        image_sizes={"image": (200, 200), "wrist_image": (80, 80)},
        control_hz=30.0,
        frame_spacing=10,
        actions=action_conventions.action_field("rel_actions"),
        action_units=_SCALED,
        gripper="1 open, -1 closed",
        state="robot_obs",
        mixture_weight=0.8,
        reader="calvin",
    ),
    DatasetConfig(
        "bridge",
        **_views(image="image_0", side_image="image_1"),
        policy_views=("image",),
        control_hz=5.0,
        frame_spacing=5,
        metadata={"file": "episode_metadata/file_path"},
        actions=action_conventions.reached_movement,
        action_units=_MOVEMENT,
        gripper=_OPEN_1,
        min_frames=5,
        trim=(1, 1),
    ),
    DatasetConfig(
        "fractal",
        **_views((192, 240), image="image"),
        control_hz=3.0,
        frame_spacing=3,
        instruction=_IN_OBSERVATION,
        actions=action_conventions.relative_gripper,
        action_units=_MOVEMENT,
        gripper=_OPEN_1,
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
        world_model_views=("image", "side_image", "wrist_image"),
        control_hz=15.0,
        frame_spacing=15,
        instruction=(
            "language_instruction",
            "language_instruction_2",
            "language_instruction_3",
        ),
        metadata={"file": "episode_metadata/file_path"},
        actions=action_conventions.cartesian_velocity,
        action_units="velocity of the hand as commanded, six numbers; gripper",
        gripper=_OPEN_1,
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
        action_units=_MOVEMENT,
        gripper=_OPEN_1,
    ),
    DatasetConfig(
        "taco_play",
        **_views(image="rgb_static", wrist_image="rgb_gripper"),
        control_hz=15.0,
        frame_spacing=5,
        instruction=_IN_OBSERVATION,
        actions=action_conventions.clipped_world_actions,
        action_units=_SCALED,
        gripper="0...1; which end is open differs between sources: look at the data",
        state="observation/robot_obs",
    ),
    DatasetConfig(
        "fmb",
        **_views(image="image_side_1"),
        control_hz=10.0,
        frame_spacing=5,
        action_units="six numbers of the hand as recorded; gripper",
        state="observation/eef_pose",
    ),
    DatasetConfig(
        "maniskill",
        **_views(image="image", wrist_image="wrist_image"),
        control_hz=20.0,
        frame_spacing=10,
        mixture_weight=0.5,
        action_units=_SCALED,
        gripper="1 open, -1 closed",
    ),
    DatasetConfig(
        "kuka",
        **_views(image="image"),
        control_hz=10.0,
        frame_spacing=3,
        instruction=_IN_OBSERVATION,
        actions=action_conventions.relative_gripper,
        action_units=_MOVEMENT,
        gripper=_OPEN_1,
        state=None,
        mixture_weight=0.1,
    ),
    DatasetConfig(
        "berkeley_autolab_ur5",
        **_views(image="image", wrist_image="hand_image"),
        bgr_views=("wrist_image",),
        control_hz=5.0,
        frame_spacing=5,
        instruction=_IN_OBSERVATION,
        actions=action_conventions.relative_gripper,
        action_units=_MOVEMENT,
        gripper=_OPEN_1,
        state="observation/robot_state",
    ),
    DatasetConfig(
        "cmu_play_fusion",
        **_views(image="image"),
        control_hz=5.0,
        frame_spacing=10,
        actions=action_conventions.without_terminate,
        action_units="pose of the hand as commanded: seven numbers; gripper",
        gripper="as commanded",
    ),
    DatasetConfig(
        "viola",
        **_views(image="agentview_rgb", wrist_image="eye_in_hand_rgb"),
        control_hz=20.0,
        frame_spacing=15,
        instruction=_IN_OBSERVATION,
        actions=action_conventions.inverted_closedness,
        action_units=_MOVEMENT,
        gripper=_OPEN_1,
        state="observation/joint_states",
    ),
    DatasetConfig(
        "utaustin_mutex",
        **_views(image="image", wrist_image="wrist_image"),
        bgr_views=("image", "wrist_image"),
        control_hz=20.0,
        frame_spacing=10,
        actions=action_conventions.inverted_gripper,
        action_units=_SCALED,
        gripper=_OPEN_1,
    ),
    DatasetConfig(
        "aloha",
        views={
            view: f"observation.images.{view}"
            for view in ("cam_high", "cam_left_wrist", "cam_right_wrist")
        },
        image_sizes=dict.fromkeys(("cam_high", "cam_left_wrist", "cam_right_wrist"), (128, 128)),
        control_hz=50.0,
        frame_spacing=50,
        instruction=("task",),
        action_units="poses of both hands: meters, roll, pitch and yaw in radians; gripper",
        gripper="dimensions 6 and 13, as measured",
        state="observation.state",
        min_frames=20,
        chunk_deltas=action_conventions.ALOHA_DELTAS,
        reader="lerobot",
    ),
    DatasetConfig(
        "aloha_sim",  # demonstrations of gym-aloha's tasks
        **_views(**{view: view for view in ("cam_high", "cam_left_wrist", "cam_right_wrist")}),
        control_hz=50.0,
        frame_spacing=25,
        action_units="poses of both hands: meters, roll, pitch and yaw in radians; gripper",
        gripper="dimensions 6 and 13, as commanded, 1 when open",
        # Quantiles would cut off the farthest reaches. Turns stay radians: each axis in a range of
        # its own, those that only tremble would be written as finely as those that turn.
        normalization=(*(MIN_MAX,) * 3, *(IDENTITY,) * 3, MIN_MAX) * 2,
        min_frames=25,
        chunk_deltas=action_conventions.ALOHA_DELTAS,
    ),
    DatasetConfig(
        "calvin_sim",  # scripted demonstrations in CALVIN's scene D
        **_views(image="image", wrist_image="wrist_image"),
        control_hz=30.0,
        frame_spacing=10,
        action_units=_SCALED,
        gripper="1 open, -1 closed",
        # They are within -1 to 1 already. Quantiles would blow up the turns of most tasks, which
        # only tremble.
        normalization=(IDENTITY,) * 7,
    ),
    _driving("navsim", (144, 256)),
    # Quantiles would cut off its sharpest turns, which are rare; simulated, it has no outliers.
    _driving("road", None, normalization=(MIN_MAX, MIN_MAX, MIN_MAX)),
    _video("something_something"),
    _video("1x", default_instruction="a robot moves through a building"),
)

DATASETS: dict[str, DatasetConfig] = {config.name: config for config in _BUILT_IN}
"""All known datasets by name."""


def register_dataset(config: DatasetConfig) -> None:
    """Makes a dataset known under ``config.name`` without editing the package.

    Call it in a module that every config file of the dataset imports, so that tokenizing, fitting
    and training all know it. Registering a name again replaces the earlier one.

    Raises:
      UserError: a built-in dataset has that name.
    """
    if any(config.name == built_in.name for built_in in _BUILT_IN):
        raise UserError(f"dataset {config.name!r} is built in; choose another name")
    DATASETS[config.name] = config


def find_dataset_config(name: str) -> DatasetConfig:
    """The dataset called ``name``.

    Raises:
      UserError: there is none; suggests the nearest name.
    """
    if name in DATASETS:
        return DATASETS[name]
    hint = name_hint(name, DATASETS, "known")
    raise UserError(
        f"unknown dataset {name!r}; {hint}; to add one, see univla_jax/data/datasets.py"
    )


def chunk_deltas(corpus: str) -> action_conventions.ChunkDeltas | None:
    """How action chunks of a corpus are relative to their first pose; None where they are not.

    A corpus that is no dataset here, such as one of a converted checkpoint, has none.
    """
    dataset = DATASETS.get(corpus)
    return None if dataset is None else dataset.chunk_deltas


def normalization_kinds(key: str) -> tuple[str, ...]:
    """How the actions of a corpus are normalized, per dimension; empty for quantiles of all.

    Args:
      key: name of the corpus. States, which have a ``state_key``, have quantiles.
    """
    dataset = DATASETS.get(key)
    return () if dataset is None else dataset.normalization


# ----------------------------------------------------------------------------
# Shared by the readers of all file formats: from raw fields to an ``Episode``, and splits.
#
# Axes: T steps, H/W image height and width.


def build_episode(
    dataset: DatasetConfig,
    steps: Steps,
    frames: Mapping[str, np.ndarray],
    episode_id: str,
    metadata: Mapping[str, Any] | None = None,
) -> Episode:
    """An episode in the dataset's conventions.

    Args:
      dataset: says which field is what.
      steps: path -> [T, ...]; texts as objects.
      frames: per view uint8 [T, H, W, 3].
      episode_id: unique in the dataset.
      metadata: what ``DatasetConfig.metadata`` names, as plain values.

    Raises:
      KeyError: a field is missing.
      ValueError: a field that is no number, no text or of another rank, or fields whose steps
        differ in number.
    """
    # The action function sees the whole episode and leaves out the steps of ``trim`` itself: a
    # relative gripper, for example, needs the commands before the first step that is kept. All
    # other fields are cut here.
    (start, end), stride = dataset.trim, dataset.frame_stride
    actions = _numbers("actions", dataset.actions(steps))[::stride]
    kept = np.ones(len(actions), bool) if dataset.idle_steps is None else _moving(dataset, actions)

    def trimmed(name: str, values: Any) -> Any:
        values = values[start : len(values) - end][::stride]
        if len(values) != len(kept):
            raise ValueError(f"{len(kept)} actions for {len(values)} steps of {name}")
        return values if kept.all() else values[kept]

    shown = {view: trimmed(f"view {view!r}", array) for view, array in frames.items()}
    shown |= {view: np.ascontiguousarray(shown[view][..., ::-1]) for view in dataset.bgr_views}
    texts = (decode_text(steps[path][0]) for path in dataset.instruction if path in steps)
    instruction, *paraphrases = dict.fromkeys(t for t in texts if t.strip()) or (
        dataset.default_instruction,
    )
    state = None if dataset.state is None else _numbers(dataset.state, steps[dataset.state])
    paths = dataset.texts | {k: path for k, path in dataset.annotations.items() if path in steps}

    def step_texts(path: str) -> tuple[str, ...]:
        return tuple(map(decode_text, trimmed(f"{path!r}", np.asarray(steps[path], object))))

    return Episode(
        instruction=instruction,
        paraphrases=tuple(paraphrases),
        metadata=dict(metadata or {}),
        frames=shown,
        actions=actions[kept],
        control_hz=dataset.control_hz / stride,
        corpus=dataset.name,
        episode_id=episode_id,
        state=None if state is None else trimmed(f"{dataset.state!r}", state),
        texts={kind: step_texts(path) for kind, path in paths.items()},
        groundings=step_texts(dataset.groundings) if dataset.groundings in steps else (),
    )


def _numbers(name: str, values: Any) -> np.ndarray:
    """A field as float32 [T, N]; one number per step is N = 1."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds {array.dtype}, no numbers")
    if array.ndim not in (1, 2):
        raise ValueError(f"{name} has the shape {list(array.shape)}, expected [T, N]")
    with np.errstate(over="ignore"):  # becomes infinite, which validation notices
        return np.asarray(array[:, None] if array.ndim == 1 else array, np.float32)


def _moving(dataset: DatasetConfig, actions: np.ndarray) -> np.ndarray:
    """Which steps are not idle, bool [T]."""
    idle = np.asarray(dataset.idle_steps(actions))
    if idle.shape != (len(actions),) or idle.dtype != bool:
        raise ValueError(
            f"idle_steps gives {idle.dtype}{list(idle.shape)} for {len(actions)} steps"
        )
    return ~idle


def split_range(split: str, sizes: Mapping[str, int], where: pathlib.Path) -> tuple[str, range]:
    """Parses a split in TFDS notation, for formats that TFDS does not read.

    Args:
      split: such as ``"train"``, ``"train[:95%]"`` or ``"train[10:20]"``.
      sizes: split name -> number of episodes.
      where: the dataset's folder, for messages.

    Returns:
      name of the split, and the indices of its episodes.

    Raises:
      UserError: another notation, an unknown split, or no episodes in it.
    """
    found = re.fullmatch(r"([^\[\]]+)(?:\[(\d*%?):(\d*%?)\])?", split)
    if found is None or found[1] not in sizes:
        raise UserError(f"{where} has no split {split!r}; it has {', '.join(sizes) or 'none'}")
    size = sizes[found[1]]

    def bound(text: str | None) -> int | None:
        if not text:
            return None
        return round(size * int(text[:-1]) / 100) if text.endswith("%") else int(text)

    indices = range(size)[bound(found[2]) : bound(found[3])]
    if not indices:
        raise UserError(f"{where}: split {split!r} holds no episodes")
    return found[1], indices


def absolute_dims(corpus: str, action_dim: int) -> tuple[int, ...]:
    """Dimensions of a corpus' actions that command a value; see ``DatasetConfig``."""
    dataset = DATASETS.get(corpus)
    if dataset is not None and dataset.absolute_dims is not None:
        return dataset.absolute_dims
    if dataset is not None and dataset.chunk_deltas is not None:
        return tuple(range(action_dim))
    return (action_dim - 1,)
