"""A folder that something was fitted into: complete when ``fit.json`` is there."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Collection
from typing import Any

from univla_jax.data.files import read_json, write_json
from univla_jax.errors import UserError

FILE = "fit.json"


def read_report(
    folder: str | os.PathLike[str], config: Any, *, free: Collection[str] = ()
) -> dict[str, Any] | None:
    """The report of a finished fit, None where there is none yet.

    Args:
      folder: where it was fitted into.
      config: its dataclass.
      free: fields which may differ from those it was fitted with.

    Raises:
      UserError: the folder holds a fit of another config; names each key with both values.
    """
    file = pathlib.Path(folder) / FILE
    if not file.exists():
        return None
    record, now = read_json(file), _plain(config)
    before = record["config"]
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in free
    ]
    if changed:
        raise UserError(
            f"{folder} was fitted with another config: {'; '.join(changed)}; use its values, or "
            "another --workdir"
        )
    return record["report"]


def finish(
    folder: str | os.PathLike[str], config: Any, *, source: str, report: dict[str, Any]
) -> None:
    """Marks the folder complete; call it after every other file is written.

    Args:
      folder: where it was fitted into.
      config: its dataclass.
      source: name of the dataset.
      report: what came out, as JSON values.
    """
    record = {"config": _plain(config), "source": source, "report": report}
    write_json(pathlib.Path(folder) / FILE, record)


def _plain(config: Any) -> dict[str, Any]:
    """As JSON would give it back: lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
