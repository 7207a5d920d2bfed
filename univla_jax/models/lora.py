"""LoRA: low-rank adapters of frozen matrices, rows of new ids, and merging both into their bases.

An adapted matrix W [inputs, outputs] computes ``x W + (alpha / rank) x A B`` with A [inputs, r] and
B [r, outputs], of which only A and B are trained; B starts at zero (Hu et al., arXiv 2106.09685).
Rows of new ids, in the embedding and in the head, are trained as whole rows: differences from those
of the base, which start at zero too. The base may be quantized (QLoRA, arXiv 2305.14314).

Axes: L layers, D model, V vocabulary, R trained rows, r rank.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from univla_jax.errors import UserError
from univla_jax.models.quantized_weights import KINDS, dequantize, quantize_leaf

LORA_A, LORA_B = "lora_a", "lora_b"
HEAD, EMBEDDING = "head", "embedding"
_ROWS = "_rows"
_NAMES = frozenset(
    {LORA_A, LORA_B, f"{HEAD}_{LORA_A}", f"{HEAD}_{LORA_B}", EMBEDDING + _ROWS, HEAD + _ROWS}
)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What of a decoder is adapted; everything else of it is frozen. Off by default.

    Attributes:
      rank: r of every adapted matrix; 0 adapts none.
      alpha: adapters are scaled by ``alpha / rank``.
      targets: regular expression of the adapted matrices, found anywhere in names such as
        ``stack/layers/attention/query``, ``stack/layers/mlp/up`` and ``head``.
      dropout: in training, on the inputs of the adapters.
      rows: ids whose rows of embedding and head are trained: ``"action"``, ``"visual"``, both
        joined by ``"+"`` where they adjoin, ``FIRST:STOP``, or empty for none.
      base: how the frozen matrices are stored: empty for the compute type, else one of
        ``quantized_weights.KINDS``.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: str = ""
    dropout: float = 0.0
    rows: str = ""
    base: str = ""

    def __post_init__(self) -> None:
        """Raises UserError, naming field and value, for settings that cannot work."""
        if self.rank < 0:
            raise UserError(f"model.lora.rank: {self.rank}; expected at least 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.lora.dropout: {self.dropout}; expected a rate in [0, 1)")
        if self.base and self.base not in KINDS:
            raise UserError(f"model.lora.base: {self.base!r}; expected empty or one of {KINDS}")
        if self.base and not self.enabled:
            raise UserError(
                f"model.lora.base: {self.base!r}, but nothing is adapted; set model.lora.rank"
            )
        try:
            re.compile(self.targets)
        except re.error as error:
            raise UserError(
                f"model.lora.targets: {self.targets!r} is no regular expression ({error})"
            ) from error

    @property
    def enabled(self) -> bool:
        """Whether the base is frozen and something is trained beside it."""
        return self.rank > 0 or bool(self.rows)

    @property
    def scale(self) -> float:
        """Factor of the adapters' product."""
        return self.alpha / self.rank

    def adapts(self, name: str) -> bool:
        """Whether the matrix of this name gets an adapter."""
        return self.rank > 0 and re.search(self.targets, name) is not None

    @property
    def row_range(self) -> tuple[int, int]:
        """First and one past the last of the trained rows, once ``rows`` says ``FIRST:STOP``."""
        first, _, stop = self.rows.partition(":")
        return (int(first), int(stop)) if self.rows else (0, 0)

    def with_rows(self, blocks: Mapping[str, tuple[int, int]], size: int) -> LoraConfig:
        """The same with ``rows`` as ``FIRST:STOP``.

        Args:
          blocks: first id and one past the last, by name.
          size: of the vocabulary.

        Raises:
          UserError: an unknown name, names that do not adjoin, or ids outside the vocabulary.
        """
        if not self.rows:
            return self
        if re.fullmatch(r"\d+:\d+", self.rows):
            first, stop = self.row_range
        else:
            names = self.rows.split("+")
            unknown = [name for name in names if name not in blocks]
            if unknown:
                raise UserError(
                    f"model.lora.rows: {unknown[0]!r}; expected FIRST:STOP or names of "
                    f"{', '.join(blocks)} joined by '+'"
                )
            parts = sorted(blocks[name] for name in names)
            first, stop = parts[0][0], parts[-1][1]
            if any(a[1] != b[0] for a, b in itertools.pairwise(parts)):
                raise UserError(f"model.lora.rows: {self.rows!r} do not adjoin; name one of them")
        if not 0 <= first < stop <= size:
            raise UserError(f"model.lora.rows: ids {first}:{stop} are no part of the {size} ids")
        return dataclasses.replace(self, rows=f"{first}:{stop}")


def is_adapter(name: str) -> bool:
    """Whether the parameter ``a/b/c`` belongs to an adapter."""
    return name.rpartition("/")[2] in _NAMES


def adapter_inits(fan_in: int, names_in: tuple[Any, ...], names_out: tuple[Any, ...]) -> Any:
    """Initializers of A and B, boxed so that they are split as their base is."""
    normal = nn.initializers.normal(fan_in**-0.5)
    zeros = nn.initializers.zeros_init()
    return (
        nn.with_logical_partitioning(normal, (*names_in, None)),
        nn.with_logical_partitioning(zeros, (None, *names_out)),
    )


# ----------------------------------------------------------------------------
# Merging. One array at a time, and of a stack of layers one layer at a time, so that no second copy
# of a model is ever made.


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A trained adapter.

    Attributes:
      config: what is adapted; ``rows`` says ``FIRST:STOP``.
      params: its arrays by their names in the decoder's parameters.
    """

    config: LoraConfig
    params: Mapping[str, Any]

    def merge(self, name: str, base: jax.Array) -> jax.Array:
        """The base's parameter ``name`` with the adapter added, in its own type; may be donated.

        A base that was quantized for training is rounded as it was then.
        """
        if self.config.base:
            base = _rounded(name, base, self.config.base)
        pair = self._pair(name)
        if pair is not None:
            flat = name != HEAD
            base = _merge_stacked(base, *pair) if flat else _merge_head(base, *pair)
        if (rows := self.params.get(name + _ROWS)) is not None:
            base = _merge_rows(base, rows, self.config.row_range[0])
        return base

    def merge_part(self, name: str, index: tuple[Any, ...], base: np.ndarray) -> np.ndarray:
        """``merge`` of the part at ``index`` of the leading axis: a layer, or some rows."""
        if self.config.base:
            stacked = index and not isinstance(index[0], slice)
            part = _rounded(name, jnp.asarray(base)[None if stacked else ...], self.config.base)
            base = np.asarray(part[0] if stacked else part)
        out = np.asarray(base, np.float32)
        pair = self._pair(name)
        if pair is not None and name != HEAD:
            a, b = (np.asarray(x[index], np.float32) for x in pair)
            out = out + np.tensordot(a, b, axes=1)
        elif pair is not None:
            a, b = (np.asarray(x, np.float32) for x in pair)
            out = out + (b[index] if index else b) @ a.T
        if (rows := self.params.get(name + _ROWS)) is not None:
            whole = slice(*(index[0].start, index[0].stop) if index else (0, len(base)))
            first, stop = self.config.row_range
            begin, end = max(first, whole.start), min(stop, whole.start + len(base))
            if begin < end:
                out = np.array(out)
                out[begin - whole.start : end - whole.start] += np.asarray(
                    rows[begin - first : end - first], np.float32
                )
        return out.astype(base.dtype)

    def _pair(self, name: str) -> tuple[Any, Any] | None:
        """A and the scaled B of a kernel, or of the head."""
        stem = f"{HEAD}_" if name == HEAD else name.removesuffix("kernel")
        if name != HEAD and not name.endswith("/kernel"):
            return None
        a, b = (self.params.get(stem + part) for part in (LORA_A, LORA_B))
        return None if a is None else (a, b * self.config.scale)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _rounded(name: str, base: jax.Array, kind: str) -> jax.Array:
    return dequantize(quantize_leaf(name, base, kind), base.dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _merge_stacked(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Adds A B, layer by layer, to a stacked kernel."""

    def layer(parts: Any) -> jax.Array:
        kernel, a, b = parts
        return (kernel.astype(jnp.float32) + jnp.tensordot(a, b, axes=1)).astype(kernel.dtype)

    return jax.lax.map(layer, (kernel, a, b))


@functools.partial(jax.jit, donate_argnums=0)
def _merge_head(head: jax.Array, a_Dr: jax.Array, b_Vr: jax.Array) -> jax.Array:
    return (head.astype(jnp.float32) + b_Vr @ a_Dr.T).astype(head.dtype)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def _merge_rows(table: jax.Array, rows: jax.Array, first: int) -> jax.Array:
    return table.at[first : first + len(rows)].add(rows.astype(table.dtype))
