"""Assets of a converted checkpoint: what a model folder contains, and what a config adds.

The published checkpoints are weights and a text tokenizer. How camera frames become codes, what the
actions mean and how sequences are laid out was code around them; here it is ``ConvertConfig``
(``configs/official.py``), recorded in the checkpoint's assets once.
"""

from __future__ import annotations

import base64
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from univla_jax.assets import Assets, LazyVisionTokenizer
from univla_jax.errors import UserError
from univla_jax.interop.hf_folder import SINGLE, HfFolder
from univla_jax.interop.hf_weights import HfModel
from univla_jax.interop.tensor_io import FLOAT_DTYPES, StoredTensor, parse_header, read_header
from univla_jax.io import parse_json, read_files
from univla_jax.normalization import ActionStatistics, state_key
from univla_jax.tasks import TASK_NAMES, CorpusRecord, TaskRecord, task_class
from univla_jax.tasks.base import Needs
from univla_jax.tokenizers.action import load_action_tokenizer
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.tokenizers.text import RANK_FILE, TextTokenizer, TiktokenTextTokenizer
from univla_jax.tokenizers.vision import CONFIG_FILE, PARAMS_FILE, fingerprint_of
from univla_jax.tokenizers.vision_vq import VisionConfig
from univla_jax.tokenizers.vocabulary import Vocabulary

# ----------------------------------------------------------------------------
# Text tokenizer and vocabulary of the Emu3 family.

TOKENIZER = "tokenizer.json"
# Special tokens that precede the vision tokens: three of the chat format and 205 extras.
_PLAIN_SPECIALS = 208
_FIRST_CODE = "<|visual token 000000|>"
_CODE = "<|visual token "
_SPECIAL_TOKENS = {
    "pad": "<|endoftext|>",
    "bot": "<|extra_196|>",
    "eot": "<|extra_197|>",
    "boa": "<|extra_198|>",
    "eoa": "<|extra_199|>",
    "eol": "<|extra_200|>",
    "eof": "<|extra_201|>",
    "bos": "<|extra_203|>",
    "eos": "<|extra_204|>",
    "img": "<|image token|>",
    "boi": "<|image start|>",
    "eoi": "<|image end|>",
}
_UNIVERSAL_FAST_SIZE = 2048  # where the folder's own action tokenizer is not known
# Ids that a config.json may repeat -> field of Vocabulary.
_REPEATED_IDS = {f"{name}_token_id": name for name in (*_SPECIAL_TOKENS, "bov", "eov")}


def load_hf_text(folder: pathlib.Path) -> TiktokenTextTokenizer | None:
    """The text tokenizer of a folder: Emu3's own two files, else ``tokenizer.json``, else None.

    Raises:
      UserError: files that are there but broken.
    """
    if (folder / RANK_FILE).is_file():
        return TiktokenTextTokenizer.load(folder)
    if (folder / TOKENIZER).is_file():
        return TiktokenTextTokenizer(*_from_tokenizers(folder / TOKENIZER))
    return None


def _from_tokenizers(path: pathlib.Path) -> tuple[bytes, bytes]:
    """Contents of Emu3's two tokenizer files, out of the ``tokenizer.json`` of ``transformers``.

    ``transformers`` turned the tiktoken ranks into a byte-level BPE whose ids are the same ranks,
    so nothing is lost. Bytes are spelled there in GPT-2's printable characters. The pattern that
    splits words is not in the file; ``TiktokenTextTokenizer`` has Emu3's own.
    """
    values = parse_json(path.read_bytes(), where=str(path))
    try:
        special = {token["id"]: token["content"] for token in values["added_tokens"]}
        vocabulary = values["model"]["vocab"]
        # Ids in order: ranks of byte sequences, plain specials, vision tokens.
        first = min(special)
        ranked = sorted((rank, token) for token, rank in vocabulary.items() if rank < first)
        lines = [f"{_base64(token)} {rank}\n" for rank, token in ranked]
        vision = [special[i] for i in sorted(special) if i >= first + _PLAIN_SPECIALS]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not the tokenizer of an Emu3 model ({type(error).__name__}: {error}); give a "
            f"folder with {RANK_FILE} as --config.text"
        ) from error
    return "".join(lines).encode(), ("\n".join(vision) + "\n").encode()


def _base64(token: str) -> str:
    """Base64 of the bytes that a token in GPT-2's characters stands for."""
    return base64.b64encode(bytes(_BYTES[character] for character in token)).decode()


# GPT-2's table (``openai/gpt-2:src/encoder.py``, bytes_to_unicode): printable bytes stand for
# themselves, the others for the characters from 256 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}


def vocabulary_of(text: TiktokenTextTokenizer, action_size: int | None = None) -> Vocabulary:
    """The vocabulary around a text tokenizer of the Emu3 family.

    Args:
      text: the tokenizer; for the published files the result is ``Vocabulary.emu3(action_size)``.
      action_size: codes of the action tokenizer; None leaves room for the universal FAST.

    Raises:
      UserError: the tokenizer lacks a special token.
    """
    ids = text.special_tokens
    lacking = [name for name in (*_SPECIAL_TOKENS.values(), _FIRST_CODE) if name not in ids]
    if lacking:
        raise UserError(
            f"the text tokenizer lacks {', '.join(lacking)}; is it that of an Emu3 model?"
        )
    return Vocabulary(
        size=text.total_size,
        text_size=text.vocabulary_size,
        visual_start=ids[_FIRST_CODE],
        visual_size=sum(name.startswith(_CODE) for name in ids),
        action_size=action_size or min(_UNIVERSAL_FAST_SIZE, text.vocabulary_size),
        action_last=text.vocabulary_size - 1,
        **{name: ids[token] for name, token in _SPECIAL_TOKENS.items()},
    )


def check_vocabulary(vocabulary: Vocabulary, config: Mapping[str, Any], where: str) -> None:
    """Compares a text tokenizer's vocabulary with the config.json of the weights.

    Raises:
      UserError: another number of ids, or a special token of another id.
    """
    values = config.get("text_config", config)
    size = values.get("vocab_size", vocabulary.size)
    if size != vocabulary.size:
        raise UserError(
            f"the text tokenizer in {where} has {vocabulary.size} ids, config.json says vocab_size "
            f"{size}; give the tokenizer of this model as --config.text"
        )
    for name, ours in _REPEATED_IDS.items():
        if isinstance(values.get(name), int) and values[name] != getattr(vocabulary, ours):
            raise UserError(
                f"config.json says {name} {values[name]}, the text tokenizer in {where} has "
                f"{getattr(vocabulary, ours)}; give the tokenizer of this model as --config.text"
            )


# ----------------------------------------------------------------------------
# What a model folder does not say.

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
      task: one of ``tasks.TASK_NAMES`` that it was trained on; empty for a base model, whose
        checkpoint is there to train from.
      frames: moments a training sample had; the history of a video policy.
      chunk_size: steps of an action chunk.
      frame_spacing: steps between two frames of a world model.
      sequence_length: the most tokens a training sample had.
      control_hz: control rate in steps per second.
      corpus: name of the robot data it was trained on.
      views: per camera, in their order in a sequence, the fields of its ``ImageSpec``.
      statistics: mean, std, q01 and q99 of the raw actions, one number per dimension.
      statistics_file: the reference's ``norm_stats.json`` in their stead.
      state_statistics: the same numbers of the proprioceptive state, of a policy that was trained
        with it before each chunk.
    """

    text: str = ""
    vision: str = ""
    action: str = ""
    task: str = dataclasses.field(default="", metadata={"formerly": "layout"})
    frames: int = 1
    chunk_size: int = dataclasses.field(default=10, metadata={"formerly": "action_frames"})
    frame_spacing: int = 10
    sequence_length: int = 0
    control_hz: float = 10.0
    corpus: str = ""
    views: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    statistics_file: str = ""
    state_statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises UserError for an unknown task, or a state in one that has no place for it."""
        if self.task and self.task not in TASK_NAMES:
            raise UserError(f"config.task: {self.task!r}; expected one of {', '.join(TASK_NAMES)}")
        if self.state_statistics and not self.needs.state:
            raise UserError(f"config.state_statistics: {self.task!r} has no place for a state")

    @property
    def needs(self) -> Needs:
        """What the task needs; nothing of a base model."""
        return task_class(self.task).needs if self.task else Needs()

    def require(self) -> None:
        """Checks that a task comes with what acting and imagining need.

        Raises:
          UserError: naming the field.
        """
        needed = ["corpus", "views", "sequence_length", "vision"] if self.task else []
        needed += ["action"] if self.needs.action_tokens else []
        needed += ["statistics"] if self.needs.actions and not self.statistics_file else []
        for name in needed:
            if not getattr(self, name):
                raise UserError(
                    f"config.{name} is empty, but a checkpoint of the task {self.task!r} cannot "
                    f"do without; give --config.{name}=...{_HINTS.get(name, '')}"
                )


# ----------------------------------------------------------------------------
# The assets made of both.


def make_assets(
    folder: HfFolder, model: HfModel, config: ConvertConfig, own_vision: pathlib.Path | None
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
    # A folder of ``transformers`` brings its own vision tokenizer, converted a moment ago.
    if own_vision is not None and not config.vision:
        config = dataclasses.replace(config, vision=str(own_vision))
    config.require()
    if config.needs.action_expert and model.expert is None:
        raise UserError(
            f"config.task: {config.task!r}, but {folder.path} has no action expert (config.json: "
            "action_experts); choose a task without one"
        )
    text, where = _text(folder, config)
    action = load_action_tokenizer(config.action) if config.action else None
    vocabulary = vocabulary_of(text, None if action is None else action.vocabulary_size)
    check_vocabulary(vocabulary, folder.config, where)
    vision = _vision(config, own_vision)
    dtype = FLOAT_DTYPES[folder.tensors[model.state_rules[0].key].dtype]
    return Assets(
        vocabulary=vocabulary,
        text=text,
        vision=vision,
        action=action,
        image_specs=_image_specs(config, vision),
        statistics=statistics_of(config),
        task=_task_record(config, vision),
        model=dataclasses.asdict(dataclasses.replace(model.decoder, dtype=dtype)),
        action_expert=dataclasses.asdict(model.expert) if model.expert else {},
    )


def _text(folder: HfFolder, config: ConvertConfig) -> tuple[TextTokenizer, str]:
    source = pathlib.Path(config.text).absolute() if config.text else folder.path
    text = load_hf_text(source)
    if text is None:
        raise UserError(
            f"{source}: no text tokenizer (emu3.tiktoken and emu3_vision_tokens.txt, or "
            "tokenizer.json); give the folder that has one as --config.text=DIR, or --weights_only "
            "for a checkpoint that can only be converted back"
        )
    return text, str(source)


def _vision(config: ConvertConfig, own: pathlib.Path | None) -> LazyVisionTokenizer | None:
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
    # The weights pass through the fingerprint tensor by tensor and are not kept.
    vision, tensors = read_vision(folder)
    weights = ((name, tensor.read()) for name, tensor in sorted(tensors.items()))
    return LazyVisionTokenizer(
        folder,
        fingerprint=fingerprint_of(vision, weights),
        codebook_size=vision.codebook_size,
        factor=vision.factor,
    )


def read_vision(folder: pathlib.Path) -> tuple[VisionConfig, dict[str, StoredTensor]]:
    """Config and tensors, by our path, of a vision tokenizer's folder; reads no tensor.

    Raises:
      UserError: a file is missing or broken.
    """
    content = read_files(folder, [CONFIG_FILE], what="vision tokenizer")[CONFIG_FILE]
    config = VisionConfig.from_dict(parse_json(content, where=f"{folder}/{CONFIG_FILE}"))
    file = folder / PARAMS_FILE
    return config, parse_header(read_header(file), file)


def _image_specs(config: ConvertConfig, vision: LazyVisionTokenizer | None) -> dict[str, ImageSpec]:
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
    if not values or not config.needs.actions:
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


def _task_record(config: ConvertConfig, vision: LazyVisionTokenizer | None) -> dict[str, Any]:
    """``tasks.TaskRecord`` as JSON values; empty for a base model."""
    if not config.task:
        return {}
    specs = _image_specs(config, vision)
    unsized = [view for view, spec in specs.items() if spec.size is None]
    if unsized:
        raise UserError(
            f"config.views.{unsized[0]}: no size; give the (height, width) it was trained on"
        )
    corpus = CorpusRecord(
        control_hz=config.control_hz,
        frame_spacing=config.frame_spacing,
        grids={view: spec.grid_size(*spec.size) for view, spec in specs.items()},
    )
    return TaskRecord(
        task=config.task,
        frames=config.frames,
        chunk_size=config.chunk_size,
        frame_spacing=config.frame_spacing,
        sequence_length=config.sequence_length,
        views=tuple(config.views),
        corpora={config.corpus: corpus},
        state=bool(config.state_statistics),
    ).to_json()
