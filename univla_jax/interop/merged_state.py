"""State of an adapter checkpoint merged into its base, read in parts as ``StateReader`` does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from univla_jax import checkpoints
from univla_jax.adapters import find_base, load_adapter
from univla_jax.interop.tensor_io import StateReader
from univla_jax.models.action_expert import DECODER, EXPERT

_PARAMS = "params/"


class MergedState:
    """Parts of the arrays of a model that is an adapter and a base; the base is never in memory."""

    def __init__(self, folder: epath.Path, record: Mapping[str, Any]) -> None:
        """Opens an adapter checkpoint and the base that its assets name.

        Raises:
          UserError: the base is not there.
        """
        base = find_base(record)
        self._prefix = f"{_PARAMS}{DECODER}/" if checkpoints.has_part(base, EXPERT) else _PARAMS
        self._base, self._own = (StateReader(f / checkpoints.STATE) for f in (base, folder))
        self._averages = checkpoints.acting_names(folder)
        self._adapter = load_adapter(folder, record, None)
        shapes = checkpoints.saved_shapes(base)
        self.shapes = {
            _PARAMS + name.removeprefix(self._prefix): shape
            for name, shape in shapes.items()
            if name.startswith(self._prefix)
        }
        own = checkpoints.saved_shapes(folder)
        if any(name.startswith(f"{_PARAMS}{EXPERT}/") for name in own):
            self.shapes = {
                name.replace(_PARAMS, f"{_PARAMS}{DECODER}/", 1): shape
                for name, shape in self.shapes.items()
            }
            self.shapes |= {n: s for n, s in own.items() if n.startswith(f"{_PARAMS}{EXPERT}/")}

    def array(self, path: str) -> ts.TensorStore:
        """The array ``params/a/b`` before merging, opened: has shape and dtype."""
        if path.startswith(f"{_PARAMS}{EXPERT}/"):
            return self._own.array(path)
        return self._base.array(self._prefix + self._name(path))

    def read(self, path: str, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """The merged array, or the part of it at ``index`` of its leading axis."""
        if path.startswith(f"{_PARAMS}{EXPERT}/"):
            return self._own.read(self._averages.get(path, path), index)
        name = self._name(path)
        return self._adapter.merge_part(name, index, self._base.read(self._prefix + name, index))

    def _name(self, path: str) -> str:
        return path.removeprefix(_PARAMS).removeprefix(f"{DECODER}/")
