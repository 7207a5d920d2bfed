"""Small states of Adam: moments in eight bits, second moments by rows and columns, and roundings.

Eight bits: every number is a code times the largest of its row (the last axis). Codes are spaced as
powers, finely near zero, as moments span many orders of magnitude (after the dynamic codes of
Dettmers et al., arXiv 2110.02861), and rounded at random so that small changes are not lost.

Rows and columns: a second moment is the outer product of its means along the last two axes
(Adafactor; Shazeer and Stern, arXiv 1804.04235); the first moment is bfloat16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

SMALL = 4096  # arrays of fewer numbers, and vectors, stay in float32
_POWERS = {True: 4, False: 8}  # of signed codes (first moment) and unsigned ones (second)
_LEVELS = {True: 127, False: 255}


class Coded(NamedTuple):
    """An array in eight bits: codes, and the largest magnitude of each row [..., 1]."""

    codes: jax.Array
    largest: jax.Array


class Factored(NamedTuple):
    """Means of a non-negative array along its last axis and along the one before."""

    rows: jax.Array
    columns: jax.Array


def is_state(x: Any) -> bool:
    """Whether ``x`` is a small state, as a leaf."""
    return isinstance(x, (Coded, Factored))


def encode(x: jax.Array, key: jax.Array, *, signed: bool) -> Coded:
    """float32 in eight bits, rounded at random to one of the two nearest codes."""
    power, levels = _POWERS[signed], _LEVELS[signed]
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    part = jnp.abs(x) / jnp.where(largest > 0, largest, 1.0)
    low = jnp.clip(jnp.floor(levels * part ** (1 / power)), 0, levels - 1)
    below, above = (((low + i) / levels) ** power for i in (0, 1))
    up = jax.random.uniform(key, x.shape) * (above - below) < part - below
    codes = low + up
    codes = jnp.where(x < 0, -codes, codes) if signed else codes
    return Coded(codes.astype(jnp.int8 if signed else jnp.uint8), largest)


def decode(x: Coded) -> jax.Array:
    """The float32 array of a code."""
    signed = x.codes.dtype == jnp.int8
    codes = x.codes.astype(jnp.float32)
    return jnp.sign(codes) * (jnp.abs(codes) / _LEVELS[signed]) ** _POWERS[signed] * x.largest


def factor(x: jax.Array) -> Factored:
    """The means of a non-negative array."""
    return Factored(jnp.mean(x, axis=-1), jnp.mean(x, axis=-2))


def product(x: Factored) -> jax.Array:
    """The array that the means stand for."""
    total = jnp.mean(x.rows, axis=-1, keepdims=True)[..., None]
    return x.rows[..., None] * x.columns[..., None, :] / jnp.maximum(total, 1e-30)


def load(x: Any) -> jax.Array:
    """A moment as float32, however it is stored."""
    if isinstance(x, Coded):
        return decode(x)
    return product(x) if isinstance(x, Factored) else x.astype(jnp.float32)


def store(x: jax.Array, kind: str, key: jax.Array, *, signed: bool) -> Any:
    """A moment, float32, as ``kind`` stores it: ``"int8"`` or ``"factored"``."""
    if x.ndim < 2 or x.size < SMALL:
        return x
    if kind == "int8":
        return encode(x, key, signed=signed)
    return x.astype(jnp.bfloat16) if signed else factor(x)


def empty(params: Any, kind: str, *, signed: bool) -> Any:
    """Zero moments of parameters, boxed with logical names as those are."""

    def leaf(box: Any) -> Any:
        boxed = isinstance(box, nn.Partitioned)
        p = box.value if boxed else box
        state = store(jnp.zeros(p.shape, jnp.float32), kind, jax.random.key(0), signed=signed)
        if not boxed:
            return state
        names = {p.ndim: box.names}
        if isinstance(state, Factored):
            rows, columns = box.names[:-1], (*box.names[:-2], box.names[-1])
            return Factored(
                box.replace(value=state.rows, names=rows),
                box.replace(value=state.columns, names=columns),
            )
        return jax.tree.map(lambda x: box.replace(value=x, names=names[x.ndim]), state)

    return jax.tree.map(leaf, params, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def keys_like(tree: Any, key: jax.Array) -> Any:
    """A random key for every leaf of a tree."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))


# ----------------------------------------------------------------------------
# Parameters in few bits. An update far smaller than a bfloat16 parameter is lost when their sum is
# rounded to the nearest: rounding at random keeps it on average, a float32 copy keeps it exactly.


class MasterState(NamedTuple):
    """float32 copies of the parameters."""

    master: Any


def keep_master() -> optax.GradientTransformation:
    """Applies updates to float32 copies; the parameters become these, rounded to the nearest."""

    def init(params: Any) -> MasterState:
        return MasterState(optax.tree.cast(params, jnp.float32))

    def update(updates: Any, state: MasterState, params: Any = None) -> tuple[Any, MasterState]:
        master = jax.tree.map(jnp.add, state.master, updates)
        return jax.tree.map(_difference, master, params), MasterState(master)

    return optax.GradientTransformation(init, update)


def round_at_random(seed: int) -> optax.GradientTransformation:
    """Makes updates after which bfloat16 parameters are rounded up or down by chance."""

    def update(updates: Any, count: jax.Array, params: Any = None) -> tuple[Any, jax.Array]:
        keys = keys_like(updates, jax.random.fold_in(jax.random.key(seed), count))

        def leaf(u: jax.Array, p: jax.Array, key: jax.Array) -> jax.Array:
            if p.dtype != jnp.bfloat16:
                return u
            # A bfloat16 is the upper half of a float32: random lower bits carry by chance.
            bits = jax.lax.bitcast_convert_type(p.astype(jnp.float32) + u, jnp.uint32)
            bits += jax.random.bits(key, bits.shape, jnp.uint16).astype(jnp.uint32)
            new = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
            return new - p.astype(jnp.float32)

        return jax.tree.map(leaf, updates, params, keys), count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros([], jnp.int32), update)


def _difference(master: jax.Array, p: jax.Array) -> jax.Array:
    """What added to ``p`` in float32 gives ``master`` in the type of ``p``."""
    return master.astype(p.dtype).astype(jnp.float32) - p.astype(jnp.float32)


# ----------------------------------------------------------------------------
# Exponential moving average of the parameters.


class EmaState(NamedTuple):
    """The average, float32, the number of updates, and the state of the optimizer inside."""

    ema: Any
    count: jax.Array
    inner: Any


def with_ema(
    inner: optax.GradientTransformation, decay: float, start: int
) -> optax.GradientTransformation:
    """Averages the parameters that ``inner`` makes; the average is them until step ``start``."""

    def init(params: Any) -> EmaState:
        zero = jnp.zeros([], jnp.int32)
        return EmaState(optax.tree.cast(params, jnp.float32), zero, inner.init(params))

    def update(updates: Any, state: EmaState, params: Any = None) -> tuple[Any, EmaState]:
        updates, own = inner.update(updates, state.inner, params)
        kept = jnp.where(state.count < start, 0.0, decay)

        def leaf(ema: jax.Array, p: jax.Array, u: jax.Array) -> jax.Array:
            return kept * ema + (1 - kept) * (p + u).astype(p.dtype).astype(jnp.float32)

        ema = jax.tree.map(leaf, state.ema, params, updates)
        return updates, EmaState(ema, state.count + 1, own)

    return optax.GradientTransformation(init, update)
