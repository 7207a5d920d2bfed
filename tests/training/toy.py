"""A least-squares toy that trains in milliseconds, with everything the loop needs."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from univla_jax.training.train_step import TrainState

OPTIMIZER = optax.adam(0.05)


class Batches:
    """Endless random batches; the position is the number of the next one."""

    def __init__(self, end: int | None = None, poison: int | None = None) -> None:
        self.position, self._end, self._poison = 0, end, poison

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self.position == self._end:
            raise StopIteration
        rng = np.random.default_rng(self.position)
        x = rng.normal(size=(8, 4)).astype(np.float32)
        if self.position == self._poison:
            x[0, 0] = np.nan
        self.position += 1
        return {"x": x, "y": x @ np.arange(4, dtype=np.float32)}

    def get_state(self) -> bytes:
        return json.dumps({"position": self.position}).encode()

    def set_state(self, state: bytes) -> None:
        self.position = json.loads(state)["position"]


def init(key: jax.Array) -> dict[str, jax.Array]:
    """Four weights."""
    return {"w": jax.random.normal(key, (4,))}


def create() -> TrainState:
    """The state at step 0."""
    return TrainState.create(init(jax.random.key(0)), OPTIMIZER)


def template(state: Any) -> Any:
    """Shapes, dtypes and shardings of ``state``."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def _loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


@jax.jit
def _step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
    loss, grads = jax.value_and_grad(_loss)(state.params, batch)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), {"loss": loss}


step = jax.jit(_step, donate_argnums=0)
