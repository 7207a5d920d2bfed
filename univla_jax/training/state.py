"""What training carries from step to step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


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


def abstract_state(
    init: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation
) -> TrainState:
    """Shapes and dtypes of a run's state, nothing allocated.

    Args:
      init: makes the parameters from a PRNG key.
      optimizer: its state is sized with them.

    Returns:
      a ``TrainState`` of ``jax.ShapeDtypeStruct``.
    """
    return jax.eval_shape(lambda key: TrainState.create(init(key), optimizer), jax.random.key(0))


def init_state(
    init: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformation,
    seed: int,
    shardings: Any,
) -> TrainState:
    """Makes the state on the devices that will hold it; no host ever holds a whole copy.

    Args:
      init: makes the parameters from a PRNG key.
      optimizer: initialised from them.
      seed: of the parameters.
      shardings: a ``TrainState`` of ``jax.sharding.Sharding``, as ``sharding.state_shardings``
        returns it.
    """
    create = jax.jit(lambda key: TrainState.create(init(key), optimizer), out_shardings=shardings)
    return create(jax.random.key(seed))


def state_from_params(
    params: Any, optimizer: optax.GradientTransformation, shardings: Any
) -> TrainState:
    """The state at step 0 around parameters loaded from elsewhere; ``params`` is donated."""
    create = jax.jit(
        lambda p: TrainState.create(p, optimizer), out_shardings=shardings, donate_argnums=0
    )
    return create(params)
