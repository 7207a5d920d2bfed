"""The vision tokenizer's folder written and fingerprinted tensor by tensor."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from univla_jax.errors import UserError
from univla_jax.interop.key_table import KeyRule
from univla_jax.interop.safetensor_files import (
    StoredTensor,
    make_header,
    parse_header,
    read_header,
    write,
)
from univla_jax.interop.vision_keys import counter
from univla_jax.tokenizers.files import dump_json, parse_json, read_files
from univla_jax.tokenizers.stored_vision import StoredVision
from univla_jax.tokenizers.vision import CONFIG_FILE, PARAMS_FILE, fingerprint_of
from univla_jax.tokenizers.vision_config import VisionConfig


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
            yield _into(rule, tensor)
            done(tensor.nbytes)

    header = make_header({r.path: ("I32" if _counts(r) else "F32", r.our_shape) for r in rules})
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / PARAMS_FILE, header, pieces())
    (folder / CONFIG_FILE).write_bytes(dump_json(config.to_dict()))


def _counts(rule: KeyRule) -> bool:
    return rule.path.endswith("/count")


def _into(rule: KeyRule, tensor: StoredTensor) -> np.ndarray:
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


def open_vision(folder: pathlib.Path) -> StoredVision:
    """The tokenizer in ``folder``, its weights read once for the fingerprint and not kept.

    Raises:
      UserError: a file is missing or broken.
    """
    config, tensors = vision_tensors(folder)
    values = ((name, tensor.read()) for name, tensor in sorted(tensors.items()))
    return StoredVision(
        folder,
        fingerprint=fingerprint_of(config, values),
        codebook_size=config.codebook_size,
        factor=config.factor,
    )
