"""An Orbax item made of plain files, so that they are committed together with the arrays."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import orbax.checkpoint as ocp


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
