"""Groups of parameters by regular expression: which are frozen, and their learning rates.

Expressions are found anywhere in the names that ``sharding.txt`` lists, such as ``embedding`` or
``stack/layers/mlp/up/kernel``. Layers are stacked in one array; ``stack/layers/3/mlp/up/kernel``
names the part of a single one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from univla_jax.errors import UserError
from univla_jax.integrity import path_name
from univla_jax.models.action_expert import EXPERT

_STACK = "stack/layers/"
_EMBEDDING = "embedding"


def layer_names(name: str, layers: int) -> list[str]:
    """Names of a stacked parameter's layers; the name alone of one that is not stacked."""
    if _STACK not in name:
        return [name]
    return [name.replace(_STACK, f"{_STACK}{i}/", 1) for i in range(layers)]


def check_expression(pattern: str, where: str) -> None:
    """Raises UserError unless ``pattern`` is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is no regular expression ({error})") from error


def check_matches(patterns: Sequence[str], shapes: Mapping[str, Any], where: str) -> None:
    """Checks that every expression finds a parameter.

    Args:
      patterns: the expressions.
      shapes: shapes by name.
      where: the config's key.

    Raises:
      UserError: naming the first that finds none.
    """
    known = [n for name, shape in shapes.items() for n in (name, *layer_names(name, shape[0]))]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in known):
            raise UserError(
                f"{where}: {pattern!r} matches no parameter; names are those of sharding.txt, "
                f"such as {', '.join(list(shapes)[:4])}"
            )


def factors(
    name: str,
    layers: int,
    *,
    freeze: Sequence[str] = (),
    groups: Sequence[tuple[str, float]] = (),
    layer_decay: float = 1.0,
) -> np.ndarray:
    """Factors of the learning rate: [L] of a stacked parameter, [1] of another.

    Args:
      name: of the parameter.
      layers: L.
      freeze: expressions of what has the factor 0.
      groups: expressions and the factors of what they find; all that find it are multiplied.
      layer_decay: the decoder's last layer has the factor 1, each one before this times the next
        one's, the embedding once more.
    """
    made = []
    for index, own in enumerate(layer_names(name, layers)):
        value = 1.0
        if EXPERT not in name.split("/"):
            if _STACK in name:
                value *= layer_decay ** (layers - 1 - index)
            elif name.rpartition("/")[2].startswith(_EMBEDDING):
                value *= layer_decay**layers
        found = lambda pattern: re.search(pattern, name) or re.search(pattern, own)  # noqa: E731, B023
        for pattern, factor in groups:
            value *= factor if found(pattern) else 1.0
        made.append(0.0 if any(found(pattern) for pattern in freeze) else value)
    return np.asarray(made)


def scale_by_factors(
    factors_of: Callable[[str, tuple[int, ...]], np.ndarray],
) -> optax.GradientTransformation:
    """Multiplies the update of each parameter, given its name and shape, by its factors."""

    def leaf(path: Any, u: jax.Array) -> jax.Array:
        found = factors_of(path_name(path), u.shape)
        if (found == 1.0).all():
            return u
        if len(found) == 1:
            return u * float(found[0])
        return u * jnp.asarray(found, u.dtype).reshape(-1, *[1] * (u.ndim - 1))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree_util.tree_map_with_path(leaf, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)
