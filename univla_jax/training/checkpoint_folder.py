"""Reading a checkpoint folder: finding it, its parameters, its assets.

Everything here also serves programs that never train: evaluation, the policy server, conversion.
"""

from __future__ import annotations

import math
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from univla_jax.errors import UserError

CHECKPOINTS, STATE, ITERATOR, ASSETS = "checkpoints", "state", "iterator", "assets"
_COMMITTED = "_CHECKPOINT_METADATA"  # Orbax writes it into every folder it finishes
_TREE = "_METADATA"


def is_complete(folder: pathlib.Path) -> bool:
    """Whether ``folder`` is a finished checkpoint: its commit record and its state are there."""
    return (folder / _COMMITTED).is_file() and (folder / STATE / _TREE).is_file()


def step_folders(folder: pathlib.Path) -> dict[int, pathlib.Path]:
    """Every folder named by a step number under ``folder``, complete or not, in order of steps."""
    if not folder.is_dir():
        return {}
    found = {int(p.name): p for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()}
    return dict(sorted(found.items()))


def newest_checkpoint(workdir: str | pathlib.Path) -> pathlib.Path | None:
    """The newest complete checkpoint of a workdir, None where there is none."""
    return _newest(pathlib.Path(workdir).absolute() / CHECKPOINTS)


def find_checkpoint(path: str | pathlib.Path) -> pathlib.Path:
    """The checkpoint that ``path`` means.

    Args:
      path: a checkpoint ``.../checkpoints/<step>``, a ``checkpoints`` folder, or the workdir that
        holds one; for the latter two the newest complete checkpoint is taken.

    Raises:
      UserError: there is none.
    """
    path = pathlib.Path(path).absolute()
    if is_complete(path):
        return path
    newest = _newest(path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path)
    if newest is None:
        raise UserError(
            f"no complete checkpoint in {path}; give a workdir or a folder checkpoints/<step> of it"
        )
    return newest


def _newest(checkpoints: pathlib.Path) -> pathlib.Path | None:
    for folder in reversed(step_folders(checkpoints).values()):
        if is_complete(folder):
            return folder
        logging.warning("checkpoint %s is incomplete; skipped", folder)
    return None


def assets_folder(checkpoint: str | pathlib.Path) -> pathlib.Path:
    """The folder of tokenizers, statistics and configs in a checkpoint.

    Raises:
      UserError: the checkpoint has none.
    """
    folder = pathlib.Path(checkpoint) / ASSETS
    if not folder.is_dir():
        raise UserError(f"{checkpoint} has no {ASSETS}/ folder; it cannot be used by itself")
    return folder


def load_params(checkpoint: str | pathlib.Path, template: Any, *, part: str = "") -> Any:
    """Reads only the parameters of a checkpoint, straight to where they will live.

    Little more than the largest array is held beside them.

    Args:
      checkpoint: a checkpoint folder, or what ``find_checkpoint`` takes.
      template: pytree of ``jax.ShapeDtypeStruct``; with shardings the arrays are restored to them,
        without they go to the default device. Another dtype than the saved one is converted to.
      part: which of the trees under the parameters, where there are several (``has_part``); empty
        for all of them.

    Returns:
      the parameters.

    Raises:
      UserError: no checkpoint, or one of another model: names the first parameter that differs.
    """
    folder = find_checkpoint(checkpoint)
    wanted = {"params": {part: template} if part else template}
    check_same_tree(saved_shapes(folder), wanted, folder, within=_prefix(part))
    placed = jax.tree.map(_with_sharding, wanted)
    reader = ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_gigabytes_at_once(folder))
    )
    restored = reader.restore(
        folder / STATE,
        args=ocp.args.PyTreeRestore(
            item=placed,
            restore_args=ocp.checkpoint_utils.construct_restore_args(placed),
            partial_restore=True,
        ),
    )
    return restored["params"][part] if part else restored["params"]


def _gigabytes_at_once(checkpoint: pathlib.Path) -> int:
    """The least limit Orbax can read under: more than the largest array, and the end of a chunk."""
    arrays = jax.tree.leaves(_metadata(checkpoint), is_leaf=lambda x: hasattr(x, "shape"))
    largest = max(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in arrays)
    return 1 + int(1.1 * largest / 1e9)  # chunks divide an array, or are a small part of it


def has_part(checkpoint: pathlib.Path, part: str) -> bool:
    """Whether the parameters of a checkpoint hold the tree ``part``."""
    return any(name.startswith(_prefix(part)) for name in saved_shapes(checkpoint))


def _prefix(part: str) -> str:
    return f"params/{part}/" if part else "params/"


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def saved_shapes(checkpoint: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Shape of every array in a checkpoint's state, by its path ``a/b/c``; reads no array."""
    return shapes_by_path(_metadata(checkpoint))


def _metadata(checkpoint: pathlib.Path) -> Any:
    """Shape and dtype of every array of a checkpoint's state, as a tree."""
    return ocp.PyTreeCheckpointHandler().metadata(epath.Path(checkpoint / STATE)).tree


def shapes_by_path(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf of ``tree``, by its path ``a/b/c``; empty containers have none."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {"/".join(map(_key_name, path)): tuple(leaf.shape) for path, leaf in flat}


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def check_same_tree(
    saved: dict[str, tuple[int, ...]], template: Any, where: Any, *, within: str = ""
) -> None:
    """Compares the arrays of a checkpoint with those wanted.

    Args:
      saved: from ``saved_shapes``.
      template: what is wanted, a pytree of things with a shape.
      where: the checkpoint, for the message.
      within: beginning of the paths that are compared; the checkpoint may hold others.

    Raises:
      UserError: naming the first array that differs and both shapes.
    """
    wanted = shapes_by_path(template)
    for name in sorted(wanted.keys() | saved.keys()):
        if not name.startswith(within):
            continue
        have, want = saved.get(name, "absent"), wanted.get(name, "absent")
        if have != want:
            raise UserError(
                f"checkpoint {where} is of another model or optimizer: {name} is {have} there, "
                f"{want} here; use the config it was made with"
            )
