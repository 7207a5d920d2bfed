"""Short tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[object]], *, left: int = 1) -> str:
    """Rows as aligned columns: words to the left, numbers to the right.

    Args:
      rows: the first is the heading; all of one length.
      left: how many of the first columns hold words.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        parts = [c.ljust(w) for c, w in zip(row[:left], widths[:left])]
        parts += [c.rjust(w) for c, w in zip(row[left:], widths[left:])]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)
