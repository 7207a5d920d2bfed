"""A whole Hugging Face state dict in memory as our parameters; the converter streams them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util
import numpy as np

from univla_jax.interop.hf_weights import KeyRule, check_keys, stacked_shapes


def import_state(rules: Sequence[KeyRule], state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Hugging Face state dict -> our parameters as numpy arrays; the inverse of ``export_state``.

    Raises:
      UserError: a key is missing, unexpected or of another shape.
    """
    check_keys(rules, {key: np.shape(value) for key, value in state.items()}, "state dict")
    shapes = stacked_shapes(rules)
    flat: dict[str, np.ndarray] = {}
    for rule in rules:
        value = rule.from_hf(np.asarray(state[rule.key]))
        if rule.layer is None:
            flat[rule.path] = value
        else:
            stacked = flat.setdefault(rule.path, np.empty(shapes[rule.path], value.dtype))
            stacked[rule.layer] = value
    return flax.traverse_util.unflatten_dict(flat, sep="/")
