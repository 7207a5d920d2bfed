"""Placement of a decoder on devices: shardings of its parameters, mesh and rules of programs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from univla_jax.models import decoder_config


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a decoder lives. Without a mesh everything is on the default device.

    Attributes:
      mesh: the devices, or None.
      place: maps abstract parameters, boxed with logical names, to shapes with shardings.
      rules: of the activations, ``(logical name, mesh axes)`` pairs.
    """

    mesh: Mesh | None = None
    place: Callable[[Any], Any] = nn.unbox
    rules: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Traces and runs programs over the mesh."""
        if self.mesh is None:
            yield
            return
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.rules):
            yield

    def cache_parts(self, num_kv_heads: int) -> int:
        """Into how many parts caches are split."""
        split = dict(self.rules).get(decoder_config.ACTIVATION_KV_HEADS, ())
        sizes = [] if self.mesh is None else [self.mesh.shape[axis] for axis in split]
        return math.gcd(math.prod(sizes), num_kv_heads)

    def describe(self) -> str:
        """The mesh axes that are split, for people."""
        sizes = {} if self.mesh is None else {k: n for k, n in self.mesh.shape.items() if n > 1}
        return " x ".join(f"{axis} {size}" for axis, size in sizes.items()) or "one device"


LOCAL = Placement()


def shard_cache(cache_LBMKC: jax.Array) -> jax.Array:
    """Splits keys or values [L, B, M, K, C] by key heads; as they are without a mesh."""
    heads = decoder_config.ACTIVATION_KV_HEADS
    return nn.with_logical_constraint(cache_LBMKC, (None, None, None, heads, None))


def replicate(x: jax.Array) -> jax.Array:
    """The whole of an array on every device; as it is without a mesh."""
    return nn.with_logical_constraint(x, (None,) * x.ndim)
