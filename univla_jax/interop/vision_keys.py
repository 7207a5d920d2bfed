"""Names and layouts of the vision tokenizer's weights: the reference's and ours.

The reference's state dict (``Emu3VisionVQModel``, 495 entries at full size, golden group 14) maps
one to one onto the flax variables of ``tokenizers/vision_vq.py``. ``_RULES`` is the whole spelling
table and ``_PERMUTATIONS`` the whole layout table; everything else follows from the config.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax
import jax
import numpy as np

from univla_jax.assets import LazyVisionTokenizer
from univla_jax.errors import UserError
from univla_jax.interop.key_table import KeyRule
from univla_jax.interop.tensor_files import (
    StoredTensor,
    make_header,
    parse_header,
    read_header,
    write_safetensors,
)
from univla_jax.io import dump_json, parse_json, read_files
from univla_jax.tokenizers.vision import CONFIG_FILE, PARAMS_FILE, fingerprint_of
from univla_jax.tokenizers.vision_vq import VisionConfig, abstract_variables

# Our path -> the reference's, applied in order to the "/"-joined path without its collection.
_RULES = (
    (r"\b(down|up)_(\d+)_(block|attn)_(\d+)\b", r"\1.\2.\3.\4"),
    (r"\b(down|up)_(\d+)_(downsample|upsample)\b", r"\1.\2.\3"),
    (r"\bmid_(block|attn)_(\d)\b", r"mid.\1_\2"),
    (r"\b(time_res_stack_\d+)/(conv\d)/", r"\1/\2/conv/"),
    (r"\b(quant_conv|post_quant_conv)/", r"\1/conv/"),
    (r"\btime_conv_(\d+)/", r"time_conv.\1/conv/conv/"),
    (r"\btime_res_stack_(\d+)\b", r"time_res_stack.\1"),
    (r"/(kernel|scale)$", "/weight"),
    (r"/embedding$", "/embedding/weight"),
    (r"/(mean|var)$", r"/running_\1"),
    (r"/count$", "/num_batches_tracked"),
    (r"/", "."),
)

# The reference's name -> that of ``transformers``, which holds the norms of attention apart.
_TRANSFORMERS_RULES = (
    (r"\bdown\.(\d+)\.", r"down_block.down.\1."),
    (r"\bup\.(\d+)\.", r"up_block.up.\1."),
    (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
    (r"\bmid\.attn_1\.norm\.", "middle_block.attn_norm."),
    (r"\bmid\.", "middle_block."),
    (r"(\.attn\.\d+|\.attn_1)\.([qkv])\.", r"\1.\2_proj."),
    (r"(\.attn\.\d+|\.attn_1)\.proj_out\.", r"\1.out_proj."),
)
_ATTENTION = re.compile(r"\.attn(\.\d+|_1)\.(q|k|v|proj_out)\.weight$")

# transformers' vq_config name -> our field.
_TRANSFORMERS_FIELDS = {
    "codebook_size": "codebook_size",
    "embed_dim": "embed_dim",
    "latent_channels": "z_channels",
    "double_latent": "double_z",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "temporal_downsample_factor": "temporal_downsample_factor",
    "base_channels": "ch",
    "channel_multiplier": "ch_mult",
    "num_res_blocks": "num_res_blocks",
    "attn_resolutions": "attn_resolutions",
}

# Reference axes in our order, by rank of a kernel: OIHW -> HWIO and OITHW -> THWIO.
_PERMUTATIONS = {4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}

# Keys of the hub's config.json that say nothing about the shape.
_HOUSEKEEPING = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "torch_dtype",
    "transformers_version",
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one reference tensor lies in our tree.

    Attributes:
      path: keys from the root of the flax variables, collection first.
      shape: shape in the reference.
      dtype: numpy name of the dtype in the reference.
      permutation: axes of the reference tensor in our order, None where the layouts agree.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    permutation: tuple[int, ...] | None


def reference_key(path: tuple[str, ...]) -> str:
    """The reference's name of the variable at ``path`` (collection first)."""
    key = "/".join(path[1:])
    for pattern, spelling in _RULES:
        key = re.sub(pattern, spelling, key)
    return key


def key_table(config: VisionConfig) -> dict[str, Entry]:
    """All reference keys of a tokenizer of this shape."""
    flat = flax.traverse_util.flatten_dict(abstract_variables(config))
    return {reference_key(path): _entry(path, leaf) for path, leaf in flat.items()}


def _entry(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> Entry:
    permutation = _PERMUTATIONS.get(len(leaf.shape))
    shape = tuple(leaf.shape)
    if permutation:
        shape = tuple(leaf.shape[permutation.index(axis)] for axis in range(len(shape)))
    dtype = "int64" if path[-1] == "count" else leaf.dtype.name
    return Entry(path, shape, dtype, permutation)


def vision_rules(
    config: VisionConfig, *, transformers: bool = False, prefix: str = ""
) -> list[KeyRule]:
    """The table of every tensor, its place given from the root of the variables.

    Args:
      config: the tokenizer.
      transformers: whether the names are those of ``transformers``' ``Emu3VQVAE``.
      prefix: before each name.
    """
    rules = []
    for key, entry in key_table(config).items():
        shape, permutation = entry.shape, entry.permutation
        ours = shape if permutation is None else tuple(shape[axis] for axis in permutation)
        if transformers:
            if _ATTENTION.search(key):  # a linear layer there, a 1x1 convolution in the reference
                shape, permutation = shape[:2], (1, 0)
            key = transformers_key(key)
        rules.append(KeyRule(prefix + key, shape, "/".join(entry.path), ours, permutation))
    return rules


def transformers_key(key: str) -> str:
    """The name in ``transformers`` of the tensor that the reference calls ``key``."""
    for pattern, spelling in _TRANSFORMERS_RULES:
        key = re.sub(pattern, spelling, key)
    return key


def config_from_transformers(values: Mapping[str, Any]) -> VisionConfig:
    """A ``vq_config`` of ``transformers`` -> ``VisionConfig``; what is left out is the default.

    Raises:
      UserError: attention of several heads, or of another width than the layers it follows.
    """
    fields = {ours: values[name] for name, ours in _TRANSFORMERS_FIELDS.items() if name in values}
    config = VisionConfig.from_dict(fields)
    heads, width = values.get("num_attention_heads", 1), values.get("hidden_size", 1024)
    expected = config.ch * config.ch_mult[-1]
    if heads != 1 or width != expected:
        raise UserError(
            f"config.json: vq_config has {heads} attention heads of width {width}; only one head "
            f"of the last level's {expected} channels is implemented"
        )
    return config


def from_reference(state: Mapping[str, np.ndarray], config: VisionConfig) -> dict[str, Any]:
    """Reference state dict -> flax variables as numpy arrays.

    Raises:
      UserError: a key is missing, unexpected, or of another shape or dtype; all are listed.
    """
    table = key_table(config)
    _check(table, {key: (tuple(v.shape), v.dtype.name) for key, v in state.items()})
    return flax.traverse_util.unflatten_dict(
        {entry.path: _into(entry, np.asarray(state[key])) for key, entry in table.items()}
    )


def to_reference(variables: Mapping[str, Any], config: VisionConfig) -> dict[str, np.ndarray]:
    """Flax variables -> reference state dict; the exact inverse of ``from_reference``.

    Raises:
      UserError: the tree is not that of ``config``; all differences are listed.
    """
    table = key_table(config)
    flat = flax.traverse_util.flatten_dict(dict(variables))
    by_path = {entry.path: (key, entry) for key, entry in table.items()}
    state = {}
    for path, value in flat.items():
        key, entry = by_path.get(path, ("/".join(path), None))
        state[key] = np.asarray(value) if entry is None else _out_of(entry, np.asarray(value))
    _check(table, {key: (v.shape, v.dtype.name) for key, v in state.items()})
    return state


def config_from_reference(values: Mapping[str, Any]) -> VisionConfig:
    """The hub's ``config.json`` of a vision tokenizer -> ``VisionConfig``.

    Raises:
      UserError: a key that is neither a field nor known housekeeping.
    """
    return VisionConfig.from_dict({k: v for k, v in values.items() if k not in _HOUSEKEEPING})


def _into(entry: Entry, value: np.ndarray) -> np.ndarray:
    if entry.dtype == "int64":
        return counter("/".join(entry.path), value)
    return value if entry.permutation is None else value.transpose(entry.permutation)


def counter(name: str, value: np.ndarray) -> np.ndarray:
    """A batch norm's int64 count of batches as ours.

    Raises:
      UserError: more than int32 holds.
    """
    if not 0 <= value < 2**31:
        raise UserError(f"{name}: counter {value} does not fit into int32")
    return value.astype(np.int32)


def _out_of(entry: Entry, value: np.ndarray) -> np.ndarray:
    if entry.dtype == "int64":
        return value.astype(np.int64)
    if entry.permutation is None or value.ndim != len(entry.permutation):
        return value
    return np.ascontiguousarray(value.transpose(np.argsort(entry.permutation)))


def _check(table: Mapping[str, Entry], found: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    """Raises UserError listing every difference between the table and what was found."""
    problems = [f"missing {key} {list(table[key].shape)}" for key in table if key not in found]
    problems += [f"unexpected {key} {list(found[key][0])}" for key in found if key not in table]
    for key, (shape, dtype) in found.items():
        if key not in table:
            continue
        wanted = table[key]
        if shape != wanted.shape:
            problems.append(f"{key} has shape {list(shape)}, expected {list(wanted.shape)}")
        elif dtype != wanted.dtype:
            problems.append(f"{key} has dtype {dtype}, expected {wanted.dtype}")
    if problems:
        raise UserError(
            "these weights are not a vision tokenizer of the given config "
            f"({len(problems)} differences): " + "; ".join(problems)
        )


# ----------------------------------------------------------------------------
# The vision tokenizer's folder written and fingerprinted tensor by tensor.


def write_vision(
    folder: pathlib.Path,
    config: VisionConfig,
    rules: tuple[KeyRule, ...],
    tensors: Mapping[str, StoredTensor],
    done: Callable[[int], None],
) -> None:
    """Writes what ``VisionTokenizer.load`` reads, in float32.

    Args:
      folder: empty or absent.
      config: the tokenizer.
      rules: place of each tensor.
      tensors: the tensors, all there and of the right shape.
      done: called with the bytes read.
    """

    def pieces() -> Iterator[np.ndarray]:
        for rule in rules:
            tensor = tensors[rule.key]
            yield _write_into(rule, tensor)
            done(tensor.nbytes)

    header = make_header({r.path: ("I32" if _counts(r) else "F32", r.our_shape) for r in rules})
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / PARAMS_FILE, header, pieces())
    (folder / CONFIG_FILE).write_bytes(dump_json(config.to_dict()))


def _counts(rule: KeyRule) -> bool:
    return rule.path.endswith("/count")


def _write_into(rule: KeyRule, tensor: StoredTensor) -> np.ndarray:
    value = tensor.read()
    if not _counts(rule):
        return rule.to_ours(value).astype(np.float32, copy=False)
    return counter(rule.key, value)


def foreign_tensor(rule: KeyRule, tensor: StoredTensor, dtype: np.dtype) -> np.ndarray:
    """A tensor of our folder as the foreign one of ``dtype``; undoes what ``write_vision`` did.

    Raises:
      UserError: its values need more than ``dtype`` holds.
    """
    value = tensor.read()
    back = rule.to_foreign(value).astype(dtype)
    if not np.array_equal(back.astype(value.dtype), rule.to_foreign(value), equal_nan=True):
        raise UserError(f"{rule.key}: its values do not fit into {dtype}")
    return back


def vision_tensors(folder: pathlib.Path) -> tuple[VisionConfig, dict[str, StoredTensor]]:
    """Config and tensors of a folder that ``VisionTokenizer.save`` or ``write_vision`` wrote.

    Raises:
      UserError: a file is missing or broken.
    """
    content = read_files(folder, [CONFIG_FILE], what="vision tokenizer")[CONFIG_FILE]
    config = VisionConfig.from_dict(parse_json(content, where=f"{folder}/{CONFIG_FILE}"))
    file = folder / PARAMS_FILE
    return config, parse_header(read_header(file), file)


def open_vision(folder: pathlib.Path) -> LazyVisionTokenizer:
    """The tokenizer in ``folder``, its weights read once for the fingerprint and not kept.

    Raises:
      UserError: a file is missing or broken.
    """
    config, tensors = vision_tensors(folder)
    values = ((name, tensor.read()) for name, tensor in sorted(tensors.items()))
    return LazyVisionTokenizer(
        folder,
        fingerprint=fingerprint_of(config, values),
        codebook_size=config.codebook_size,
        factor=config.factor,
    )
