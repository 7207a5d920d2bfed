"""What a converted folder keeps of the model folder it came from, so that going back is exact.

    source/
      source.json       format and sha256 of every file below
      headers/<name>    header of each safetensors file, bytes as they were
      files/<name>      every small file: config.json, index, tokenizer, code

The tensors themselves lie in the checkpoint. With these headers they make the same files again.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

from univla_jax.errors import UserError
from univla_jax.interop.hub_folder import HubFolder
from univla_jax.tokenizers.files import dump_json, hash_files, parse_json, write_files

SOURCE = "source"
_RECORD = "source.json"
_FORMAT = 1
_COMMITTED = "commit_success.txt"  # Orbax leaves it in folders of remote stores


@dataclasses.dataclass(frozen=True)
class SourceRecord:
    """The record read back.

    Attributes:
      headers: header bytes of each weight file, by file name.
      files: every other file, by name.
    """

    headers: Mapping[str, bytes]
    files: Mapping[str, bytes]

    @classmethod
    def load(cls, folder: pathlib.Path) -> SourceRecord | None:
        """The record in ``folder``, None where there is no such folder.

        Raises:
          UserError: a file of it was changed, removed or added.
        """
        if not (folder / _RECORD).is_file():
            return None
        record = parse_json((folder / _RECORD).read_bytes(), where=f"{folder}/{_RECORD}")
        if record.get("format") != _FORMAT:
            raise UserError(
                f"{folder}/{_RECORD}: format {record.get('format')}, expected {_FORMAT}"
            )
        found = hash_files(folder)
        for own in (_RECORD, _COMMITTED):
            found.pop(own, None)
        if found != record["files"]:
            changed = sorted({k for k, _ in found.items() ^ record["files"].items()})
            raise UserError(f"{folder}: {changed[0]} was changed, removed or added; convert again")
        return cls(_read(folder / "headers"), _read(folder / "files"))


def save_source(folder: pathlib.Path, hub: HubFolder) -> None:
    """Writes the record of a model folder."""
    write_files(folder / "headers", hub.headers)
    write_files(folder / "files", hub.small_files)
    record = {"format": _FORMAT, "files": hash_files(folder)}
    (folder / _RECORD).write_bytes(dump_json(record))


def _read(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
