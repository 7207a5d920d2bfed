"""One optimizer step and one evaluation step: jitted, with explicit shardings and donation.

The loss of a batch is ``sum(w * nll) / sum(w)`` over all its labeled tokens, over all devices,
hosts and micro-batches, so that neither the mesh nor the accumulation changes what is optimized.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from univla_jax.errors import UserError
from univla_jax.integrity import path_name
from univla_jax.training import sharding
from univla_jax.training.losses import LossFn
from univla_jax.training.sharding import batch_parts

Init = Callable[[jax.Array], Any]
IsTrained = Callable[[str], bool]
"""Whether the parameter ``a/b/c`` is trained."""


def trained_part(params: Any, is_trained: IsTrained | None) -> Any:
    """The tree with None in the place of every parameter that is frozen; all of it without a rule.

    Optimizer and gradient see nothing but this part.
    """
    if is_trained is None:
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if is_trained(path_name(path)) else None,
        params,
        is_leaf=lambda x: x is None or isinstance(x, nn.Partitioned),
    )


def join_parts(trained: Any, params: Any) -> Any:
    """``params`` with the parameters that ``trained`` has in their places."""
    return jax.tree.map(
        lambda new, old: old if new is None else new,
        trained,
        params,
        is_leaf=lambda x: x is None,
    )


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
    def create(
        cls,
        params: Any,
        optimizer: optax.GradientTransformation,
        is_trained: IsTrained | None = None,
    ) -> TrainState:
        """The state at step 0 of a run that starts from ``params``."""
        opt_state = optimizer.init(trained_part(params, is_trained))
        return cls(jnp.zeros([], jnp.int32), params, opt_state)


def abstract_state(
    init: Init,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    is_trained: IsTrained | None = None,
) -> TrainState:
    """Shapes, dtypes and shardings of a run's state; nothing is allocated.

    Args:
      init: makes the parameters from a PRNG key, boxed with logical names where they are split.
      optimizer: its moments are split as the parameters are.
      mesh: where the state will live.
      is_trained: which parameters the optimizer has a state for; all by default.

    Returns:
      a ``TrainState`` of ``jax.ShapeDtypeStruct`` with ``.sharding``: what restoring needs.
    """
    boxed = jax.eval_shape(
        lambda key: TrainState.create(init(key), optimizer, is_trained), jax.random.key(0)
    )
    return sharding.with_shardings(boxed, mesh)


def init_state(
    init: Init,
    optimizer: optax.GradientTransformation,
    seed: int,
    abstract: TrainState,
    is_trained: IsTrained | None = None,
) -> TrainState:
    """Makes the state on the devices that hold it; no host ever has a whole copy.

    Args:
      init: makes the parameters from a PRNG key.
      optimizer: initialized from them.
      seed: of the parameters.
      abstract: from ``abstract_state``.
      is_trained: as for ``abstract_state``.
    """
    create = jax.jit(
        lambda key: TrainState.create(nn.unbox(init(key)), optimizer, is_trained),
        out_shardings=sharding.shardings(abstract),
    )
    return create(jax.random.key(seed))


def state_from_params(
    params: Any,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    is_trained: IsTrained | None = None,
) -> TrainState:
    """The state at step 0 around parameters that were loaded; ``params`` is donated."""
    create = jax.jit(
        lambda p: TrainState.create(p, optimizer, is_trained),
        out_shardings=sharding.shardings(abstract),
        donate_argnums=0,
    )
    return create(params)


NORMALIZATIONS = ("global", "per_micro_batch")


@dataclasses.dataclass(frozen=True)
class Step:
    """A jitted function that runs with a mesh and the rules of logical names in scope."""

    jitted: Any
    mesh: Mesh
    rules: sharding.ShardingRules

    def __call__(self, *args: Any) -> Any:
        """Runs it."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.rules):
            return self.jitted(*args)

    def lower(self, *args: Any) -> Any:
        """Lowers it for arguments given as arrays or ``jax.ShapeDtypeStruct``."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.rules):
            return self.jitted.lower(*args)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    batch_sharding: NamedSharding,
    *,
    schedule: optax.Schedule,
    seed: int,
    accumulation: int = 1,
    normalization: str = "global",
    rules: sharding.ShardingRules = sharding.RULES,
    compiler_options: Mapping[str, Any] | None = None,
    is_trained: IsTrained | None = None,
) -> Step:
    """Builds ``step(state, batch) -> (state, metrics)``; ``state`` is donated.

    Args:
      loss_fn: see ``LossFn``.
      optimizer: applied to the gradient of the loss.
      abstract: the state's shapes and shardings, from ``abstract_state``.
      batch_sharding: of every array of the batch; its rows are split into the micro-batches.
      schedule: learning rate by step, for the metrics.
      seed: of dropout; each step folds its number into it.
      accumulation: micro-batches per step, run one after the other.
      normalization: ``"global"`` divides the summed loss of all micro-batches by their summed
        weight; ``"per_micro_batch"`` averages the micro-batches' own means, as the reference does
        (modeling_emu3.py:1586 under gradient accumulation).
      rules: for the activations the loss names, see ``sharding.activation_rules``.
      compiler_options: of XLA, see ``training/compiler_options.py``.
      is_trained: which parameters are trained; all by default. The others get no gradient.

    Returns:
      the step; its metrics are float32 scalars: ``loss``, ``grad_norm`` before clipping,
      ``learning_rate`` and what ``loss_fn`` sums.

    Raises:
      UserError: an unknown normalization.
    """
    if normalization not in NORMALIZATIONS:
        raise UserError(f"normalization: {normalization!r}; expected one of {NORMALIZATIONS}")
    mesh, placed = batch_sharding.mesh, sharding.shardings(abstract)
    per_micro_batch = normalization == "per_micro_batch"
    _, waits = sharding.split_memory(abstract.opt_state)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        micro = _split(batch, accumulation, batch_sharding)
        trained = trained_part(state.params, is_trained)
        gradient = _gradient(loss_fn, state, per_micro_batch)
        placed_grads = trained_part(placed.params, is_trained)
        grads, total, weight, sums = _accumulate(gradient, trained, micro, rng, placed_grads)
        denominator = accumulation if per_micro_batch else weight
        grads = jax.tree.map(lambda g, p: (g / denominator).astype(p.dtype), grads, trained)
        opt_state = state.opt_state
        if waits:  # in the host's memory, to which the output's shardings return it
            opt_state = jax.device_put(opt_state, sharding.on_device(abstract.opt_state))
        updates, opt_state = optimizer.update(grads, opt_state, trained)
        params = optax.apply_updates(trained, updates)
        if is_trained is not None:
            params = join_parts(params, state.params)
        metrics = {
            "loss": total / denominator,
            "grad_norm": optax.global_norm(grads),
            "learning_rate": jnp.float32(schedule(state.step)),
            **means(sums),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    whole = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(
        step,
        in_shardings=(placed, batch_sharding),
        out_shardings=(placed, whole),
        donate_argnums=0,
        compiler_options=dict(compiler_options or {}),
    )
    return Step(jitted, mesh, rules)


def make_eval_step(
    loss_fn: LossFn,
    abstract: TrainState,
    batch_sharding: NamedSharding,
    *,
    rules: sharding.ShardingRules = sharding.RULES,
    compiler_options: Mapping[str, Any] | None = None,
) -> Step:
    """Builds ``eval(params, step, batch) -> (sum of w * nll, sum of w, sums)`` without dropout.

    ``step``, int32, is that of the parameters: loss weights may be a schedule.
    """
    mesh = batch_sharding.mesh
    whole = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(
        lambda params, step, batch: loss_fn(params, batch, step, None),
        in_shardings=(sharding.shardings(abstract.params), whole, batch_sharding),
        out_shardings=whole,
        compiler_options=dict(compiler_options or {}),
    )
    return Step(jitted, mesh, rules)


def means(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Quotients of the ``(sum, count)`` pairs, totals as they are; NaN where the count is 0."""
    return {k: v[0] / v[1] if isinstance(v, tuple) else v for k, v in sums.items()}


def _gradient(loss_fn: LossFn, state: TrainState, per_micro_batch: bool) -> Callable[..., Any]:
    """``(trained, micro_batch, rng) -> ((total, (weight, sums)), gradient of total)``."""

    def objective(trained: Any, batch: Any, rng: jax.Array) -> tuple[jax.Array, Any]:
        params = join_parts(trained, state.params)
        total, weight, sums = loss_fn(params, batch, state.step, rng)
        return (total / weight if per_micro_batch else total), (weight, sums)

    return jax.value_and_grad(objective, has_aux=True)


def _accumulate(
    gradient: Callable[..., Any], params: Any, micro: Any, rng: jax.Array, placed: Any
) -> tuple[Any, jax.Array, jax.Array, Mapping[str, Any]]:
    """Sums gradient, loss, weight and metrics over the leading axis of ``micro``.

    Sums are float32, and gradients stay split as the parameters are.
    """

    def one(index: jax.Array, batch: Any) -> Any:
        (total, (weight, sums)), grads = gradient(params, batch, jax.random.fold_in(rng, index))
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return jax.lax.with_sharding_constraint(grads, placed), total, weight, sums

    def body(carry: Any, indexed: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, one(*indexed)), None

    # A scan needs its carry before the first micro-batch, and only the loss knows the shapes of its
    # metrics: its abstract evaluation gives zeros of the right kind. A single micro-batch skips the
    # scan, which would keep a second copy of the gradients.
    indices = jnp.arange(jax.tree.leaves(micro)[0].shape[0])
    if len(indices) == 1:
        return one(indices[0], jax.tree.map(lambda x: x[0], micro))
    shapes = jax.eval_shape(one, indices[0], jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(body, zeros, (indices, micro))[0]


def _split(batch: Any, parts: int, batch_sharding: NamedSharding) -> Any:
    """Makes a leading axis of micro-batches without moving a row to another device.

    Rows [B, ...] become [parts, B / parts, ...]; with D devices along the rows, micro-batch i takes
    the i-th block of each device's own rows, whose order is kept.
    """
    devices = batch_parts(batch_sharding.mesh)
    spec = PartitionSpec(None, *batch_sharding.spec)

    # After a plain reshape to [parts, B / parts] micro-batch 0 would be the rows of the first
    # devices alone, and XLA would move rows between all of them. Here the device axis is split off
    # first, so that every device cuts its own rows, and the constraint tells the partitioner to
    # move nothing.
    def leaf(x: jax.Array) -> jax.Array:
        blocks = x.reshape(devices, parts, x.shape[0] // (devices * parts), *x.shape[1:])
        micro = blocks.swapaxes(0, 1).reshape(parts, x.shape[0] // parts, *x.shape[1:])
        return jax.lax.with_sharding_constraint(micro, NamedSharding(batch_sharding.mesh, spec))

    return jax.tree.map(leaf, batch)
