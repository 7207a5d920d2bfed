"""Lines of JSON that survive a kill: each is on disk before the next thing happens."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from univla_jax.errors import UserError


class Journal:
    """A ``.jsonl`` file that is only ever appended to.

    Attributes:
      path: the file.
      lines: everything in it, in order.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the file, or begins it; a last line that a kill cut short is dropped.

        Raises:
          UserError: a line that is not a JSON object.
        """
        self.path = pathlib.Path(path)
        self.lines: list[dict[str, Any]] = []
        whole = self._read() if self.path.exists() else 0
        self._file = self.path.open("ab")
        self._file.truncate(whole)

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds a line; it is on disk when this returns."""
        text = json.dumps(dict(line), ensure_ascii=False, allow_nan=False)
        self._file.write(text.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.lines.append(json.loads(text))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Journal:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        self.close()

    def _read(self) -> int:
        """Reads the complete lines; returns their size in bytes."""
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if not isinstance(value, dict):
                raise UserError(f"{self.path}: line {number} is damaged; delete the folder")
            self.lines.append(value)
        return whole
