"""Partial warm start: which parameters of an earlier stage fit a model of other sizes, as a table.

Every parameter of both sides is in the table: taken as it is, taken row by row (vocabulary tables,
whose ids are matched by what they mean) or layer by layer, new, or dropped. A matrix of other heads
or widths is new, and the earlier one dropped: parts of it would mean nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.assets import Assets
from univla_jax.errors import UserError
from univla_jax.tokenizers.text import TextTokenizer
from univla_jax.tokenizers.vocabulary import Vocabulary

TAKEN, ROWS, LAYERS, NEW, DROPPED = "taken", "rows", "layers", "new", "dropped"
_TABLES = ("embedding", "head")
_STACKED = "stack/layers/"
_SPECIALS = ("pad", "bos", "eos", "bot", "eot", "boa", "eoa", "eol", "eof", "img", "boi", "eoi")


@dataclasses.dataclass(frozen=True)
class RowMap:
    """Ids of two vocabularies that mean the same.

    Attributes:
      old: int [R] ids of the earlier vocabulary.
      new: int [R] those of this one, in the same order.
      described: what of the ids is matched, for people.
    """

    old: np.ndarray
    new: np.ndarray
    described: str

    @classmethod
    def of(cls, earlier: Assets, assets: Assets) -> RowMap:
        """Matches visual and action ids where both have the same tokenizer, text ids, and specials.

        Text ids of two tokenizers are matched by what they stand for: words both know, and bytes.
        """
        ours, theirs = assets.vocabulary, earlier.vocabulary
        prints, earlier_prints = assets.tokenizer_fingerprints, earlier.tokenizer_fingerprints
        pairs: dict[int, int] = {getattr(ours, n): getattr(theirs, n) for n in _SPECIALS}
        told = ["special"]
        for name in ("text", "vision", "action"):
            same = name in prints and prints[name] == earlier_prints.get(name)
            if same:
                matched = dict(zip(_ids(ours, name), _ids(theirs, name)))
                told.append(name)
            elif name == "text" and type(assets.text) is type(earlier.text):
                matched = same_pieces(earlier.text, assets.text)
                told.append(f"{len(matched)} pieces of text")
            else:
                matched = {}
                told.append(f"no {name}")
            pairs |= matched
        new = np.asarray(sorted(pairs))
        return cls(np.asarray([pairs[i] for i in new.tolist()]), new, ", ".join(told))


def same_pieces(earlier: TextTokenizer, text: TextTokenizer) -> dict[int, int]:
    """Ids of two tokenizers that stand for the same.

    Args:
      earlier: tokenizer of the earlier stage.
      text: tokenizer of this run.

    Returns:
      id of ``text`` -> id of ``earlier``.
    """
    known = {piece: i for i, piece in enumerate(earlier.pieces)}
    return {i: known[piece] for i, piece in enumerate(text.pieces) if piece in known}


def _ids(vocabulary: Vocabulary, name: str) -> range:
    """Ids of a tokenizer's codes in their order."""
    v = vocabulary
    if name == "text":
        # Emu3's actions are the last text ids: those rows are the text's in either model.
        return range(v.text_size)
    if name == "vision":
        return range(v.visual_start, v.visual_start + v.visual_size)
    return range(v.action_last, v.action_last - v.action_size, -1)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What becomes of one parameter.

    Attributes:
      name: its path ``a/b/c``.
      kind: ``taken``, ``rows``, ``layers``, ``new`` or ``dropped``.
      note: how much of it, and why.
    """

    name: str
    kind: str
    note: str = ""


def plan_transfers(
    saved: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], rows: RowMap
) -> list[Transfer]:
    """The table: one line per parameter of either side.

    Args:
      saved: shapes of the earlier stage, by path.
      wanted: shapes of this run, by path.
      rows: ids that mean the same.

    Raises:
      UserError: nothing of the earlier stage fits.
    """
    identical = np.array_equal(rows.old, rows.new)
    table = []
    for name in sorted(saved.keys() | wanted.keys()):
        have, want = saved.get(name), wanted.get(name)
        if want is None:
            table.append(Transfer(name, DROPPED, f"{have}; this model has none"))
        elif have is None:
            table.append(Transfer(name, NEW, f"{want}; the earlier stage has none"))
        elif name.rpartition("/")[2] in _TABLES and have[1:] == want[1:]:
            if have == want and identical:
                table.append(Transfer(name, TAKEN, f"{want}"))
                continue
            fresh, lost = want[0] - len(rows.new), have[0] - len(rows.old)
            note = f"{len(rows.new)} of {want[0]} ({rows.described}); {fresh} new, {lost} dropped"
            table.append(Transfer(name, ROWS, note))
        elif have == want:
            table.append(Transfer(name, TAKEN, f"{want}"))
        elif _STACKED in name and have[1:] == want[1:]:
            kept = min(have[0], want[0])
            rest = f"{want[0] - kept} new" if want[0] > kept else f"{have[0] - kept} dropped"
            table.append(Transfer(name, LAYERS, f"the first {kept} of {have[0]}; {rest}"))
        else:
            table.append(Transfer(name, NEW, f"{want}; {have} there is dropped"))
    if not any(line.kind in (TAKEN, ROWS, LAYERS) for line in table):
        raise UserError("nothing of the earlier stage fits this model; leave init_from empty")
    return table


def describe_transfers(table: list[Transfer]) -> str:
    """The table as text: counts, then one line per parameter."""
    kinds = (TAKEN, ROWS, LAYERS, NEW, DROPPED)
    counts = {kind: sum(line.kind == kind for line in table) for kind in kinds}
    head = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    width = max(len(line.name) for line in table)
    return "\n".join(
        [head, *(f"{line.kind:<8} {line.name:<{width}}  {line.note}".rstrip() for line in table)]
    )


def transfer(line: Transfer, fresh: jax.Array, saved: jax.Array, rows: RowMap) -> jax.Array:
    """The parameter of this run: initial values, and what is taken of ``saved``."""
    saved = saved.astype(fresh.dtype)
    if line.kind == TAKEN:
        return saved
    if line.kind == LAYERS:
        kept = min(len(fresh), len(saved))
        return fresh.at[:kept].set(saved[:kept])
    return fresh.at[jnp.asarray(rows.new)].set(saved[jnp.asarray(rows.old)])


def transfer_all(
    table: list[Transfer], fresh: Any, saved: Mapping[str, jax.Array], rows: RowMap, shardings: Any
) -> Any:
    """``fresh`` (donated), a tree of parameters, with all that the table takes of ``saved``."""
    lines = {line.name: line for line in table if line.kind in (TAKEN, ROWS, LAYERS)}

    def place(fresh: Any, saved: Mapping[str, jax.Array]) -> Any:
        def leaf(path: Any, x: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return transfer(lines[name], x, saved[name], rows) if name in lines else x

        return jax.tree_util.tree_map_with_path(leaf, fresh)

    return jax.jit(place, out_shardings=shardings, donate_argnums=0)(fresh, dict(saved))
