"""A checkpoint or a vision tokenizer as a model folder of the hub, tensor by tensor.

What was converted from the hub goes back to the same bytes, file by file, in the names and shards
it came in. What was trained here gets the reference's names and shards of at most 5 GB.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from tqdm import tqdm

from univla_jax.assets import Assets
from univla_jax.checkpoints import ASSETS, STATE, find_checkpoint, saved_shapes
from univla_jax.config import build_config
from univla_jax.errors import UserError
from univla_jax.interop.hf_config import FLOATS, HfModel
from univla_jax.interop.hf_folder import CONFIG, INDEX, SINGLE, SOURCE, SourceRecord, local_path
from univla_jax.interop.key_table import (
    KeyRule,
    check_params,
    config_to_huggingface,
    decoder_rules,
    expert_config_to_huggingface,
    joint_rules,
)
from univla_jax.interop.tensor_files import (
    DTYPES,
    StateReader,
    StoredTensor,
    make_header,
    parse_header,
    write_safetensors,
)
from univla_jax.interop.vision_keys import foreign_tensor, vision_rules, vision_tensors
from univla_jax.io import dump_json, new_folder, parse_json
from univla_jax.models.action_expert import ActionExpertConfig
from univla_jax.models.decoder_config import DecoderConfig
from univla_jax.tokenizers.vision import PARAMS_FILE

_SHARD_BYTES = 5_000_000_000
_BLOCK_BYTES = 32 << 20
_PARAMS = "params"
_TYPES = {name: stored for stored, name in FLOATS.items()}
_IDS = ("pad", "bos", "eos", "img", "boi", "eoi", "eol", "eof", "boa", "bov", "eov")
_VISION_HEAD = {"architectures": ["Emu3VisionVQModel"], "model_type": "Emu3VisionVQ"}
_DECODER_HEAD = {"architectures": ["Emu3MoE"], "model_type": "Emu3"}


def to_hf(
    source: str | pathlib.Path,
    to: str | pathlib.Path,
    *,
    dtype: str = "",
    progress: bool = True,
) -> None:
    """Converts a checkpoint or tokenizer folder; the result appears whole or not at all.

    Args:
      source: a checkpoint, the workdir of a training, or the folder of a vision tokenizer.
      to: absent or empty folder.
      dtype: type of the weights of a model that was trained here, ``"bfloat16"`` for example; by
        default as they are stored.
      progress: whether to draw a progress bar.

    Raises:
      UserError: no such thing, or one that does not fit its own description; nothing is written.
    """
    source, to = local_path(source), local_path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to}: exists already; choose another --to_hf, or remove it")
    is_vision = (source / PARAMS_FILE).is_file()
    folder = source if is_vision else find_checkpoint(source)
    record = SourceRecord.load(folder / SOURCE)
    if record is not None and dtype:
        raise UserError("--dtype is for models trained here; this one goes back as it came")
    plan = _again(folder, record) if record else _trained(folder, is_vision, dtype)
    try:
        with new_folder(to) as part:
            plan.write(pathlib.Path(part), progress)
    except OSError as error:
        raise UserError(f"cannot write {to}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Export:
    """A model folder still to be written.

    Attributes:
      headers: header of each weight file, by file name.
      files: every other file, by name.
      rules: place of each tensor here.
      state: parameters of decoder and expert, or None.
      vision: tensors of the vision tokenizer by our path; empty where there is none.
    """

    headers: Mapping[str, bytes]
    files: Mapping[str, bytes]
    rules: Mapping[str, KeyRule]
    state: StateReader | None
    vision: Mapping[str, StoredTensor]

    def write(self, folder: pathlib.Path, progress: bool) -> None:
        """Writes all files; config.json comes last."""
        parts = {name: parse_header(header, folder / name) for name, header in self.headers.items()}
        total = sum(tensor.nbytes for part in parts.values() for tensor in part.values())
        with tqdm(
            total=total, unit="B", unit_scale=True, desc="convert", disable=not progress
        ) as bar:
            for name, part in parts.items():
                write_safetensors(
                    folder / name, self.headers[name], self._blocks(part.values(), bar.update)
                )
        for name in sorted(self.files, key=lambda name: name == CONFIG):
            (folder / name).write_bytes(self.files[name])

    def _blocks(
        self, tensors: Iterable[StoredTensor], done: Callable[[int], Any]
    ) -> Iterator[np.ndarray]:
        for tensor in tensors:
            rule = self.rules[tensor.name]
            for block in self._tensor(rule, DTYPES[tensor.dtype]):
                yield block
                done(block.nbytes)

    def _tensor(self, rule: KeyRule, dtype: np.dtype) -> Iterator[np.ndarray]:
        """The parts of one foreign tensor: blocks of rows where no axes are exchanged."""
        if rule.path in self.vision:
            yield foreign_tensor(rule, self.vision[rule.path], dtype)
            return
        path = f"{_PARAMS}/{rule.path}"
        if rule.layer is not None or rule.permutation:
            index = () if rule.layer is None else (rule.layer,)
            yield rule.to_foreign(self.state.read(path, index)).astype(dtype, copy=False)
            return
        count = rule.shape[0]
        rows = max(1, _BLOCK_BYTES * count // max(1, math.prod(rule.shape) * dtype.itemsize))
        for start in range(0, count, rows):
            block = self.state.read(path, (slice(start, min(start + rows, count)),))
            yield block.astype(dtype, copy=False)


def _again(folder: pathlib.Path, record: SourceRecord) -> Export:
    """The very folder that was converted."""
    config = parse_json(record.files[CONFIG], where=f"{folder}/{SOURCE}/files/{CONFIG}")
    parts = [parse_header(header, folder / name) for name, header in record.headers.items()]
    model = HfModel.of(config, [key for part in parts for key in part])
    state = _open_state(folder, model.state_rules) if model.state_rules else None
    vision: dict[str, StoredTensor] = {}
    if model.vision is not None:
        inside = folder if model.decoder is None else folder / ASSETS / "vision"
        found, vision = vision_tensors(inside)
        if found != model.vision:
            raise UserError(f"{inside} is another vision tokenizer than {SOURCE}/ tells of")
    rules = {rule.key: rule for rule in (*model.state_rules, *model.vision_rules)}
    return Export(record.headers, record.files, rules, state, vision)


def _trained(folder: pathlib.Path, is_vision: bool, dtype: str) -> Export:
    """What was made here, in the reference's names."""
    if is_vision:
        config, vision = vision_tensors(folder)
        rules = vision_rules(config)
        values = {**_VISION_HEAD, **config.to_dict()}
        stored = {rule.key: vision[rule.path].dtype for rule in rules}
        counters = {rule.key: "I64" for rule in rules if rule.path.endswith("/count")}
        return _export(values, {}, rules, {**stored, **counters}, None, vision)
    assets = Assets.load(folder / ASSETS)
    decoder = build_config(DecoderConfig, assets.model, where="assets.model")
    rules = decoder_rules(decoder)
    values = {**_DECODER_HEAD, **config_to_huggingface(decoder)}
    if assets.action_expert:
        expert = build_config(ActionExpertConfig, assets.action_expert, where="assets")
        rules = joint_rules(expert, decoder)
        values |= expert_config_to_huggingface(expert, decoder.hidden_size)
    state = _open_state(folder, rules)
    stored = {rule.key: _stored_type(state, rule, dtype) for rule in rules}
    values |= {f"{name}_token_id": getattr(assets.vocabulary, name) for name in _IDS}
    values["torch_dtype"] = FLOATS[stored[rules[0].key]]
    text = {path.name: path.read_bytes() for path in (folder / ASSETS / "text").iterdir()}
    return _export(values, text, rules, stored, state, {})


def _stored_type(state: StateReader, rule: KeyRule, dtype: str) -> str:
    """Safetensors' name of the dtype a tensor is written in."""
    name = dtype or state.array(f"{_PARAMS}/{rule.path}").dtype.name
    if name not in _TYPES:
        raise UserError(f"--dtype={name}: expected one of {', '.join(_TYPES)}")
    return _TYPES[name]


def _open_state(folder: pathlib.Path, rules: Sequence[KeyRule]) -> StateReader:
    """The parameters of a checkpoint, after comparing their shapes with the table."""
    prefix = f"{_PARAMS}/"
    shapes = {
        name.removeprefix(prefix): jax.ShapeDtypeStruct(shape, np.float32)
        for name, shape in saved_shapes(folder).items()
        if name.startswith(prefix)
    }
    check_params(rules, flax.traverse_util.unflatten_dict(shapes, sep="/"), where=str(folder))
    return StateReader(folder / STATE)


def _export(
    config: Mapping[str, Any],
    files: Mapping[str, bytes],
    rules: Sequence[KeyRule],
    stored: Mapping[str, str],
    state: StateReader | None,
    vision: Mapping[str, StoredTensor],
) -> Export:
    """Shares the tensors out among files of at most 5 GB."""
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    sizes = [0]
    for rule in rules:
        nbytes = math.prod(rule.shape) * DTYPES[stored[rule.key]].itemsize
        if shards[-1] and sizes[-1] + nbytes > _SHARD_BYTES:
            shards.append({})
            sizes.append(0)
        shards[-1][rule.key] = stored[rule.key], rule.shape
        sizes[-1] += nbytes
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = names if count > 1 else [SINGLE]
    files = {**files, CONFIG: dump_json(config)}
    if count > 1:
        places = {key: name for name, shard in zip(names, shards) for key in shard}
        files[INDEX] = dump_json({"metadata": {"total_size": sum(sizes)}, "weight_map": places})
    headers = {name: make_header(shard) for name, shard in zip(names, shards)}
    return Export(headers, files, {rule.key: rule for rule in rules}, state, vision)
