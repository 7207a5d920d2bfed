"""Checkpoints: state, data position and assets in one folder that appears whole or not at all.

Layout::

    <workdir>/checkpoints/<step>/
        state/      arrays (Orbax/TensorStore), readable on any mesh
        iterator/   process_<i>_of_<n>.bin, the data position of each process before batch <step>
        assets/     tokenizers, vocabulary, image specs, statistics, model config

A folder is written under a temporary name and renamed at the end. What a crash leaves behind is
skipped with a warning and the previous checkpoint is used.
"""

from __future__ import annotations

import contextlib
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from univla_jax.errors import UserError
from univla_jax.training.batches import barrier
from univla_jax.training.checkpoint_files import FilesRestore, FilesSave
from univla_jax.training.checkpoint_folder import (
    ASSETS,
    CHECKPOINTS,
    ITERATOR,
    STATE,
    check_same_tree,
    is_complete,
    saved_shapes,
    step_folders,
)
from univla_jax.training.checkpoint_policy import CheckpointConfig, manager_options


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
