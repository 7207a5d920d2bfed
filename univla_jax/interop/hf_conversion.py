"""Conversion between Hugging Face model folders and our checkpoints and vision tokenizers.

Weights go through one tensor at a time, in both directions.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from univla_jax.assets import Assets
from univla_jax.checkpoints import (
    ASSETS,
    STATE,
    FilesHandler,
    FilesSave,
    acting_names,
    find_checkpoint,
    saved_shapes,
)
from univla_jax.config import build_config
from univla_jax.errors import UserError
from univla_jax.interop.hf_assets import ConvertConfig, make_assets, read_vision
from univla_jax.interop.hf_folder import (
    CONFIG,
    INDEX,
    SINGLE,
    SOURCE,
    HfFolder,
    SourceRecord,
    decoder_config_to_hf,
    expert_config_to_hf,
    local_path,
    save_source,
)
from univla_jax.interop.hf_weights import (
    HfModel,
    KeyRule,
    append_zero_rows,
    check_buffers,
    check_params,
    decoder_rules,
    joint_rules,
    stacked_shapes,
    vision_rules,
)
from univla_jax.interop.merged_state import MergedState
from univla_jax.interop.tensor_io import (
    DTYPES,
    FLOAT_DTYPES,
    Block,
    StateReader,
    StoredTensor,
    StreamedArray,
    make_header,
    parse_header,
    streamed_state_handler,
    write_safetensors,
)
from univla_jax.io import dump_json, new_folder, parse_json
from univla_jax.models.action_expert import ActionExpertConfig
from univla_jax.models.decoder_config import DecoderConfig
from univla_jax.tokenizers.vision import CONFIG_FILE, PARAMS_FILE

Advance = Callable[[int], Any]  # called with the bytes of each block that was read


def from_hf(
    source: str | pathlib.Path,
    to: str | pathlib.Path,
    config: ConvertConfig,
    *,
    weights_only: bool = False,
    progress: bool = True,
) -> HfFolder:
    """Converts a folder; the result appears whole or not at all.

    A decoder becomes a checkpoint (``state/``, ``assets/``, ``source/``), which ``init_from`` of a
    training, a policy or a world model takes like any other. A vision tokenizer becomes a tokenizer
    folder. A folder with both becomes a checkpoint with the tokenizer in its assets.

    Args:
      source: the model folder.
      to: absent or empty folder.
      config: what the model folder does not contain.
      weights_only: leave out the assets; such a checkpoint can only be converted back.
      progress: whether to draw a progress bar.

    Returns:
      the model folder, checked.

    Raises:
      UserError: something wrong with the folder or the settings; nothing is written then.
    """
    # Everything that can be wrong is checked before the first byte is written: a conversion takes
    # minutes, and its errors should take seconds.
    hub = HfFolder.open(source)
    model = HfModel.from_config(hub.config, hub.tensors)
    model.check(hub.tensors, str(hub.path))
    check_buffers(hub.buffers, model)
    to = local_path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to}: exists already; choose another --to, or remove it")
    assets = None
    if model.vision is None and not weights_only:
        assets = make_assets(hub, model, config, own_vision=None)
    to.parent.mkdir(parents=True, exist_ok=True)
    total = sum(tensor.nbytes for tensor in hub.tensors.values())
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=not progress) as bar,
        _partial_folder(to) as partial,
    ):
        if model.vision is not None:
            _write_vision(partial, model, hub.tensors, bar.update)
        if model.decoder is None:
            save_source(partial / SOURCE, hub)
            partial.rename(to)
            return hub
        if model.vision is not None:
            assets = make_assets(hub, model, config, own_vision=partial)
        # Orbax writes all items under a temporary name, and its rename is the commit.
        state = {"params": state_arrays(model.state_rules, hub.tensors, bar.update)}
        items: dict[str, Any] = {
            STATE: ocp.args.PyTreeSave(state),
            SOURCE: FilesSave(lambda folder: save_source(folder, hub)),
        }
        if assets is not None:
            items[ASSETS] = FilesSave(assets.save)
        handlers = {name: FilesHandler() for name in items} | {STATE: streamed_state_handler()}
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as writer:
                writer.save(to, args=ocp.args.Composite(**items), force=True)
        except UserError:
            raise
        except (ValueError, RuntimeError) as error:  # as which TensorStore reports a full disk
            raise UserError(f"cannot write {to}: {error}") from error
    return hub


@contextlib.contextmanager
def _partial_folder(to: pathlib.Path) -> Iterator[pathlib.Path]:
    """A fresh folder name beside ``to``; whatever is unfinished at the end is removed.

    Removing at the start as well clears what a killed conversion left. At the end a thread of Orbax
    may still be writing after another one failed; the next conversion removes that.
    """
    partial = to.with_name(f".{to.name}.partial")

    def clear() -> None:
        for folder in (partial, *to.parent.glob(f"{to.name}.orbax-checkpoint-tmp*")):
            shutil.rmtree(folder, ignore_errors=True)

    clear()
    try:
        yield partial
    except OSError as error:
        raise UserError(f"cannot write {to}: {error}") from error
    finally:
        clear()


def state_arrays(
    rules: Sequence[KeyRule], tensors: Mapping[str, StoredTensor], advance: Advance
) -> dict[str, Any]:
    """The parameter tree of decoder and expert, with arrays that read their tensors when written.

    Args:
      rules: of all tensors.
      tensors: the tensors, checked.
      advance: called with the bytes of each block that was read.
    """
    by_path: dict[str, list[KeyRule]] = collections.defaultdict(list)
    for rule in rules:
        by_path[rule.path].append(rule)
    flat = {
        path: _streamed_array(shape, by_path[path], tensors, advance)
        for path, shape in stacked_shapes(rules).items()
    }
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _streamed_array(
    shape: tuple[int, ...],
    rules: Sequence[KeyRule],
    tensors: Mapping[str, StoredTensor],
    advance: Advance,
) -> StreamedArray:
    """One of our arrays, made of a single tensor or of one tensor per layer.

    Args:
      shape: of the whole array.
      rules: of its tensors.
      tensors: the tensors, checked.
      advance: called with the bytes of each block that was read.
    """
    # A matrix whose axes are exchanged comes as a whole tensor, 120 MB at the released sizes.
    # Embeddings and vectors keep their axes: the embeddings are 1.5 GB each, so they come in blocks
    # of rows as large as the chunks on disk, of which the last ones hold the zero rows of the
    # padding. Nothing is read before Orbax writes the array.
    first = rules[0]

    def whole_tensors() -> Iterator[Block]:
        for rule in rules:
            tensor = tensors[rule.key]
            yield () if rule.layer is None else (rule.layer,), rule.from_hf(tensor.read())
            advance(tensor.nbytes)

    def row_blocks() -> Iterator[Block]:
        tensor, count = tensors[first.key], first.our_shape[0]
        for start in range(0, count, array.chunks[0]):
            stop = min(start + array.chunks[0], count)
            block = tensor.read(start, stop)
            yield (slice(start, stop),), append_zero_rows(block, stop - start - len(block))
            advance(block.nbytes)

    stacked = first.layer is not None
    blocks = whole_tensors if stacked or first.permutation else row_blocks
    array = StreamedArray(shape, FLOAT_DTYPES[tensors[first.key].dtype], stacked, blocks)
    return array


def _write_vision(
    folder: pathlib.Path, model: HfModel, tensors: Mapping[str, StoredTensor], advance: Advance
) -> None:
    """Writes the files of ``VisionTokenizer.load``, in float32, tensor by tensor."""

    def blocks() -> Iterator[np.ndarray]:
        for rule in model.vision_rules:
            value = rule.from_hf(tensors[rule.key].read())
            yield value if rule.is_counter else value.astype(np.float32, copy=False)
            advance(tensors[rule.key].nbytes)

    header = make_header(
        {r.path: ("I32" if r.is_counter else "F32", r.our_shape) for r in model.vision_rules}
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / PARAMS_FILE, header, blocks())
    (folder / CONFIG_FILE).write_bytes(dump_json(model.vision.to_dict()))


# ----------------------------------------------------------------------------
# Conversion of a checkpoint or a vision tokenizer into a Hugging Face model folder.
#
# What was converted from such a folder gives the same bytes again, file by file. What was trained
# here gets the reference's names, in shards of at most 5 GB.


_SHARD_BYTES = 5_000_000_000
_BLOCK_BYTES = 32 << 20
_PARAMS = "params"
_STORED_NAMES = {name: stored for stored, name in FLOAT_DTYPES.items()}
_SPECIAL_IDS = ("pad", "bos", "eos", "img", "boi", "eoi", "eol", "eof", "boa", "bov", "eov")


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
      dtype: of the weights of a model that was trained here, ``"bfloat16"`` for example; by default
        as they are stored.
      progress: whether to draw a progress bar.

    Raises:
      UserError: no checkpoint or tokenizer there, or one that does not fit its own config; nothing
        is written then.
    """
    source, to = local_path(source), local_path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to}: exists already; choose another --to_hf, or remove it")
    is_vision = (source / PARAMS_FILE).is_file()
    folder = source if is_vision else pathlib.Path(find_checkpoint(source))
    record = SourceRecord.load(folder / SOURCE)
    if record is not None:
        if dtype:
            raise UserError("--dtype is for models trained here; this one goes back as it came")
        export = HfExport.of_converted(folder, record)
    elif is_vision:
        export = HfExport.of_vision(folder)
    else:
        export = HfExport.of_checkpoint(folder, dtype)
    try:
        with new_folder(to) as partial:
            export.write(pathlib.Path(partial), progress)
    except OSError as error:
        raise UserError(f"cannot write {to}: {error}") from error


@dataclasses.dataclass(frozen=True)
class HfExport:
    """A model folder still to be written: headers and small files, and where each tensor is.

    Attributes:
      headers: header of each weight file, by file name.
      files: every other file, by name.
      rules: of each tensor.
      state: parameters of decoder and expert, or None.
      vision: tensors of the vision tokenizer by our path; empty where there is none.
      buffers: bytes of tensors that are no weights, by their keys.
      averages: where the averages of parameters lie, for a run that has any.
    """

    headers: Mapping[str, bytes]
    files: Mapping[str, bytes]
    rules: Sequence[KeyRule]
    state: StateReader | MergedState | None = None
    vision: Mapping[str, StoredTensor] = dataclasses.field(default_factory=dict)
    buffers: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    averages: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_converted(cls, folder: pathlib.Path, record: SourceRecord) -> HfExport:
        """The folder that a checkpoint or tokenizer was converted from."""
        # The kept headers say which file holds which tensor, in which order and dtype; together
        # with the small files they leave nothing to choose, so the bytes come out the same.
        config = parse_json(record.files[CONFIG], where=f"{folder}/{SOURCE}/files/{CONFIG}")
        shards = [parse_header(header, folder / name) for name, header in record.headers.items()]
        keys = [key for shard in shards for key in shard if key not in record.buffers]
        model = HfModel.from_config(config, keys)
        state = _open_state(folder, model.state_rules) if model.state_rules else None
        vision: Mapping[str, StoredTensor] = {}
        if model.vision is not None:
            vision_folder = folder if model.decoder is None else folder / ASSETS / "vision"
            found, vision = read_vision(vision_folder)
            if found != model.vision:
                raise UserError(f"{vision_folder} is not the vision tokenizer of {SOURCE}/")
        rules = [*model.state_rules, *model.vision_rules]
        return cls(record.headers, record.files, rules, state, vision, record.buffers)

    @classmethod
    def of_vision(cls, folder: pathlib.Path) -> HfExport:
        """A vision tokenizer that was fitted here."""
        config, vision = read_vision(folder)
        values = {"architectures": ["Emu3VisionVQModel"], "model_type": "Emu3VisionVQ"}
        rules = vision_rules(config)
        dtypes = {r.key: "I64" if r.is_counter else vision[r.path].dtype for r in rules}
        headers, files = _shard(values | config.to_dict(), rules, dtypes)
        return cls(headers, files, rules, vision=vision)

    @classmethod
    def of_checkpoint(cls, folder: pathlib.Path, dtype: str) -> HfExport:
        """A decoder, with or without action expert, that was trained here."""
        assets = Assets.load(folder / ASSETS)
        decoder = build_config(DecoderConfig, assets.model, where="assets.model")
        rules = decoder_rules(decoder)
        values = {"architectures": ["Emu3MoE"], "model_type": "Emu3"}
        values |= decoder_config_to_hf(decoder)
        if assets.action_expert:
            expert = build_config(ActionExpertConfig, assets.action_expert, where="assets")
            rules = joint_rules(expert, decoder)
            values |= expert_config_to_hf(expert, decoder)
        state = _open_state(folder, rules, assets.adapter)
        # As stored unless ``dtype`` says otherwise: a run may keep some parameters in float32.
        dtypes = {}
        for rule in rules:
            name = dtype or state.array(f"{_PARAMS}/{rule.path}").dtype.name
            if name not in _STORED_NAMES:
                raise UserError(f"--dtype={name}: expected one of {', '.join(_STORED_NAMES)}")
            dtypes[rule.key] = _STORED_NAMES[name]
        values["torch_dtype"] = FLOAT_DTYPES[dtypes[rules[0].key]]
        values |= {f"{name}_token_id": getattr(assets.vocabulary, name) for name in _SPECIAL_IDS}
        headers, files = _shard(values, rules, dtypes)
        text = {path.name: path.read_bytes() for path in (folder / ASSETS / "text").iterdir()}
        averages = {} if assets.adapter else acting_names(folder)
        return cls(headers, {**text, **files}, rules, state, averages=averages)

    def write(self, folder: pathlib.Path, progress: bool) -> None:
        """Writes all files into an empty folder; config.json comes last."""
        shards = {
            name: parse_header(header, folder / name) for name, header in self.headers.items()
        }
        total = sum(tensor.nbytes for shard in shards.values() for tensor in shard.values())
        with tqdm(
            total=total, unit="B", unit_scale=True, desc="convert", disable=not progress
        ) as bar:
            for name, tensors in shards.items():
                data = self._data(tensors.values(), bar.update)
                write_safetensors(folder / name, self.headers[name], data)
        for name in sorted(self.files, key=lambda name: name == CONFIG):
            (folder / name).write_bytes(self.files[name])

    def _data(
        self, tensors: Iterable[StoredTensor], advance: Callable[[int], Any]
    ) -> Iterator[np.ndarray]:
        rules = {rule.key: rule for rule in self.rules}
        for tensor in tensors:
            if tensor.name in self.buffers:
                yield np.frombuffer(self.buffers[tensor.name], np.uint8)
                continue
            for block in self._blocks(rules[tensor.name], DTYPES[tensor.dtype]):
                yield block
                advance(block.nbytes)

    def _blocks(self, rule: KeyRule, dtype: np.dtype) -> Iterator[np.ndarray]:
        """The data of one tensor, block by block."""
        # A layer's matrix is exchanged whole, 120 MB at the released sizes. The embeddings, 1.5 GB
        # each, keep their axes: they come in blocks of rows, and the loop ends before the padding.
        if rule.path in self.vision:
            yield _convert_exactly(rule, self.vision[rule.path].read(), dtype)
            return
        path = f"{_PARAMS}/{rule.path}"
        path = self.averages.get(path, path)
        if rule.layer is not None or rule.permutation:
            index = () if rule.layer is None else (rule.layer,)
            yield rule.to_hf(self.state.read(path, index)).astype(dtype, copy=False)
            return
        count = rule.shape[0]
        rows = max(1, _BLOCK_BYTES * count // max(1, math.prod(rule.shape) * dtype.itemsize))
        for start in range(0, count, rows):
            block = self.state.read(path, (slice(start, min(start + rows, count)),))
            yield block.astype(dtype, copy=False)


def _convert_exactly(rule: KeyRule, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A float32 tensor of our vision tokenizer in the dtype that it was converted from.

    Raises:
      UserError: its values need more than ``dtype`` holds.
    """
    value = rule.to_hf(value)
    converted = value.astype(dtype)
    if not np.array_equal(converted.astype(value.dtype), value, equal_nan=True):
        raise UserError(f"{rule.key}: its values do not fit into {dtype}")
    return converted


def _open_state(
    folder: pathlib.Path, rules: Sequence[KeyRule], adapter: Mapping[str, Any] | None = None
) -> StateReader | MergedState:
    """The parameters of a checkpoint, after comparing their shapes with the rules."""
    prefix = f"{_PARAMS}/"
    state = MergedState(folder, adapter) if adapter else StateReader(folder / STATE)
    shapes = {
        name.removeprefix(prefix): jax.ShapeDtypeStruct(shape, np.float32)
        for name, shape in (state.shapes if adapter else saved_shapes(folder)).items()
        if name.startswith(prefix)
    }
    check_params(rules, flax.traverse_util.unflatten_dict(shapes, sep="/"), where=str(folder))
    return state


def _shard(
    config: Mapping[str, Any], rules: Sequence[KeyRule], dtypes: Mapping[str, str]
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Headers of files of at most 5 GB, and config.json with the index that several need.

    Args:
      config: content of config.json.
      rules: of all tensors, in the order they are stored.
      dtypes: key -> safetensors' name of the dtype.
    """
    # As ``save_pretrained`` does it: tensors in order, a new file where the next one would exceed
    # the limit, and a single file without an index where all fit.
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    sizes = [0]
    for rule in rules:
        nbytes = math.prod(rule.shape) * DTYPES[dtypes[rule.key]].itemsize
        if shards[-1] and sizes[-1] + nbytes > _SHARD_BYTES:
            shards.append({})
            sizes.append(0)
        shards[-1][rule.key] = dtypes[rule.key], rule.shape
        sizes[-1] += nbytes
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = names if count > 1 else [SINGLE]
    files = {CONFIG: dump_json(config)}
    if count > 1:
        weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
        files[INDEX] = dump_json({"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})
    return {name: make_header(shard) for name, shard in zip(names, shards)}, files
