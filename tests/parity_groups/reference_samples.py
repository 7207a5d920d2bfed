"""Rebuilds the reference's dataset samples and prompts with the package's own functions.

One record of ``dataset.json`` (golden group 9) or ``prompts.json`` (group 10a) in, ids and labels
out. The record's arguments choose the task and the labels, as a recipe's config does in training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from univla_jax.errors import UserError
from univla_jax.sequences.frames import frame_block, frame_header, image_grammar, video_grammar
from univla_jax.sequences.tokens import LABELS, Role, TextEncoder, Tokens
from univla_jax.tasks import task_class
from univla_jax.tasks.base import Task, TaskSettings, window_frames

IGNORED = -100
ARM_VIEWS = ("cam_high", "cam_left_wrist", "cam_right_wrist")

Encode = Callable[[np.ndarray], np.ndarray]
"""Normalized actions [T, A] to action codes."""


class Scene:
    """The window of one recorded sample: codes, actions and words, cut as the reference cut it."""

    def __init__(self, record: Mapping, arrays: Mapping[str, np.ndarray]) -> None:
        """Finds the scene of ``record`` and the window its random start chose."""
        self.args = record["args"]
        self._arrays = arrays
        self._record = record
        self.spacing = record["action_frames_after"]
        scene, shift = self._find()
        self.name, self.text = scene["scene"], scene["text"]
        self.reasoning = scene.get("reasoning")
        steps = len(self._array(self.view_names()[0]))
        if not self.args["random_frame_sampling"]:
            steps = self.spacing * self.args["frames"]
        self.interleaved = self.args["video_format"] == "interleave"
        frames = self.args["frames"] if self.interleaved else 1
        if self.interleaved or steps >= self.spacing:
            self.length = self.spacing * window_frames(steps, frames, self.spacing)
        else:
            self.length = steps  # an image-mode episode shorter than one chunk
        self.start = shift + record["start_index"]

    def _find(self) -> tuple[Mapping, int]:
        """The scene, and the first step of the sliding window where those are used."""
        index = self._record["index"]
        if self.args["random_frame_sampling"]:
            return self._record["scenes"][index], 0
        size = self.spacing * self.args["frames"]
        for scene in self._record["scenes"]:
            count = scene["T"] - size + 1
            if index < count:
                return scene, index
            index -= count
        raise AssertionError("index beyond the sliding windows")

    def _array(self, key: str) -> np.ndarray:
        return np.asarray(self._arrays[f"{self.name}|{key}"])

    def view_names(self) -> tuple[str, ...]:
        """The cameras of the sample, in the order they are written."""
        if self._record["dataset"] == "Emu3RealRobotDataset":
            return ARM_VIEWS
        both = self.args["use_gripper"] and f"{self.name}|gripper_image" in self._arrays
        return ("image", "gripper_image") if both else ("image",)

    def views(self) -> list[np.ndarray]:
        """Per camera the codes [T, 5, 5] the sample shows."""
        cut = slice(self.start, self.start + self.length)
        codes = [self._array(name)[cut] for name in self.view_names()]
        if self.interleaved:
            return [c[:: self.spacing] for c in codes]
        return [c[: self.args["frames"]] for c in codes]

    def chunks(self, encode: Encode) -> list[np.ndarray]:
        """Action codes of each chunk."""
        actions = self._array("action")[self.start : self.start + self.length]
        size = self.spacing if self.interleaved else self.length
        return [encode(actions[i : i + size]) for i in range(0, self.length, size)]

    def actions(self) -> np.ndarray:
        """The actions float32 [T, A] of the window, as the continuous format returns them."""
        cut = slice(self.start, self.start + self.length)
        return self._array("action")[cut].astype(np.float32)

    def state(self, encode: Encode) -> np.ndarray | None:
        """Codes of the state where the image-mode sample has one."""
        if f"{self.name}|state" not in self._arrays or self._record["dataset"] != (
            "Emu3RealRobotDataset"
        ):
            return None
        return encode(self._array("state").reshape(1, -1))

    def thought(self) -> str:
        """The reasoning at the first step."""
        entry = self.reasoning[self.start]
        return entry["reasoning"] if isinstance(entry, dict) else entry


def sample_tokens(
    text_encoder: TextEncoder, record: Mapping, arrays: Mapping, encode: Encode
) -> Tokens:
    """The token sequence of one record, before padding."""
    scene, args = Scene(record, arrays), record["args"]

    def ids(codes: np.ndarray) -> np.ndarray:
        return text_encoder.vocabulary.action_ids(codes)

    def build(name: str, *parts: Any) -> Tokens:
        return make_task(name, text_encoder).build(text, views, *parts)

    text = "" if args["without_text"] and "World" in record["dataset"] else scene.text
    views = scene.views()
    acts = args["actions"] and record["dataset"] != "Emu3WorldModelDataset"
    if scene.interleaved:
        if not acts:
            return build("world_model")
        return build("policy_video", [ids(c) for c in scene.chunks(encode)])
    if args["VL"]:
        order = next(r for name, *_, r in record["random_calls"] if name == "random")
        # The reference's question has an empty answer: eos alone.
        return build("caption") if order < 0.5 else build("question", "")
    if not acts or args["actions_format"] == "text":
        return _without_boa(build("policy_flow"))
    if args["actions_format"] == "continuous":
        return build("policy_flow")
    (chunk,) = scene.chunks(encode)
    if record["dataset"] == "Emu3CoTDataset":
        return build("chain_of_thought", scene.thought(), ids(chunk))
    state = scene.state(encode)
    return build("policy_image", ids(chunk), None if state is None else ids(state))


def make_task(name: str, text_encoder: TextEncoder) -> Task:
    """A task that builds sequences from given codes."""
    return task_class(name)(TaskSettings(), text_encoder)


def _without_boa(tokens: Tokens) -> Tokens:
    """Without the final boa: the reference's text format appends no action at all."""
    return Tokens(tokens.ids[:-1], tokens.roles[:-1])


def labeled_roles(record: Mapping) -> frozenset[Role]:
    """The labeled roles behind the reference's flags (UniVLA train/datasets.py)."""
    args, dataset = record["args"], record["dataset"]
    only_action = args["apply_loss_on_only_action"]
    only_vision = args["apply_loss_on_only_vision"]
    if dataset == "Emu3WorldModelDataset":
        return LABELS["vision"] if only_vision else LABELS["both"]
    if args["video_format"] == "interleave":
        # Without actions the flag has no effect: every image block is labeled.
        return LABELS["action"] if only_action and args["actions"] else LABELS["both"]
    if only_action and args["actions"] and args["actions_format"] == "fast":
        return LABELS["action"]
    if dataset == "Emu3CoTDataset":
        return LABELS["all"] - {Role.VISION}
    return frozenset({Role.VISION, Role.ACTION}) if only_vision else LABELS["all"]


def dataset_sample(
    text_encoder: TextEncoder, record: Mapping, arrays: Mapping, encode: Encode
) -> dict[str, np.ndarray]:
    """``input_ids``, ``attention_mask`` and ``labels`` of one record, padded as the reference pads.

    A record with continuous actions has ``action`` too. The reference returns a too long
    image-mode sample unpadded; such a record is compared so.

    Raises:
      UserError: an episode shorter than a chunk, or an interleaved sample that is too long.
    """
    tokens = sample_tokens(text_encoder, record, arrays, encode)
    ids, length = tokens.ids, record["max_position_embeddings"]
    labeled = np.isin(tokens.roles, list(labeled_roles(record)))
    missing = length - len(ids)
    if missing < 0 and record["args"]["video_format"] == "interleave":
        raise UserError(f"a sample of {len(ids)} tokens does not fit {length}")
    padding = (0, max(missing, 0))
    padded = np.pad(ids, padding, constant_values=text_encoder.vocabulary.pad)
    sample = {
        "input_ids": padded,
        "attention_mask": np.pad(np.ones_like(ids), padding),
        "labels": np.where(np.pad(labeled, padding), padded, IGNORED),
    }
    if record["args"]["actions_format"] == "continuous":
        sample["action"] = Scene(record, arrays).actions()
    return sample


def prompt_rows(text_encoder: TextEncoder, record: Mapping, arrays: Mapping) -> list[np.ndarray]:
    """The prompts of one ``prompts.json`` record, one row of ids per text."""
    texts = record["text"] if isinstance(record["text"], list) else [record["text"]]
    video = np.asarray(arrays[f"{record['name']}|video_tokens"])
    video = video[None] if record["mode"].startswith("VLA2") else video
    gripper = arrays.get(f"{record['name']}|gripper_tokens")
    rows = []
    for i, text in enumerate(texts):
        rows.append(_prompt(text_encoder, record, text, video[i], _others(record, gripper, i)))
    return rows


def video_size(record: Mapping, arrays: Mapping) -> tuple[int, int, int]:
    """Rows, columns and frames to generate: as many as asked for, else as many as were given."""
    video = np.asarray(arrays[f"{record['name']}|video_tokens"])
    return *video.shape[-2:], record["kwargs"].get("frames") or video.shape[-3]


def _others(record: Mapping, gripper: np.ndarray | None, row: int) -> list[np.ndarray]:
    if gripper is None:
        return []
    if record["gripper_kind"] == "pair":
        return [gripper[0][row], gripper[1][row]]
    return [gripper if record["mode"].startswith("VLA2") else gripper[row]]


def _prompt(
    text_encoder: TextEncoder,
    record: Mapping,
    text: str,
    video: np.ndarray,
    others: list[np.ndarray],
) -> np.ndarray:
    task = functools.partial(make_task, text_encoder=text_encoder)
    mode, kwargs = record["mode"], record["kwargs"]
    shown, frames = kwargs.get("context_frames") or None, kwargs.get("frames")
    if shown is not None:
        shown = min(shown, len(video))
    views, (height, width) = [video, *others], video.shape[1:]
    if mode in ("VLA", "VLA2", "VLA_ALOHA"):
        return task("policy_image").build(text, views, frames_shown=shown).ids
    if mode in ("VLA_Video", "VLA2_Video", "VLA_VIDEO_ALOHA"):
        return task("policy_video").moment_prompt(views, frames_shown=shown)
    if mode == "VLA_COT":
        return task("chain_of_thought").build(text, views, frames_shown=shown).ids
    if mode == "G":
        if frames is None:
            return task("text_to_image").prompt(text, height, width)
        return task("caption").prompt(text, height, width, frames)
    if mode == "U":
        return task("question").build(text, views).ids
    if mode == "INTERLEAVE" and len(video) == frames == 1:
        return task("world_model").prompt(text, video)
    block = frame_block(text_encoder, video, shown=shown)
    parts = [task("world_model").opening(text), block]
    if mode == "INTERLEAVE":
        parts.append(frame_header(text_encoder, height, width, frames))
    return np.concatenate(parts)


def grammar_rows(
    text_encoder: TextEncoder, kind: str, height: int, width: int, frames: int, length: int
):
    """Rows [count, lowest, highest] of the ids allowed at each place after ``img``."""
    if kind == "video":
        forced = video_grammar(text_encoder, height, width, frames, length)
    else:
        forced = image_grammar(text_encoder, height, width, length)
    vocabulary = text_encoder.vocabulary
    free = [vocabulary.visual_size, vocabulary.bov, vocabulary.eov]
    return np.array([free if i < 0 else [1, i, i] for i in forced])
