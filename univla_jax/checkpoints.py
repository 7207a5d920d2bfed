"""Reading a checkpoint folder: finding it, its parameters, its assets.

Everything here also serves programs that never train: evaluation, the policy server, conversion.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

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


# ----------------------------------------------------------------------------
# An Orbax item made of plain files, so that they are committed together with the arrays.


class FilesHandler(ocp.AsyncCheckpointHandler):
    """Lets a function write files into the item's folder, in the background of the save."""

    async def async_save(
        self, directory: Any, item: Any = None, args: FilesSave | None = None
    ) -> list[ocp.future.Future]:
        """Starts ``args.write(folder)`` and returns the future of its end."""
        del item

        async def write() -> None:
            args.write(pathlib.Path(directory))

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="files")]

    def save(self, directory: Any, item: Any = None, args: FilesSave | None = None) -> None:
        """Calls ``args.write(folder)``."""
        del item
        args.write(pathlib.Path(directory))

    def restore(
        self, directory: Any, item: Any = None, args: FilesRestore | None = None
    ) -> pathlib.Path:
        """Returns the item's folder; its files are the caller's to read."""
        del item, args
        return pathlib.Path(directory)


@ocp.args.register_with_handler(FilesHandler, for_save=True)
@dataclasses.dataclass
class FilesSave(ocp.args.CheckpointArgs):
    """What ``FilesHandler`` saves.

    Attributes:
      write: called with the item's folder on every process, possibly on another thread.
    """

    write: Callable[[pathlib.Path], None]


@ocp.args.register_with_handler(FilesHandler, for_restore=True)
@dataclasses.dataclass
class FilesRestore(ocp.args.CheckpointArgs):
    """Asks ``FilesHandler`` for the item's folder."""


# ----------------------------------------------------------------------------
# When checkpoints are written and which of them stay.


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
      every: steps between checkpoints; the last step is always saved.
      keep_last: how many of the newest stay.
      keep_every: checkpoints at multiples of this stay for ever; None for none.
      keep_best: how many of the best by ``best_metric`` stay; those saved at a step that is also
        evaluated take part.
      best_metric: name of an evaluation metric, lower is better unless ``best_highest``.
      best_highest: whether higher values of ``best_metric`` are better.
      asynchronous: write in the background while training goes on.
    """

    every: int = 1000
    keep_last: int = 2
    keep_every: int | None = None
    keep_best: int = 0
    best_metric: str = "eval/loss"
    best_highest: bool = False
    asynchronous: bool = True

    def __post_init__(self) -> None:
        """Refuses a policy that would keep nothing.

        Raises:
          UserError: naming the field and its value.
        """
        for name in ("every", "keep_last"):
            if getattr(self, name) < 1:
                raise UserError(f"checkpoint.{name}: {getattr(self, name)}; expected at least 1")


def manager_options(config: CheckpointConfig) -> ocp.CheckpointManagerOptions:
    """The policy in Orbax's words."""
    keep: list[Any] = [policies.LatestN(config.keep_last)]
    if config.keep_every is not None:
        keep.append(policies.EveryNSteps(config.keep_every))
    best = None
    if config.keep_best:
        best = functools.partial(_metric, name=config.best_metric)
        keep.append(
            policies.BestN(
                get_metric_fn=best,
                reverse=not config.best_highest,
                n=config.keep_best,
                keep_checkpoints_without_metrics=False,
            )
        )
    return ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep),
        best_fn=best,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=config.asynchronous,
        save_root_metadata=False,
    )


def _metric(metrics: Mapping[str, float], name: str) -> float:
    if name not in metrics:
        raise UserError(
            f"checkpoint.best_metric: {name!r} is not evaluated; known: {', '.join(metrics)}"
        )
    return metrics[name]


# ----------------------------------------------------------------------------
# Checkpoints: state, data position and assets in one folder that appears whole or not at all.
#
# Layout::
#
#     <workdir>/checkpoints/<step>/
#         state/      arrays (Orbax/TensorStore), readable on any mesh
#         iterator/   process_<i>_of_<n>.bin, the data position of each process before batch <step>
#         assets/     tokenizers, vocabulary, image specs, statistics, model config
#
# A folder is written under a temporary name and renamed at the end. What a crash leaves behind is
# skipped with a warning and the previous checkpoint is used.


class Checkpointer:
    """Saves and restores the checkpoints of one workdir; used as a context manager.

    Orbax messages and barriers make every method a collective call when there are several
    processes.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path,
        config: CheckpointConfig,
        *,
        write_assets: Callable[[pathlib.Path], None] | None = None,
    ) -> None:
        """Opens ``<workdir>/checkpoints``, making it if needed.

        Args:
          workdir: folder of the run.
          config: when to save and what to keep.
          write_assets: called with an empty folder inside each new checkpoint; writes the files
            that make the checkpoint usable by itself.

        Raises:
          UserError: the folder cannot be written.
        """
        self.folder = pathlib.Path(workdir).absolute() / CHECKPOINTS
        self._config = config
        self._write_assets = write_assets
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                _set_aside_incomplete(self.folder)
        except OSError as error:
            raise UserError(f"cannot write checkpoints in {self.folder}: {error}") from error
        barrier("open_checkpoints")
        self._manager = ocp.CheckpointManager(self.folder, options=manager_options(config))

    def __enter__(self) -> Checkpointer:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for the save in progress and releases the threads."""
        self.close()

    def due(self, step: int) -> bool:
        """Whether ``step`` is one to save."""
        return step > 0 and step % self._config.every == 0

    def latest_step(self) -> int | None:
        """The newest saved step, None when there is none."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: Any,
        iterator: Any = None,
        *,
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Saves ``state`` and the iterator's position, unless this step is saved already.

        Returns as soon as the arrays are copied; ``wait`` waits for the files.

        Args:
          step: number of optimizer steps done.
          state: pytree of arrays; may be donated after the call.
          iterator: has ``get_state() -> bytes`` and stands before batch ``step``; None where there
            is nothing to resume.
          metrics: of the evaluation at this step, for ``keep_best``.

        Returns:
          whether a save was started.

        Raises:
          UserError: this save or the previous one could not be written; older checkpoints stay.
        """
        if step in self._manager.all_steps():
            return False
        items = {STATE: ocp.args.StandardSave(state), ITERATOR: _save_position(iterator)}
        if self._write_assets is not None:
            items[ASSETS] = _on_primary(self._write_assets)
        with self._write_errors():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True, metrics=metrics)
        return True

    def restore(self, template: Any, iterator: Any = None) -> Any | None:
        """Restores the newest readable checkpoint and moves ``iterator`` to its position.

        Args:
          template: the state's structure as ``jax.ShapeDtypeStruct`` with shardings; arrays are
            read straight to the devices that hold them, whatever mesh they were saved from.
          iterator: has ``set_state(*states)``, which gets those of all processes that saved;
            None leaves positions unread.

        Returns:
          the state, or None when there is no checkpoint.

        Raises:
          UserError: the checkpoint holds another model or optimizer, lacks a position, or no
            checkpoint is readable.
        """
        damaged, last_error = [], None
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder = self.folder / str(step)
            try:
                saved = saved_shapes(folder)
                check_same_tree(saved, template, folder)
                restored = self._manager.restore(step, args=_restore_args(template))
            except UserError:
                raise
            except (ValueError, OSError) as error:
                logging.warning("checkpoint %s is damaged, skipped: %s", folder, error)
                damaged, last_error = [*damaged, folder], error
                continue
            if iterator is not None:
                iterator.set_state(*_read_positions(restored[ITERATOR]))
            self._set_aside(damaged)
            return restored[STATE]
        if damaged:
            raise UserError(
                f"none of the checkpoints in {self.folder} can be read ({last_error}); restore "
                "them, or move them away to start anew"
            )
        return None

    def wait(self) -> None:
        """Waits until the save in progress is on disk.

        Raises:
          UserError: it could not be written.
        """
        with self._write_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the threads."""
        self.wait()
        self._manager.close()

    def _set_aside(self, damaged: list[pathlib.Path]) -> None:
        """Renames unreadable checkpoints, so that their steps can be saved again."""
        if not damaged:
            return
        if jax.process_index() == 0:
            for folder in damaged:
                _rename(folder, "damaged")
        barrier("set_aside")
        self._manager.reload()

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Turns what a full or read-only disk raises into a UserError."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"cannot write a checkpoint in {self.folder}: {error}; older checkpoints are intact"
            ) from error


def _restore_args(template: Any) -> ocp.args.Composite:
    return ocp.args.Composite(
        **{STATE: ocp.args.StandardRestore(template), ITERATOR: FilesRestore()}
    )


def _position_file(folder: pathlib.Path) -> pathlib.Path:
    return folder / f"process_{jax.process_index()}_of_{jax.process_count()}.bin"


def _save_position(iterator: Any) -> FilesSave:
    """Takes the iterator's position now; the file is written in the background."""
    position = b"" if iterator is None else iterator.get_state()
    return FilesSave(lambda folder: _position_file(folder).write_bytes(position) and None)


def _read_positions(folder: pathlib.Path) -> list[bytes]:
    """The positions of all processes that saved them, however many there are now."""
    files = sorted(folder.glob("process_*_of_*.bin"))
    if {file.stem.rpartition("_")[2] for file in files} != {str(len(files))}:
        names = ", ".join(file.name for file in files) or "nothing"
        raise UserError(
            f"{folder} holds {names}, which is not the position of every process that saved it; "
            "restore the missing files, or use another checkpoint"
        )
    return [file.read_bytes() for file in files]


def _on_primary(write: Callable[[pathlib.Path], None]) -> FilesSave:
    """Only the first process writes; the files are the same for all."""
    return FilesSave(write if jax.process_index() == 0 else lambda folder: None)


def _set_aside_incomplete(folder: pathlib.Path) -> None:
    """Renames step folders that lack parts (an interrupted copy); names crashed saves."""
    for step_folder in step_folders(folder).values():
        if not is_complete(step_folder):
            logging.warning("checkpoint %s is incomplete; skipped", step_folder)
            _rename(step_folder, "incomplete")
    for left in folder.glob("*.orbax-checkpoint-tmp*"):
        logging.warning("checkpoint %s was never finished; removed", left)


def _rename(folder: pathlib.Path, suffix: str) -> None:
    target = folder.with_name(f"{folder.name}.{suffix}")
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)


def barrier(name: str) -> None:
    """Waits until every process is here; nothing to wait for in a single one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
