"""Checkpoints: finding, reading and writing them.

One folder holds all that is needed to continue training or to act, and appears whole or not at all
(it is written under a temporary name and renamed at the end)::

    <workdir>/checkpoints/<step>/
        state/      arrays (Orbax/TensorStore), readable on any mesh
        iterator/   process_<i>_of_<n>.bin, the data position of each process before batch <step>
        checksums/  of every array of the state (``integrity.py``)
        assets/     tokenizers, vocabulary, image specs, statistics, model config
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from univla_jax import integrity
from univla_jax.buckets import is_remote
from univla_jax.errors import UserError
from univla_jax.integrity import DamagedCheckpointError
from univla_jax.io import PathLike, absolute_path

CHECKPOINTS, STATE, ITERATOR, ASSETS = "checkpoints", "state", "iterator", "assets"
CHECKSUMS = "checksums"
_COMMITTED = "_CHECKPOINT_METADATA"  # Orbax writes it into every folder it finishes
_COMMITTED_IN_BUCKET = "commit_success.txt"  # and this last where there is no atomic rename
_UNUSABLE = {False: "\\\n\r", True: "\\\n\r*?[]#"}  # in names of folders, on a disk and in buckets
_TREE = "_METADATA"
_IDENTIFYING = (_COMMITTED, f"{STATE}/manifest.ocdbt", f"{ASSETS}/assets.json")

# ----------------------------------------------------------------------------
# Finding.


def find_checkpoint(path: PathLike) -> epath.Path:
    """The checkpoint that ``path`` means.

    Args:
      path: a checkpoint ``.../checkpoints/<step>``, a ``checkpoints`` folder, or the workdir that
        holds one; for the latter two the newest complete checkpoint is taken.

    Raises:
      UserError: there is none.
    """
    path = absolute_path(path)
    if _is_complete(path):
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        raise UserError(
            f"no complete checkpoint in {path}; give a workdir or a folder checkpoints/<step> of it"
        )
    return newest


def newest_checkpoint(folder: PathLike) -> epath.Path | None:
    """The newest complete checkpoint of a workdir or ``checkpoints`` folder, None without one."""
    folder = absolute_path(folder)
    inner = folder / CHECKPOINTS
    for path in reversed(_step_folders(inner if inner.is_dir() else folder)):
        if _is_complete(path):
            return path
        logging.warning("checkpoint %s is incomplete; skipped", path)
    return None


def check_workdir(workdir: PathLike) -> None:
    """Checks that checkpoints below a folder of this name can be read back.

    Raises:
      UserError: a character that TensorStore or a bucket takes for something else.
    """
    path = absolute_path(workdir)
    for character in _UNUSABLE[is_remote(path)]:
        if character in os.fspath(path):
            raise UserError(
                f"{path}: checkpoints below a folder with {character!r} in its name could not be "
                "read back; choose another name"
            )


CheckAssets = Callable[[epath.Path], Any]


def intact_checkpoint(
    folder: PathLike, check_assets: CheckAssets | None = None, *, below: int | None = None
) -> epath.Path | None:
    """The newest checkpoint whose parts are all there, as the first process finds it.

    What is damaged is named in a warning. The contents of the arrays are checked only when they are
    read. With several processes this is a collective call, and all get the same answer.

    Args:
      folder: a workdir or ``checkpoints`` folder.
      check_assets: raises where the assets folder it is given is damaged; None leaves them alone.
      below: only steps below this one.

    Returns:
      its folder, None where there is none.
    """
    folder = absolute_path(folder)
    inner = folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder
    found = -1
    for path in reversed(_step_folders(inner)) if jax.process_index() == 0 else ():
        step = int(path.name)
        if (below is None or step < below) and _is_complete(path):
            try:
                _check_folder(path, check_assets)
            except DamagedCheckpointError as error:
                logging.warning("checkpoint %s is damaged, skipped: %s", path, error)
                continue
            found = step
            break
    found = _of_first_process(found)
    return None if found < 0 else inner / str(found)


def _check_folder(folder: epath.Path, check_assets: CheckAssets | None) -> None:
    integrity.check_folder(
        folder,
        folder / _COMMITTED,
        saved_shapes=saved_shapes,
        checksums=CHECKSUMS,
        iterator=ITERATOR,
        check_assets=None if check_assets is None else (ASSETS, check_assets),
    )


def _of_first_process(value: int) -> int:
    """The first process's value, on all of them."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _on_all_processes(condition: bool) -> bool:
    """Whether it holds on every process."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.int32(condition)).all())


def assets_folder(checkpoint: PathLike) -> epath.Path:
    """The folder of tokenizers, statistics and configs in a checkpoint.

    Raises:
      UserError: the checkpoint has none.
    """
    folder = epath.Path(checkpoint) / ASSETS
    if not folder.is_dir():
        raise UserError(f"{checkpoint} has no {ASSETS}/ folder; it cannot be used by itself")
    return folder


def checkpoint_identity(checkpoint: PathLike) -> str:
    """sha256 that tells one written checkpoint from another: commit record, arrays, assets.

    Args:
      checkpoint: a folder ``checkpoints/<step>``; a copy of it has the same identity.
    """
    folder = find_checkpoint(checkpoint)
    digest = hashlib.sha256()
    for name in _IDENTIFYING:
        path = folder / name
        digest.update(f"\0{name}\0".encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def _step_folders(checkpoints: epath.Path) -> list[epath.Path]:
    """Folders named by a step number, complete or not, in order of steps."""
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def _is_complete(folder: epath.Path) -> bool:
    if is_remote(folder) and not (folder / _COMMITTED_IN_BUCKET).is_file():
        return False
    return (folder / _COMMITTED).is_file() and (folder / STATE / _TREE).is_file()


# ----------------------------------------------------------------------------
# Reading. Shapes are compared before any array is read, so that a wrong config is an error that
# names the parameter, and not a stack trace of TensorStore.


def load_params(
    checkpoint: PathLike,
    template: Any,
    *,
    part: str = "",
    averaged: bool = True,
    convert: Callable[[str, jax.Array], Any] | None = None,
) -> Any:
    """Reads only the parameters of a checkpoint, straight to where they will live.

    Little more than the largest array is held beside them.

    Args:
      checkpoint: a checkpoint folder, or what ``find_checkpoint`` takes.
      template: pytree of ``jax.ShapeDtypeStruct``; with shardings the arrays are restored to them,
        without they go to the default device. Another dtype than the saved one is converted to.
      part: which of the trees under the parameters, where there are several (``has_part``); empty
        for all of them.
      averaged: the moving averages where the run kept some; False takes its last parameters.
      convert: maps the name ``params/a/b`` and each array to what stands in its place; called as
        soon as it is read, so that the whole of the arrays never has to fit.

    Returns:
      the parameters.

    Raises:
      UserError: no checkpoint, or one of another model: names the first parameter that differs.
    """
    folder = find_checkpoint(checkpoint)
    wanted = {"params": {part: template} if part else template}
    try:
        averages = acting_names(folder) if averaged else {}
    except Exception as error:  # damage surfaces as many types of several libraries
        raise _unreadable(folder, error) from error
    if not averages:
        restored = load_arrays(folder, wanted, within=_prefix(part), convert=convert)
        return restored["params"][part] if part else restored["params"]
    # A run that averages its parameters is read by its averages; what is frozen has none.
    _check_same_shapes(saved_shapes(folder), wanted, folder, within=_prefix(part))
    own = {averages.get(name, name): name for name in _shapes(wanted)}
    leaves = _by_name(wanted)
    tree = nested({place: leaves[name] for place, name in own.items()})
    named = None if convert is None else lambda place, x: convert(own[place], x)
    read = load_arrays(folder, tree, convert=named)
    flat, structure = jax.tree_util.tree_flatten_with_path(wanted)
    places = {name: place for place, name in own.items()}
    restored = jax.tree.unflatten(
        structure,
        [
            functools.reduce(
                lambda node, key: node[key], places[integrity.path_name(path)].split("/"), read
            )
            for path, _ in flat
        ],
    )
    return restored["params"][part] if part else restored["params"]


_AVERAGES = "opt_state/ema/"


def acting_names(checkpoint: epath.Path) -> dict[str, str]:
    """Where the averages lie of parameters that have one, by the parameters' names ``params/a``."""
    return {
        f"params/{name.removeprefix(_AVERAGES)}": name
        for name in saved_shapes(checkpoint)
        if name.startswith(_AVERAGES)
    }


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of dicts with arrays at their paths ``a/b/c``."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = array
    return tree


def load_arrays(
    checkpoint: PathLike,
    wanted: Any,
    *,
    within: str | None = None,
    convert: Callable[[str, jax.Array], Any] | None = None,
) -> Any:
    """Some arrays of a checkpoint's state, read and converted as ``load_params`` does.

    Args:
      checkpoint: a checkpoint folder, or what ``find_checkpoint`` takes.
      wanted: a part of the state's tree, of ``jax.ShapeDtypeStruct``.
      within: the checkpoint must hold nothing else below this path; None allows it.
      convert: as for ``load_params``.

    Raises:
      UserError: no checkpoint, or one of another model: names the first array that differs.
    """
    folder = find_checkpoint(checkpoint)
    try:
        metadata = _metadata(folder)
        checksums = integrity.read_checksums(folder / CHECKSUMS)
    except Exception as error:  # damage surfaces as many types of several libraries
        raise _unreadable(folder, error) from error
    shapes = _shapes(metadata)
    if within is None:
        shapes = {name: shapes[name] for name in _shapes(wanted) if name in shapes}
    _check_same_shapes(shapes, wanted, folder, within=within or "")
    # Arrays are read in the dtype they were saved in, whose checksum is known, and converted then;
    # group by group, so that little more than the largest array is there twice.
    saved, placed = _by_name(metadata), _by_name(wanted)
    arrays: dict[str, Any] = {}
    for group in _groups({name: saved[name] for name in placed}):
        exact = {
            name: jax.ShapeDtypeStruct(
                saved[name].shape, saved[name].dtype, sharding=_with_sharding(placed[name]).sharding
            )
            for name in group
        }
        try:
            read = _read_arrays(folder, exact)
            if checksums is not None:
                integrity.compare(integrity.array_checksums(read), checksums)
        except Exception as error:
            raise _unreadable(folder, error) from error
        for name in group:
            array = read.pop(name).astype(placed[name].dtype)
            arrays[name] = array if convert is None else convert(name, array)
    flat, structure = jax.tree_util.tree_flatten_with_path(wanted)
    names = [integrity.path_name(path) for path, _ in flat]
    return jax.tree.unflatten(structure, [arrays[name] for name in names])


_GROUP_BYTES = 1 << 30


def _groups(arrays: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
    """Names of arrays that are read together: up to a gigabyte, or one alone that is larger."""
    group, size = [], 0
    for name, array in arrays.items():
        nbytes = array.size * array.dtype.itemsize
        if group and size + nbytes > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group, size = [*group, name], size + nbytes
    if group:
        yield group


def _read_arrays(
    folder: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Some arrays of a checkpoint's state, by their paths."""
    tree = nested(wanted)
    # Orbax reads as many arrays at once as fit its limit. The least limit that works is a little
    # more than the largest array: chunks divide an array, or are a small part of it.
    largest = max(x.size * x.dtype.itemsize for x in wanted.values())
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=1 + int(1.1 * largest / 1e9))
    restored = handler.restore(
        folder / STATE,
        args=ocp.args.PyTreeRestore(
            item=tree,
            restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
            partial_restore=True,
        ),
    )
    return _by_name(restored)


def _unreadable(folder: epath.Path, error: Exception) -> UserError:
    older = _intact_before(folder)
    remedy = f"use {older} instead" if older is not None else "restore it from a copy"
    return UserError(f"checkpoint {folder} is damaged ({error}); {remedy}")


def _intact_before(checkpoint: epath.Path) -> epath.Path | None:
    """The newest older checkpoint beside one, whose parts are all there; None without one."""
    if not checkpoint.name.isdecimal():
        return None
    for path in reversed(_step_folders(checkpoint.parent)):
        if int(path.name) < int(checkpoint.name) and _is_complete(path):
            with contextlib.suppress(DamagedCheckpointError):
                _check_folder(path, None)
                return path
    return None


def has_part(checkpoint: epath.Path, part: str) -> bool:
    """Whether the parameters of a checkpoint hold the tree ``part``."""
    return any(name.startswith(_prefix(part)) for name in saved_shapes(checkpoint))


def saved_shapes(checkpoint: epath.Path) -> dict[str, tuple[int, ...]]:
    """Shape of every array in a checkpoint's state, by its path ``a/b/c``; reads no array."""
    return _shapes(_metadata(checkpoint))


def saved_arrays(checkpoint: epath.Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array in a checkpoint's state, by its path; reads no array."""
    return _by_name(_metadata(checkpoint))


def _metadata(checkpoint: epath.Path) -> Any:
    """Shape and dtype of every array of a checkpoint's state, as a tree without other leaves."""
    tree = ocp.PyTreeCheckpointHandler().metadata(checkpoint / STATE).tree
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        tree,
        is_leaf=lambda x: hasattr(x, "shape"),
    )


def _by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths ``a/b/c``."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {integrity.path_name(path): leaf for path, leaf in flat}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in _by_name(tree).items()}


def _check_same_shapes(
    saved: Mapping[str, tuple[int, ...]], template: Any, where: epath.Path, *, within: str = ""
) -> None:
    """Raises UserError naming the first array, below ``within``, that differs in shape."""
    wanted = _shapes(template)
    for name in sorted(name for name in wanted.keys() | saved.keys() if name.startswith(within)):
        have, want = saved.get(name, "absent"), wanted.get(name, "absent")
        if have != want:
            raise UserError(
                f"checkpoint {where} is of another model or optimizer: {name} is {have} there, "
                f"{want} here; use the config it was made with"
            )


def _prefix(part: str) -> str:
    return f"params/{part}/" if part else "params/"


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


# ----------------------------------------------------------------------------
# An Orbax item made of plain files, so that they are committed together with the arrays. Orbax has
# handlers of arrays, JSON values and protos, but none of files that a function writes.


class FilesHandler(ocp.AsyncCheckpointHandler):
    """Lets a function write files into the item's folder, in the background of the save."""

    async def async_save(
        self, directory: Any, item: Any = None, args: FilesSave | None = None
    ) -> list[ocp.future.Future]:
        """Starts ``args.write(folder)`` and returns the future of its end."""
        del item

        async def write() -> None:
            args.write(epath.Path(directory))

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="files")]

    def save(self, directory: Any, item: Any = None, args: FilesSave | None = None) -> None:
        """Calls ``args.write(folder)``."""
        del item
        args.write(epath.Path(directory))

    def restore(
        self, directory: Any, item: Any = None, args: FilesRestore | None = None
    ) -> epath.Path:
        """Returns the item's folder; its files are the caller's to read."""
        del item, args
        return epath.Path(directory)


@ocp.args.register_with_handler(FilesHandler, for_save=True)
@dataclasses.dataclass
class FilesSave(ocp.args.CheckpointArgs):
    """What ``FilesHandler`` saves.

    Attributes:
      write: called with the item's folder on every process, possibly on another thread.
    """

    write: Callable[[epath.Path], Any]


@ocp.args.register_with_handler(FilesHandler, for_restore=True)
@dataclasses.dataclass
class FilesRestore(ocp.args.CheckpointArgs):
    """Asks ``FilesHandler`` for the item's folder."""


# ----------------------------------------------------------------------------
# Writing.


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
        """Raises UserError for a policy that would keep nothing."""
        for name in ("every", "keep_last"):
            if getattr(self, name) < 1:
                raise UserError(f"checkpoint.{name}: {getattr(self, name)}; expected at least 1")

    def manager_options(self) -> ocp.CheckpointManagerOptions:
        """The same for Orbax."""
        keep: list[Any] = [checkpoint_managers.LatestN(self.keep_last)]
        if self.keep_every is not None:
            keep.append(checkpoint_managers.EveryNSteps(self.keep_every))
        best = None
        if self.keep_best:
            best = functools.partial(_metric, name=self.best_metric)
            keep.append(
                checkpoint_managers.BestN(
                    get_metric_fn=best,
                    reverse=not self.best_highest,
                    n=self.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        return ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
            best_fn=best,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=self.asynchronous,
            save_root_metadata=False,
        )


def _metric(metrics: Mapping[str, float], name: str) -> float:
    if name not in metrics:
        raise UserError(
            f"checkpoint.best_metric: {name!r} is not evaluated; known: {', '.join(metrics)}"
        )
    return metrics[name]


class Checkpointer(contextlib.AbstractContextManager):
    """Saves and restores the checkpoints of one workdir; used as a context manager.

    With several processes every method is a collective call: Orbax waits for all of them.
    """

    def __init__(
        self,
        workdir: PathLike,
        config: CheckpointConfig,
        *,
        write_assets: Callable[[epath.Path], Any] | None = None,
        check_assets: CheckAssets | None = None,
        saved_part: Callable[[Any], Any] = lambda state: state,
    ) -> None:
        """Opens ``<workdir>/checkpoints``, making it if needed.

        Args:
          workdir: folder of the run.
          config: when to save and what to keep.
          write_assets: called with an empty folder inside each new checkpoint; writes the files
            that make the checkpoint usable by itself.
          check_assets: raises where such a folder is damaged.
          saved_part: what of a state is saved, and restored; all of it by default.

        Raises:
          UserError: the folder cannot be written, or has a name that cannot be read back.
        """
        check_workdir(workdir)
        self.folder = absolute_path(workdir) / CHECKPOINTS
        self._config = config
        self._write_assets, self._check_assets = write_assets, check_assets
        self._saved_part = saved_part
        self._unverified: int | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                _set_aside_incomplete(self.folder)
        except OSError as error:
            raise UserError(f"cannot write checkpoints in {self.folder}: {error}") from error
        barrier("open_checkpoints")
        self._manager = ocp.CheckpointManager(self.folder, options=config.manager_options())

    def __exit__(self, *_: object) -> None:
        """Waits for the save in progress and releases Orbax's threads."""
        self.wait()
        self._manager.close()

    def due(self, step: int) -> bool:
        """Whether ``step`` is one to save."""
        return step > 0 and step % self._config.every == 0

    def save(
        self,
        step: int,
        state: Any,
        iterator: Any = None,
        *,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves ``state`` and the iterator's position, unless this step is saved already.

        Returns as soon as the arrays are copied; ``wait`` waits for the files.

        Args:
          step: number of optimizer steps done.
          state: pytree of arrays; may be donated after the call.
          iterator: has ``get_state() -> bytes`` and stands before batch ``step``; None where there
            is nothing to resume.
          metrics: of the evaluation at this step, for ``keep_best``.

        Raises:
          UserError: this save or the previous one could not be written; older checkpoints stay.
        """
        if step in self._manager.all_steps():
            return
        state = self._saved_part(state)
        self.wait()  # for the previous one, which is verified before an older one makes room
        # Each process writes its own position, taken now: the iterator moves on while the file is
        # written in the background. Assets are the same on all, so the first process writes them.
        # Checksums are computed from the arrays as they are now, before the next step takes their
        # memory; only the file waits for them.
        position = b"" if iterator is None else iterator.get_state()
        checksums = integrity.array_checksums(state)
        process, processes = jax.process_index(), jax.process_count()

        def write_checksums(folder: epath.Path) -> None:
            if process == 0:
                integrity.write_checksums(folder, checksums)

        items = {
            STATE: ocp.args.StandardSave(state),
            ITERATOR: FilesSave(
                lambda folder: integrity.write_position(folder, position, process, processes)
            ),
            CHECKSUMS: FilesSave(write_checksums),
        }
        if self._write_assets is not None:
            items[ASSETS] = FilesSave(self._write_assets if process == 0 else lambda folder: None)
        with self._write_errors():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True, metrics=metrics)
        self._unverified = step

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
        # A checkpoint can be damaged although its commit record is there: a disk lost blocks, or a
        # copy was cut short. The next older one is taken then, and damaged ones are renamed only
        # once another was read, so that nothing is touched where none can be. All processes take
        # the same one: the first finds it, and it counts only if every process could read it.
        template = self._saved_part(template)
        last_error: Exception | None = None
        newest = self._newest_complete()
        folder = intact_checkpoint(self.folder, self._check_assets)
        while folder is not None:
            state, positions, last_error = self._read(folder, template)
            if last_error is None:
                if iterator is not None:
                    iterator.set_state(*positions)
                self._set_aside(int(folder.name))
                return state
            logging.warning("checkpoint %s is damaged, skipped: %s", folder, last_error)
            folder = intact_checkpoint(self.folder, self._check_assets, below=int(folder.name))
        if newest is not None:
            raise UserError(
                f"none of the checkpoints in {self.folder} can be read "
                f"({last_error or f'{newest} is damaged'}); restore them, or move them away to "
                "start anew"
            )
        return None

    def _read(
        self, folder: epath.Path, template: Any
    ) -> tuple[Any, Sequence[bytes], Exception | None]:
        """State, positions and None, or what is wrong with them on this process or another."""
        state, positions, checksums, error = None, [], None, None
        try:
            _check_same_shapes(saved_shapes(folder), template, folder)
            checksums = integrity.read_checksums(folder / CHECKSUMS)
            positions = integrity.read_positions(folder / ITERATOR)
            # The handler itself, without Orbax's barrier after a restore: a process that fails
            # would leave the others waiting there.
            state = ocp.StandardCheckpointHandler().restore(
                folder / STATE, args=ocp.args.StandardRestore(template)
            )
        except UserError:
            raise
        except Exception as found:  # damage surfaces as many types of several libraries
            error = found
        if not _on_all_processes(error is None):
            return None, [], error or DamagedCheckpointError("another process cannot read it")
        if checksums is not None:
            try:
                integrity.compare(integrity.array_checksums(state), checksums)
            except DamagedCheckpointError as found:
                return None, [], found
        return state, positions, None

    def wait(self) -> None:
        """Waits until the save in progress is on disk, and opens it to see that it is whole.

        Raises:
          UserError: it could not be written, or not be read back.
        """
        with self._write_errors():
            self._manager.wait_until_finished()
        if self._unverified is None:
            return
        folder, self._unverified = self.folder / str(self._unverified), None
        if jax.process_index() == 0:
            try:
                _check_folder(folder, None)
            except DamagedCheckpointError as error:
                raise UserError(
                    f"checkpoint {folder} was written and cannot be read back ({error}); look at "
                    "the disk; older checkpoints are intact"
                ) from error

    def _newest_complete(self) -> epath.Path | None:
        steps = [path for path in _step_folders(self.folder) if _is_complete(path)]
        return steps[-1] if steps else None

    def _set_aside(self, restored: int) -> None:
        """Renames the checkpoints after a restored one, so that their steps can be saved again."""
        damaged = [path for path in _step_folders(self.folder) if int(path.name) > restored]
        if not _of_first_process(len(damaged)):
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


def _set_aside_incomplete(checkpoints: epath.Path) -> None:
    """Renames step folders that lack parts (an interrupted copy); names crashed saves."""
    for folder in _step_folders(checkpoints):
        if not _is_complete(folder):
            logging.warning("checkpoint %s is incomplete; skipped", folder)
            _rename(folder, "incomplete")
    for left in checkpoints.glob("*.orbax-checkpoint-tmp*"):
        logging.warning("checkpoint %s was never finished; removed", left)


def _rename(folder: epath.Path, suffix: str) -> None:
    target = folder.with_name(f"{folder.name}.{suffix}")
    target.rmtree(missing_ok=True)
    folder.rename(target)


def barrier(name: str) -> None:
    """Waits until every process is here; nothing to wait for in a single one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
