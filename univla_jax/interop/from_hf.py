"""Conversion of a Hugging Face model folder into a checkpoint or a vision tokenizer."""

from __future__ import annotations

import collections
import contextlib
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.traverse_util
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from univla_jax.checkpoints import ASSETS, STATE, FilesHandler, FilesSave
from univla_jax.errors import UserError
from univla_jax.interop.hf_assets import ConvertConfig, make_assets
from univla_jax.interop.hf_folder import SOURCE, HfFolder, local_path, save_source
from univla_jax.interop.hf_weights import HfModel, KeyRule, append_zero_rows, stacked_shapes
from univla_jax.interop.tensor_io import (
    FLOAT_DTYPES,
    Block,
    StoredTensor,
    StreamedArray,
    make_header,
    streamed_state_handler,
    write_safetensors,
)
from univla_jax.io import dump_json
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
