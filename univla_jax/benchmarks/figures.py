"""Where the benchmarks leave what they measured; the flag is theirs together."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from absl import flags

JSON = flags.DEFINE_string("json", None, "Also writes the figures to this file")


def save(figures: Any) -> None:
    """Writes the figures as JSON where ``--json`` says; nowhere without it."""
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
