"""A Hugging Face model folder: config.json, safetensors in one file or in shards, and small files.

Opening a folder checks all of it: every shard is there and whole, and the index and the shards name
the same tensors. No tensor is read.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from univla_jax.errors import UserError
from univla_jax.interop.tensor_io import StoredTensor, parse_header, read_header
from univla_jax.io import dump_json, hash_files, parse_json, write_files

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SUFFIX = ".safetensors"
_SMALL_FILE = 64 << 20  # bytes; larger files beside the weights are no part of the model
_MAX_LISTED = 8


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
        if not (path / CONFIG).is_file():
            raise UserError(
                f"{path}: no {CONFIG}; give a model folder as the hub stores it, with {CONFIG} and "
                f"{SINGLE} or {INDEX}"
            )
        config = parse_json((path / CONFIG).read_bytes(), where=f"{path}/{CONFIG}")
        weight_map = _read_weight_map(path)
        names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise UserError(
                f"{path}/{INDEX} names {_first_of(missing)}, which the folder lacks; fetch the "
                "missing files"
            )
        headers = {name: read_header(path / name) for name in names}
        shards = {name: parse_header(header, path / name) for name, header in headers.items()}
        if weight_map is not None:
            _check_index(path, weight_map, shards)
        tensors = {key: tensor for shard in shards.values() for key, tensor in shard.items()}
        return cls(path, config, headers, tensors)

    @functools.cached_property
    def small_files(self) -> dict[str, bytes]:
        """Every other file of the folder itself (not of folders in it) up to 64 MiB, by name."""
        return {
            file.name: file.read_bytes()
            for file in sorted(self.path.iterdir())
            if file.is_file() and file.suffix != _SUFFIX and file.stat().st_size <= _SMALL_FILE
        }

    @property
    def left_out(self) -> list[str]:
        """Names of files and folders that are neither weights in use nor small files."""
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


def _read_weight_map(path: pathlib.Path) -> dict[str, str] | None:
    """Key -> file name from the index; None where there is a single file."""
    if not (path / INDEX).is_file():
        if not (path / SINGLE).is_file():
            raise UserError(
                f"{path}: neither {SINGLE} nor {INDEX}; only safetensors are read: save the model "
                "again with safe_serialization=True"
            )
        return None
    weight_map = parse_json((path / INDEX).read_bytes(), where=f"{path}/{INDEX}").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}/{INDEX}: no weight_map in it; fetch the file again")
    outside = [name for name in weight_map.values() if pathlib.PurePath(str(name)).name != name]
    if outside:
        raise UserError(f"{path}/{INDEX}: names {outside[0]!r}, which is no file of the folder")
    return weight_map


def _check_index(
    path: pathlib.Path, weight_map: Mapping[str, str], shards: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raises UserError unless the index names every tensor with the shard it is in."""
    problems = [
        f"{key} is not in {name}" for key, name in weight_map.items() if key not in shards[name]
    ]
    problems += [
        f"{key} of {name} is not in the index"
        for name, shard in shards.items()
        for key in shard
        if weight_map.get(key) != name
    ]
    if problems:
        raise UserError(
            f"{path}/{INDEX} does not fit its shards: {_first_of(problems)}; fetch both again"
        )


def _first_of(items: list[str]) -> str:
    more = len(items) - _MAX_LISTED
    return ", ".join(items[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


# ----------------------------------------------------------------------------
# What a converted checkpoint keeps of its model folder, so that converting back gives the same
# bytes. The tensors lie in the checkpoint's state; with these headers they make the same files.
#
#     source/
#       source.json       format and sha256 of every file below
#       headers/<name>    header of each safetensors file, bytes as they were
#       files/<name>      every small file: config.json, index, tokenizer, code


SOURCE = "source"
_RECORD = "source.json"
_FORMAT = 1
_COMMITTED = "commit_success.txt"  # Orbax leaves it in folders of remote stores


@dataclasses.dataclass(frozen=True)
class SourceRecord:
    """What is kept of a model folder beside its tensors.

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
            changed = sorted({name for name, _ in found.items() ^ record["files"].items()})
            raise UserError(f"{folder}: {changed[0]} was changed, removed or added; convert again")
        parts = [folder / "headers", folder / "files"]
        return cls(*({file.name: file.read_bytes() for file in part.iterdir()} for part in parts))


def save_source(folder: pathlib.Path, hub: HfFolder) -> None:
    """Writes the record of a model folder."""
    write_files(folder / "headers", hub.headers)
    write_files(folder / "files", hub.small_files)
    (folder / _RECORD).write_bytes(dump_json({"format": _FORMAT, "files": hash_files(folder)}))
