"""A strict table between another program's weights and our parameter tree.

One rule per foreign tensor: its name and shape there, its place here, and how its axes move.
Stacked parameters take one rule per layer; vocabulary rows are padded on the way in and cut on the
way out, here and nowhere else. A key that is missing, unexpected or of another shape is an error,
and all of them are listed at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import numpy as np

from univla_jax.errors import UserError

_LISTED = 20  # differences written out in one message


@dataclasses.dataclass(frozen=True)
class KeyRule:
    """One tensor on both sides.

    Attributes:
      key: its name in the foreign state dict.
      shape: its shape there.
      path: our parameter, keys joined by "/".
      our_shape: shape of our parameter, or of one layer of a stacked one.
      permutation: foreign axes in our order; the result is then reshaped to ``our_shape``.
      layer: index into the leading axis of a stacked parameter, else None.
      pad_rows: zero rows appended to the first axis on the way in, cut on the way out.
    """

    key: str
    shape: tuple[int, ...]
    path: str
    our_shape: tuple[int, ...]
    permutation: tuple[int, ...] | None = None
    layer: int | None = None
    pad_rows: int = 0

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """The foreign tensor as our parameter (or one layer of it); the dtype stays."""
        if self.permutation:
            array = array.transpose(self.permutation)
        if self.pad_rows:
            array = padded(array, self.our_shape[0])
        return array.reshape(self.our_shape)

    def to_foreign(self, array: np.ndarray) -> np.ndarray:
        """Our parameter (or one layer of it) as the foreign tensor; undoes ``to_ours``."""
        if not self.permutation:
            real = array[: self.shape[0]] if self.pad_rows else array
            return np.ascontiguousarray(real).reshape(self.shape)
        moved = tuple(self.shape[axis] for axis in self.permutation)
        return np.ascontiguousarray(array.reshape(moved).transpose(np.argsort(self.permutation)))


def padded(array: np.ndarray, rows: int) -> np.ndarray:
    """``array`` with zero rows appended until it has ``rows``."""
    return np.pad(array, ((0, rows - len(array)),) + ((0, 0),) * (array.ndim - 1))


def check_keys(
    rules: Sequence[KeyRule], found: Mapping[str, Sequence[int]], *, where: str = "state dict"
) -> None:
    """Compares the foreign names and shapes with the table.

    Args:
      rules: the table.
      found: shape of every foreign tensor that is there.
      where: named in the message.

    Raises:
      UserError: listing what is missing, unexpected and of another shape.
    """
    table = {rule.key: rule for rule in rules}
    problems = [
        f"missing {key} {list(rule.shape)}" for key, rule in table.items() if key not in found
    ]
    problems += [f"unexpected {key} {list(found[key])}" for key in found if key not in table]
    problems += [
        f"{key} is {list(found[key])}, expected {list(rule.shape)}"
        for key, rule in table.items()
        if key in found and tuple(found[key]) != rule.shape
    ]
    _report(problems, where)


def check_params(rules: Sequence[KeyRule], params: Any, *, where: str = "parameters") -> None:
    """Compares our tree (arrays or ``ShapeDtypeStruct``) with the table.

    Raises:
      UserError: listing what is missing, unexpected and of another shape.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    wanted = stacked_shapes(rules)
    problems = [f"missing {p} {list(s)}" for p, s in wanted.items() if p not in flat]
    problems += [f"unexpected {p} {list(x.shape)}" for p, x in flat.items() if p not in wanted]
    problems += [
        f"{path} is {list(flat[path].shape)}, expected {list(shape)}"
        for path, shape in wanted.items()
        if path in flat and tuple(flat[path].shape) != shape
    ]
    _report(problems, where)


def stacked_shapes(rules: Iterable[KeyRule]) -> dict[str, tuple[int, ...]]:
    """Path -> whole shape of our parameters, layers stacked in front."""
    layers: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        shapes[rule.path] = rule.our_shape
        if rule.layer is not None:
            layers[rule.path] = max(layers.get(rule.path, 0), rule.layer + 1)
    return {p: (layers[p], *s) if p in layers else s for p, s in shapes.items()}


def import_state(rules: Sequence[KeyRule], state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Foreign state dict -> our parameters as numpy arrays, dtypes kept.

    Raises:
      UserError: see ``check_keys``.
    """
    check_keys(rules, {key: np.shape(value) for key, value in state.items()})
    shapes = stacked_shapes(rules)
    flat: dict[str, np.ndarray] = {}
    for rule in rules:
        value = rule.to_ours(np.asarray(state[rule.key]))
        if rule.layer is None:
            flat[rule.path] = value
            continue
        if rule.path not in flat:
            flat[rule.path] = np.empty(shapes[rule.path], value.dtype)
        flat[rule.path][rule.layer] = value
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def export_state(rules: Sequence[KeyRule], params: Any) -> dict[str, np.ndarray]:
    """Our parameters -> foreign state dict; the exact inverse of ``import_state``.

    Raises:
      UserError: see ``check_params``.
    """
    check_params(rules, params)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    state = {}
    for rule in rules:
        value = flat[rule.path] if rule.layer is None else flat[rule.path][rule.layer]
        state[rule.key] = rule.to_foreign(np.asarray(value))
    return state


def _report(problems: list[str], where: str) -> None:
    if not problems:
        return
    more = len(problems) - _LISTED
    listed = "; ".join(problems[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
    raise UserError(
        f"{where}: {len(problems)} difference(s) from the model: {listed}; bring config and "
        "weights of the same model together"
    )
