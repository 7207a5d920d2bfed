"""What training carries from step to step, sharded from birth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from univla_jax.training import sharding

Init = Callable[[jax.Array], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters, optimizer state and step; a pytree.

    Random numbers are not carried: each step folds its number into the run's seed.

    Attributes:
      step: int32 scalar, the number of optimizer steps done.
      params: the model's parameters.
      opt_state: the optimizer's state over ``params``.
    """

    step: jax.Array
    params: Any
    opt_state: Any

    @classmethod
    def create(cls, params: Any, optimizer: optax.GradientTransformation) -> TrainState:
        """The state at step 0 of a run that starts from ``params``."""
        return cls(jnp.zeros([], jnp.int32), params, optimizer.init(params))


def abstract_state(init: Init, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a run's state; nothing is allocated.

    Args:
      init: makes the parameters from a PRNG key, boxed with logical names where they are split.
      optimizer: its moments are split as the parameters are.
      mesh: where the state will live.

    Returns:
      a ``TrainState`` of ``jax.ShapeDtypeStruct`` with ``.sharding``: what restoring needs.
    """
    boxed = jax.eval_shape(lambda key: TrainState.create(init(key), optimizer), jax.random.key(0))
    return sharding.place(boxed, mesh)


def init_state(
    init: Init, optimizer: optax.GradientTransformation, seed: int, abstract: TrainState
) -> TrainState:
    """Makes the state on the devices that hold it; no host ever has a whole copy.

    Args:
      init: makes the parameters from a PRNG key.
      optimizer: initialised from them.
      seed: of the parameters.
      abstract: from ``abstract_state``.
    """
    create = jax.jit(
        lambda key: TrainState.create(sharding.unbox(init(key)), optimizer),
        out_shardings=sharding.shardings(abstract),
    )
    return create(jax.random.key(seed))


def state_from_params(
    params: Any, optimizer: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """The state at step 0 around parameters that were loaded; ``params`` is donated."""
    create = jax.jit(
        lambda p: TrainState.create(p, optimizer),
        out_shardings=sharding.shardings(abstract),
        donate_argnums=0,
    )
    return create(params)
