"""The assets of a converted checkpoint: what a model folder holds, and what has to be added.

The published checkpoints are weights and a text tokenizer. How camera frames become codes, what the
actions mean and what the sequences look like was code around them; here it is a config
(``configs/official.py``), and it goes into the checkpoint's assets once.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from univla_jax.data.actions import ActionStatistics, state_key
from univla_jax.errors import UserError
from univla_jax.interop.architectures import FLOATS, HubModel
from univla_jax.interop.hub_folder import SINGLE, HubFolder
from univla_jax.interop.hub_text import check_vocabulary, load_hub_text, vocabulary_of
from univla_jax.interop.vision_files import open_vision
from univla_jax.sequences.data_config import LAYOUTS, WITH_STATE
from univla_jax.tokenizers.action import load_action_tokenizer
from univla_jax.tokenizers.assets import Assets
from univla_jax.tokenizers.files import parse_json
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.tokenizers.stored_vision import StoredVision
from univla_jax.tokenizers.text import TextTokenizer
from univla_jax.tokenizers.vision import PARAMS_FILE

_HINTS = {
    "vision": ", the folder of a converted vision tokenizer",
    "action": ", the folder of the FAST tokenizer it was trained with",
}


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """What a model folder does not say. A base model needs none of it.

    Attributes:
      text: folder of the text tokenizer; empty takes the model folder's own.
      vision: folder of a converted vision tokenizer.
      action: folder of the action tokenizer.
      layout: ``"policy_video"``, ``"policy_image"``, ``"policy_flow"`` (of a model with an action
        expert) or ``"world_model"``; empty for a base model, whose checkpoint is there to train
        from.
      frames: moments a training sample had; the history of a video policy.
      action_frames: steps of an action chunk.
      frame_spacing: steps between two frames of a world model.
      sequence_length: the most tokens a training sample had.
      control_hz: control rate in steps per second.
      corpus: name of the robot data it was trained on.
      views: per camera, in the order they are written, the fields of its ``ImageSpec``.
      statistics: mean, std, q01 and q99 of the raw actions, one number per dimension.
      statistics_file: the reference's ``norm_stats.json`` in their stead.
      state_statistics: the same numbers of the proprioceptive state, of a policy that was trained
        with it before each chunk.
    """

    text: str = ""
    vision: str = ""
    action: str = ""
    layout: str = ""
    frames: int = 1
    action_frames: int = 10
    frame_spacing: int = 10
    sequence_length: int = 0
    control_hz: float = 10.0
    corpus: str = ""
    views: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    statistics_file: str = ""
    state_statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises UserError for an unknown layout, or a state in one that has no place for it."""
        if self.layout and self.layout not in LAYOUTS:
            raise UserError(f"config.layout: {self.layout!r}; expected one of {', '.join(LAYOUTS)}")
        if self.state_statistics and self.layout not in WITH_STATE:
            raise UserError(f"config.state_statistics: {self.layout!r} has no place for a state")

    def require(self) -> None:
        """Checks that a layout comes with what acting and imagining need.

        Raises:
          UserError: naming the field.
        """
        needed = ["corpus", "views", "sequence_length", "vision"] if self.layout else []
        if self.layout.startswith("policy"):
            needed += [] if self.layout == "policy_flow" else ["action"]
            needed += [] if self.statistics_file else ["statistics"]
        for name in needed:
            if not getattr(self, name):
                raise UserError(
                    f"config.{name} is empty, but a checkpoint of layout {self.layout!r} cannot do "
                    f"without; give --config.{name}=...{_HINTS.get(name, '')}"
                )


def make_assets(
    folder: HubFolder, model: HubModel, config: ConvertConfig, own_vision: pathlib.Path | None
) -> Assets:
    """The assets of a decoder's checkpoint.

    Args:
      folder: the model folder.
      model: what it holds.
      config: what it does not hold.
      own_vision: the converted vision tokenizer of this very folder, or None.

    Raises:
      UserError: a tokenizer is missing or belongs to another model, or settings that do not fit.
    """
    if own_vision is not None and not config.vision:
        config = dataclasses.replace(config, vision=str(own_vision))
    config.require()
    if config.layout == "policy_flow" and model.expert is None:
        raise UserError(
            f"config.layout: 'policy_flow', but {folder.path} has no action expert (config.json: "
            "action_experts); choose 'policy_image' or 'policy_video'"
        )
    text, where = _text(folder, config)
    action = load_action_tokenizer(config.action) if config.action else None
    vocabulary = vocabulary_of(text, None if action is None else action.vocabulary_size)
    check_vocabulary(vocabulary, folder.config, where)
    vision = _vision(config, own_vision)
    dtype = FLOATS[folder.tensors[model.state_rules[0].key].dtype]
    return Assets(
        vocabulary=vocabulary,
        text=text,
        vision=vision,
        action=action,
        image_specs=_image_specs(config, vision),
        statistics=statistics_of(config),
        layout=_layout(config, vision),
        model=dataclasses.asdict(dataclasses.replace(model.decoder, dtype=dtype)),
        action_expert=dataclasses.asdict(model.expert) if model.expert else {},
    )


def _text(folder: HubFolder, config: ConvertConfig) -> tuple[TextTokenizer, str]:
    place = pathlib.Path(config.text).absolute() if config.text else folder.path
    text = load_hub_text(place)
    if text is None:
        raise UserError(
            f"{place}: no text tokenizer (emu3.tiktoken and emu3_vision_tokens.txt, or "
            "tokenizer.json); give the folder that has one as --config.text=DIR, or --weights_only "
            "for a checkpoint that can only be converted back"
        )
    return text, str(place)


def _vision(config: ConvertConfig, own: pathlib.Path | None) -> StoredVision | None:
    if own is not None and config.vision != str(own):
        raise UserError(
            f"config.vision is {config.vision!r}, but the model folder has its own vision "
            "tokenizer; leave config.vision empty"
        )
    if not config.vision:
        return None
    folder = pathlib.Path(config.vision).absolute()
    if (folder / SINGLE).is_file() and not (folder / PARAMS_FILE).is_file():
        raise UserError(
            f"config.vision: {folder} is as the hub stores it; convert it first "
            f"(--from_hf={folder} --to=DIR) and give --config.vision=DIR"
        )
    return open_vision(folder)


def _image_specs(config: ConvertConfig, vision: StoredVision | None) -> dict[str, ImageSpec]:
    if vision is None:
        return {}
    return {
        view: ImageSpec.from_dict({"factor": vision.factor, **fields})
        for view, fields in config.views.items()
    }


def statistics_of(config: ConvertConfig) -> dict[str, ActionStatistics]:
    """Corpus -> statistics of its actions, and of its states; empty for what does not act.

    Raises:
      UserError: no such file, or broken statistics.
    """
    values = config.statistics
    if config.statistics_file:
        file = pathlib.Path(config.statistics_file)
        if not file.is_file():
            raise UserError(f"config.statistics_file: no file {file}")
        values = norm_stats(file.read_bytes(), str(file))
    if not values or not config.layout.startswith("policy"):
        return {}
    found = {config.corpus: values, state_key(config.corpus): config.state_statistics}
    return {key: ActionStatistics.from_dict(given) for key, given in found.items() if given}


def norm_stats(content: bytes, where: str) -> Mapping[str, Any]:
    """mean, std, q01 and q99 of ``{"norm_stats": {<robot>: {...}}}`` (normalize_pi0.py).

    Raises:
      UserError: not such a file, or one of several robots.
    """
    robots = parse_json(content, where=where).get("norm_stats")
    if not isinstance(robots, dict) or len(robots) != 1:
        raise UserError(f"{where}: expected norm_stats of one robot, as the reference writes it")
    return next(iter(robots.values()))


def _layout(config: ConvertConfig, vision: StoredVision | None) -> dict[str, Any]:
    """The record that ``inference.trained.Layout`` reads; empty for a base model."""
    if not config.layout:
        return {}
    specs = _image_specs(config, vision)
    unsized = [view for view, spec in specs.items() if spec.size is None]
    if unsized:
        raise UserError(
            f"config.views.{unsized[0]}: no size; give the (height, width) it was trained on"
        )
    return {
        "layout": config.layout,
        "frames": config.frames,
        "action_frames": config.action_frames,
        "frame_spacing": config.frame_spacing,
        "sequence_length": config.sequence_length,
        **({"state": True} if config.state_statistics else {}),
        "views": list(config.views),
        "corpora": {
            config.corpus: {
                "control_hz": config.control_hz,
                "frame_spacing": config.frame_spacing,
                "grids": {view: list(spec.grid_size(*spec.size)) for view, spec in specs.items()},
            }
        },
    }
