"""A model folder of the hub into a checkpoint or a vision tokenizer, tensor by tensor."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.traverse_util
import orbax.checkpoint as ocp
from tqdm import tqdm

from univla_jax.assets import Assets
from univla_jax.checkpoints import ASSETS, STATE, FilesHandler, FilesSave
from univla_jax.errors import UserError
from univla_jax.interop.hf_assets import ConvertConfig, make_assets
from univla_jax.interop.hf_config import FLOATS, HfModel
from univla_jax.interop.hf_folder import SOURCE, HfFolder, local_path, save_source
from univla_jax.interop.key_table import KeyRule, padded, stacked_shapes
from univla_jax.interop.tensor_files import Piece, PiecedArray, StoredTensor, state_handler
from univla_jax.interop.vision_keys import write_vision

Done = Callable[[int], Any]


def from_hf(
    source: str | pathlib.Path,
    to: str | pathlib.Path,
    config: ConvertConfig,
    *,
    weights_only: bool = False,
    progress: bool = True,
) -> HfFolder:
    """Converts a folder; the result appears whole or not at all.

    A decoder becomes a checkpoint (``state/``, ``assets/``, ``source/``), to be given wherever a
    checkpoint is taken: ``init_from`` of a training, a policy, a world model. A vision tokenizer
    becomes a tokenizer folder. A folder with both becomes a checkpoint with the tokenizer in its
    assets.

    Args:
      source: the model folder.
      to: absent or empty folder.
      config: what the model folder does not say.
      weights_only: leave out the assets; such a checkpoint can only be converted back.
      progress: whether to draw a progress bar.

    Returns:
      the model folder, checked.

    Raises:
      UserError: something wrong with the folder or the settings; nothing is written then.
    """
    hub = HfFolder.open(source)
    model = HfModel.of(hub.config, hub.tensors)
    model.check(hub.tensors, str(hub.path))
    to = local_path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to}: exists already; choose another --to, or remove it")
    assets = None
    if model.vision is None and not weights_only:
        assets = make_assets(hub, model, config, None)
    to.parent.mkdir(parents=True, exist_ok=True)
    total = sum(tensor.nbytes for tensor in hub.tensors.values())
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=not progress) as bar,
        _part_folder(to) as part,
    ):
        if model.decoder is None:
            _vision_folder(hub, model, part, bar.update)
            part.rename(to)
            return hub
        if model.vision is not None:
            write_vision(part, model.vision, model.vision_rules, hub.tensors, bar.update)
            assets = make_assets(hub, model, config, part)
        _checkpoint(hub, model, assets, to, bar.update)
    return hub


@contextlib.contextmanager
def _part_folder(to: pathlib.Path) -> Iterator[pathlib.Path]:
    """A fresh folder name beside ``to``; what is unfinished at the end is removed."""
    part = to.with_name(f".{to.name}.partial")
    _clear(to, part)
    try:
        yield part
    except OSError as error:
        raise UserError(f"cannot write {to}: {error}") from error
    finally:
        _clear(to, part)


def _clear(to: pathlib.Path, part: pathlib.Path) -> None:
    """Removes what this or an earlier, killed conversion left unfinished.

    A thread of Orbax may still be writing after another one failed; the next run removes that.
    """
    for left in (part, *to.parent.glob(f"{to.name}.orbax-checkpoint-tmp*")):
        shutil.rmtree(left, ignore_errors=True)


def _vision_folder(hub: HfFolder, model: HfModel, part: pathlib.Path, done: Done) -> None:
    write_vision(part, model.vision, model.vision_rules, hub.tensors, done)
    save_source(part / SOURCE, hub)


def _checkpoint(
    hub: HfFolder, model: HfModel, assets: Assets | None, to: pathlib.Path, done: Done
) -> None:
    """Writes all parts under Orbax's temporary name; its rename is the commit."""
    items: dict[str, Any] = {
        STATE: ocp.args.PyTreeSave({"params": state_tree(model, hub.tensors, done)}),
        SOURCE: FilesSave(lambda folder: save_source(folder, hub)),
    }
    if assets is not None:
        items[ASSETS] = FilesSave(assets.save)
    handlers = {name: FilesHandler() for name in items} | {STATE: state_handler()}
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as writer:
            writer.save(to, args=ocp.args.Composite(**items), force=True)
    except UserError:
        raise
    except (ValueError, RuntimeError) as error:  # as which TensorStore reports a full disk
        raise UserError(f"cannot write {to}: {error}") from error


def state_tree(model: HfModel, tensors: Mapping[str, StoredTensor], done: Done) -> dict[str, Any]:
    """The parameters as arrays still to be read.

    Args:
      model: says where each tensor goes.
      tensors: the tensors, checked.
      done: called with the bytes of each piece that was read.
    """
    by_path: dict[str, list[KeyRule]] = {}
    for rule in model.state_rules:
        by_path.setdefault(rule.path, []).append(rule)
    shapes = stacked_shapes(model.state_rules)
    flat = {path: _array(shapes[path], rules, tensors, done) for path, rules in by_path.items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _array(
    shape: tuple[int, ...], rules: list[KeyRule], tensors: Mapping[str, StoredTensor], done: Done
) -> PiecedArray:
    dtype = FLOATS[tensors[rules[0].key].dtype]
    stacked = rules[0].layer is not None
    whole = PiecedArray(shape, dtype, stacked, lambda: iter(()))
    if stacked or rules[0].permutation:
        pieces = functools.partial(_by_tensor, rules, tensors, done)
    else:
        pieces = functools.partial(_by_rows, rules[0], tensors[rules[0].key], whole.chunks[0], done)
    return PiecedArray(shape, dtype, stacked, pieces)


def _by_tensor(
    rules: list[KeyRule], tensors: Mapping[str, StoredTensor], done: Done
) -> Iterator[Piece]:
    """A whole tensor at a time: the axes of a matrix are exchanged."""
    for rule in rules:
        tensor = tensors[rule.key]
        yield () if rule.layer is None else (rule.layer,), rule.to_ours(tensor.read())
        done(tensor.nbytes)


def _by_rows(rule: KeyRule, tensor: StoredTensor, rows: int, done: Done) -> Iterator[Piece]:
    """A block of rows at a time, the padding rows at the end: vocabulary tables and vectors."""
    for start in range(0, rule.our_shape[0], rows):
        stop = min(start + rows, rule.our_shape[0])
        block = tensor.read(start, stop)
        yield (slice(start, stop),), padded(block, stop - start)
        done(block.nbytes)
