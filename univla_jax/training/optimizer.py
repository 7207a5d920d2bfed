"""AdamW as the reference trains the decoder, and Muon for the vision tokenizer.

AdamW follows PyTorch and transformers as the reference calls them (UniVLA train/train_moe.py;
transformers 4.44 ``cosine_with_min_lr``; torch ``clip_grad_norm_`` and ``optim.AdamW``), so that a
trajectory can be compared step by step. Where Optax has a part it is used; ours are the end of the
schedule, the clip, because Optax's has no epsilon, and Adam's moments, because Optax's stores only
the first one in bfloat16.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from univla_jax.errors import UserError
from univla_jax.training import moments
from univla_jax.training.parameter_groups import check_expression, factors, scale_by_factors

_UNDECAYED = frozenset({"scale", "bias"})
_SMALL_MOMENTS = ("int8", "factored")
_MOMENTS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16} | dict.fromkeys(_SMALL_MOMENTS)
_ROUNDINGS = ("nearest", "stochastic", "master")
_ROUNDING_SEED = 0
_CLIP_EPSILON = 1e-6  # added to the norm by torch.nn.utils.clip_grad_norm_


# ----------------------------------------------------------------------------
# Schedule and clip of both optimizers.


def make_schedule(config: OptimizerConfig | MuonConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up from zero to the peak, then half a cosine down to the floor.

    Args:
      config: peak, floor and length of the warm-up.
      total_steps: where the cosine ends.

    Returns:
      ``schedule(step)``: the rate of the optimizer step with that 0-based number.
    """
    peak, floor = config.learning_rate, config.min_learning_rate
    span = max(1, total_steps - config.warmup_steps)

    # Optax's own cosine stays at the floor after its end. The reference's rises again, which its
    # recorded rates show and a run that goes past its length would feel.
    def cosine(step: Any) -> jax.Array:
        return floor + (peak - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * step / span))

    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, cosine], [config.warmup_steps])


def _check_rates(config: OptimizerConfig | MuonConfig) -> None:
    if not 0 < config.min_learning_rate <= config.learning_rate:
        raise UserError(
            f"optimizer.min_learning_rate: {config.min_learning_rate}; expected above 0 and at "
            f"most learning_rate, which is {config.learning_rate}"
        )


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients by ``min(1, max_norm / (norm + 1e-6))``, as torch's clip_grad_norm_."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        scale = jnp.minimum(1.0, max_norm / (optax.global_norm(updates) + _CLIP_EPSILON))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


# ----------------------------------------------------------------------------
# AdamW.


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Hyper-parameters of AdamW; the defaults are the reference's recipe.

    Attributes:
      learning_rate: the peak, reached after ``warmup_steps``.
      min_learning_rate: the floor at the end of the cosine.
      warmup_steps: linear warm-up from zero; step 0 has learning rate 0.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled decay of every parameter but norm scales and biases.
      clip_norm: largest global norm of the gradient; None leaves gradients as they are.
      moments_dtype: ``"float32"`` or ``"bfloat16"``, what both moments are stored in; ``"int8"``,
        both in eight bits; or ``"factored"``, the first in bfloat16 and the second by its means of
        rows and columns. The update is always computed in float32.
      rounding: of bfloat16 parameters after an update: ``"nearest"``; ``"stochastic"``, by chance,
        so that small updates count on average; or ``"master"``, of float32 copies.
      offload: whether moments, averages and float32 copies wait in the host's memory between steps.
      freeze: regular expressions of parameters that are not trained (``parameter_groups.py``).
      groups: pairs of a regular expression and the factor of the learning rate of what it finds.
      layer_decay: factor of the learning rate from each layer to the one below it.
      ema_decay: of an exponential moving average of the parameters, which then acts, is exported
        and is what a later stage starts from; 0 for none.
      ema_start: step from which on it averages.
    """

    learning_rate: float = 8e-5
    min_learning_rate: float = 5e-6
    warmup_steps: int = 50
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-6
    weight_decay: float = 0.1
    clip_norm: float | None = 5.0
    moments_dtype: str = "float32"
    rounding: str = "nearest"
    offload: bool = False
    freeze: tuple[str, ...] = ()
    groups: tuple[tuple[str, float], ...] = ()
    layer_decay: float = 1.0
    ema_decay: float = 0.0
    ema_start: int = 0

    def __post_init__(self) -> None:
        """Raises UserError, naming field and value, where training cannot go well."""
        _check_rates(self)
        if self.moments_dtype not in _MOMENTS:
            raise UserError(
                f"optimizer.moments_dtype: {self.moments_dtype!r}; "
                f"expected one of {', '.join(_MOMENTS)}"
            )
        if self.rounding not in _ROUNDINGS:
            raise UserError(
                f"optimizer.rounding: {self.rounding!r}; expected one of {', '.join(_ROUNDINGS)}"
            )
        for name, low in (("ema_decay", 0.0), ("layer_decay", 1e-9)):
            if not low <= getattr(self, name) <= 1 or self.ema_decay == 1:
                raise UserError(f"optimizer.{name}: {getattr(self, name)}; expected in [0, 1)")
        for pattern in self.freeze:
            check_expression(pattern, "optimizer.freeze")
        for pattern, factor in self.groups:
            check_expression(pattern, "optimizer.groups")
            if factor < 0:
                raise UserError(f"optimizer.groups: {pattern!r} has the factor {factor}; below 0")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise UserError(
                f"optimizer.clip_norm: {self.clip_norm}; expected above 0, or None for no clipping"
            )

    def factors(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Factors of a parameter's learning rate: one for each layer, or one."""
        rules = {"freeze": self.freeze, "groups": self.groups, "layer_decay": self.layer_decay}
        return factors(name, shape[0] if shape else 1, **rules)

    @property
    def expressions(self) -> dict[str, tuple[str, ...]]:
        """Regular expressions by the key of the config that names them."""
        return {
            "optimizer.freeze": self.freeze,
            "optimizer.groups": tuple(pattern for pattern, _ in self.groups),
        }


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW as the reference trains: clip, Adam, decoupled decay, scheduled rate.

    Args:
      config: hyper-parameters.
      total_steps: length of the run, where the cosine reaches its floor.
    """
    clip = [] if config.clip_norm is None else [clip_by_global_norm(config.clip_norm)]
    last = []
    if config.freeze or config.groups or config.layer_decay != 1:
        last.append(scale_by_factors(config.factors))
    if config.rounding == "master":
        last.append(moments.keep_master())
    elif config.rounding == "stochastic":
        last.append(moments.round_at_random(_ROUNDING_SEED))
    kind = config.moments_dtype
    if kind in _SMALL_MOMENTS:
        adam = scale_by_small_adam(config.b1, config.b2, config.eps, kind)
    else:
        adam = scale_by_adam(config.b1, config.b2, config.eps, _MOMENTS[kind])
    chain = optax.chain(
        *clip,
        adam,
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(make_schedule(config, total_steps)),
        *last,
    )
    if not config.ema_decay:
        return chain
    return moments.with_ema(chain, config.ema_decay, config.ema_start)


def decay_mask(params: Any) -> Any:
    """True for each parameter that is decayed: all but norm scales and biases.

    Embedding and head are decayed (reference: ``Trainer.get_decay_parameter_names`` with
    Emu3RMSNorm among its norm layers, modeling_emu3.py:126).
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path or getattr(path[-1], "key", "") not in _UNDECAYED, params
    )


def scale_by_adam(b1: float, b2: float, eps: float, dtype: Any) -> optax.GradientTransformation:
    """Adam's direction, computed in float32 with both moments stored in ``dtype``."""

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = (jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def average(old: jax.Array, new: jax.Array, decay: float) -> jax.Array:
        return decay * old.astype(jnp.float32) + (1 - decay) * new

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = optax.safe_increment(state.count)
        grads = optax.tree.cast(updates, jnp.float32)
        mu = jax.tree.map(lambda m, g: average(m, g, b1), state.mu, grads)
        nu = jax.tree.map(lambda v, g: average(v, g * g, b2), state.nu, grads)
        correct1, correct2 = 1 - b1**count, 1 - b2**count
        direction = jax.tree.map(lambda m, v: m / correct1 / (jnp.sqrt(v / correct2) + eps), mu, nu)
        moments = optax.tree.cast(mu, dtype), optax.tree.cast(nu, dtype)
        return direction, optax.ScaleByAdamState(count, *moments)

    return optax.GradientTransformation(init, update)


def scale_by_small_adam(
    b1: float, b2: float, eps: float, kind: str
) -> optax.GradientTransformation:
    """``scale_by_adam`` with moments as ``moments.store`` keeps them: ``int8`` or ``factored``."""

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = (moments.empty(params, kind, signed=signed) for signed in (True, False))
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = optax.safe_increment(state.count)
        leaves, structure = jax.tree.flatten(optax.tree.cast(updates, jnp.float32))
        old = [jax.tree.leaves(x, is_leaf=moments.is_state) for x in (state.mu, state.nu)]
        key = jax.random.fold_in(jax.random.key(_ROUNDING_SEED), count)
        made: tuple[list[Any], ...] = ([], [], [])
        for number, (g, m, v) in enumerate(zip(leaves, *old, strict=True)):
            m = b1 * moments.load(m) + (1 - b1) * g
            v = b2 * moments.load(v) + (1 - b2) * g * g
            for_m, for_v = jax.random.split(jax.random.fold_in(key, number))
            new_v = moments.store(v, kind, for_v, signed=False)
            v = moments.load(new_v) if kind == "factored" else v
            direction = m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps)
            new = direction, moments.store(m, kind, for_m, signed=True), new_v
            for parts, part in zip(made, new):
                parts.append(part)
        direction, mu, nu = (jax.tree.unflatten(structure, parts) for parts in made)
        return direction, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


# ----------------------------------------------------------------------------
# Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): every kernel is seen as a matrix
# [inputs, outputs] and its momentum replaced by the nearest orthogonal one, so that all directions
# of a layer move alike, which trains small convolutional nets fast. Biases, norms and kernels too
# narrow for that go through Adam.
#
# Optax has a Muon that trains as well (26.4 dB after 300 quickstart steps, ours 26.3), but one
# update of the quickstart's vision tokenizer takes 29 ms of CPU there and 15 ms here, its
# compilation 12 s and 6 s, and it could not go on from the optimizer states saved so far.

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_MIN_WIDTH = 8  # a kernel with fewer inputs or outputs has no directions to balance
_ADAM_RMS = 0.2  # of an update of Adam, which orthogonal updates are scaled to


@dataclasses.dataclass(frozen=True)
class MuonConfig:
    """Hyper-parameters of Muon.

    Attributes:
      learning_rate: peak rate of the parameters trained by Adam, reached after ``warmup_steps``.
      min_learning_rate: the floor at the end of the cosine.
      kernel_factor: rate of the orthogonalized kernels relative to the others.
      warmup_steps: linear warm-up from zero.
      momentum: decay of the kernels' momentum (Nesterov).
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment.
      clip_norm: largest global norm of the gradient.
    """

    learning_rate: float = 2e-3
    min_learning_rate: float = 4e-5
    kernel_factor: float = 5.0
    warmup_steps: int = 50
    momentum: float = 0.9
    b1: float = 0.9
    b2: float = 0.99
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        """Raises UserError for rates under which nothing is learned."""
        _check_rates(self)


def make_muon(config: MuonConfig, total_steps: int) -> optax.GradientTransformation:
    """Muon for kernels and Adam for the rest, in a run of ``total_steps``."""
    kernels = optax.chain(
        scale_by_orthogonal_momentum(config.momentum), optax.scale(config.kernel_factor)
    )
    others = optax.scale_by_adam(config.b1, config.b2)
    return optax.chain(
        clip_by_global_norm(config.clip_norm),
        optax.partition({"kernel": kernels, "other": others}, _muon_labels),
        optax.scale_by_learning_rate(make_schedule(config, total_steps)),
    )


def scale_by_orthogonal_momentum(momentum: float) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalized, at the root mean square of an update of Adam."""

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        return momentum * old + (1 - momentum) * new

    def direction(kernel: jax.Array) -> jax.Array:
        matrix = kernel.reshape(-1, kernel.shape[-1])
        scale = _ADAM_RMS * max(matrix.shape) ** 0.5
        return (orthogonalize(matrix) * scale).reshape(kernel.shape)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        state = jax.tree.map(average, state, updates)
        return jax.tree.map(direction, jax.tree.map(average, state, updates)), state

    return optax.GradientTransformation(optax.tree.zeros_like, update)


def orthogonalize(matrix: jax.Array) -> jax.Array:
    """[m, n] to about U V^T of its singular value decomposition, by five Newton-Schulz steps.

    The singular values come out between about 0.7 and 1.2, which serves as well as 1.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    a, b, c = _NEWTON_SCHULZ

    def step(_: int, x: jax.Array) -> jax.Array:
        square = x @ x.T
        return a * x + (b * square + c * square @ square) @ x

    out = jax.lax.fori_loop(0, _ITERATIONS, step, wide / (jnp.linalg.norm(wide) + 1e-7))
    return out if wide is matrix else out.T


def _muon_labels(params: Any) -> Any:
    """``"kernel"`` for each leaf that is orthogonalized, ``"other"`` for the rest."""

    def label(path: tuple[Any, ...], leaf: jax.Array) -> str:
        inputs = leaf.size // leaf.shape[-1] if leaf.ndim > 1 else 0
        wide = path[-1].key == "kernel" and min(inputs, leaf.shape[-1]) >= _MIN_WIDTH
        return "kernel" if wide else "other"

    return jax.tree_util.tree_map_with_path(label, params)
