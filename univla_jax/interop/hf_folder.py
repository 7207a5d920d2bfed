"""A model folder as the hub stores it: config.json, safetensors in one file or in shards, and more.

Everything is checked when the folder is opened: that every shard is there and whole, and that the
index and the shards name the same tensors. No tensor is read.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from univla_jax.errors import UserError
from univla_jax.interop.tensor_files import StoredTensor, parse_header, read_header
from univla_jax.io import dump_json, hash_files, parse_json, write_files

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SUFFIX = ".safetensors"
_SMALL = 64 << 20  # bytes; larger files beside the weights are no part of a model folder
_LISTED = 8


@dataclasses.dataclass(frozen=True)
class HfFolder:
    """A checked folder.

    Attributes:
      path: where it lies.
      config: the parsed config.json.
      headers: header bytes of each weight file, by file name.
      tensors: every tensor by its key.
    """

    path: pathlib.Path
    config: Mapping[str, Any]
    headers: Mapping[str, bytes]
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, folder: str | pathlib.Path) -> HfFolder:
        """Reads the config, the index and the headers.

        Raises:
          UserError: no such folder, no config.json or weights, a shard that is missing or broken,
            or an index that does not fit the shards.
        """
        path = local_path(folder)
        config = parse_json(_read(path, CONFIG), where=f"{path}/{CONFIG}")
        places = _weight_map(path)
        names = sorted(set(places.values())) if places is not None else [SINGLE]
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise UserError(
                f"{path}/{INDEX} names {_some(missing)}, which the folder lacks; fetch the "
                "missing files"
            )
        headers = {name: read_header(path / name) for name in names}
        tensors = {name: parse_header(header, path / name) for name, header in headers.items()}
        if places is not None:
            _check_index(path, places, tensors)
        return cls(
            path, config, headers, {k: t for part in tensors.values() for k, t in part.items()}
        )

    @functools.cached_property
    def small_files(self) -> dict[str, bytes]:
        """Every other file of the folder itself (not of folders in it) up to 64 MiB, by name."""
        return {
            file.name: file.read_bytes()
            for file in sorted(self.path.iterdir())
            if file.is_file() and file.suffix != _SUFFIX and file.stat().st_size <= _SMALL
        }

    @property
    def left_out(self) -> list[str]:
        """Files and folders that are neither weights in use nor small files."""
        known = self.headers.keys() | self.small_files.keys()
        return sorted(file.name for file in self.path.iterdir() if file.name not in known)


def local_path(folder: str | pathlib.Path) -> pathlib.Path:
    """``folder`` as an absolute path.

    Raises:
      UserError: it is the address of something remote.
    """
    if "://" in str(folder):
        raise UserError(
            f"{folder}: conversion works on local folders; convert here, then copy (for example "
            "with gcloud storage cp -r)"
        )
    return pathlib.Path(folder).absolute()


def _read(path: pathlib.Path, name: str) -> bytes:
    if not (path / name).is_file():
        raise UserError(
            f"{path}: no {name}; give a model folder as the hub stores it, with {CONFIG} and "
            f"{SINGLE} or {INDEX}"
        )
    return (path / name).read_bytes()


def _weight_map(path: pathlib.Path) -> dict[str, str] | None:
    """Key -> file name from the index; None where there is a single file."""
    if not (path / INDEX).is_file():
        if not (path / SINGLE).is_file():
            raise UserError(
                f"{path}: neither {SINGLE} nor {INDEX}; only safetensors are read: save the model "
                "again with safe_serialization=True"
            )
        return None
    places = parse_json((path / INDEX).read_bytes(), where=f"{path}/{INDEX}").get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{path}/{INDEX}: no weight_map in it; fetch the file again")
    outside = [name for name in places.values() if pathlib.PurePath(str(name)).name != name]
    if outside:
        raise UserError(f"{path}/{INDEX}: names {outside[0]!r}, which is no file of the folder")
    return places


def _check_index(
    path: pathlib.Path, places: Mapping[str, str], tensors: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raises UserError unless the index says of each tensor where it is."""
    problems = [
        f"{key} is not in {name}" for key, name in places.items() if key not in tensors[name]
    ]
    problems += [
        f"{key} of {name} is not in the index"
        for name, part in tensors.items()
        for key in part
        if places.get(key) != name
    ]
    if problems:
        raise UserError(
            f"{path}/{INDEX} does not fit its shards: {_some(problems)}; fetch both again"
        )


def _some(items: list[str]) -> str:
    more = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")


# ----------------------------------------------------------------------------
# What a converted folder keeps of the model folder it came from, so that going back is exact.
#
#     source/
#       source.json       format and sha256 of every file below
#       headers/<name>    header of each safetensors file, bytes as they were
#       files/<name>      every small file: config.json, index, tokenizer, code
#
# The tensors themselves lie in the checkpoint. With these headers they make the same files again.


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
        return cls(_read_record(folder / "headers"), _read_record(folder / "files"))


def save_source(folder: pathlib.Path, hub: HfFolder) -> None:
    """Writes the record of a model folder."""
    write_files(folder / "headers", hub.headers)
    write_files(folder / "files", hub.small_files)
    record = {"format": _FORMAT, "files": hash_files(folder)}
    (folder / _RECORD).write_bytes(dump_json(record))


def _read_record(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
